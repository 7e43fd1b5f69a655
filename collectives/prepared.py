"""The forms of the collectives on one node that are prepared once and run often: for `plans.py`.

    window   record and place published -> ARRIVED -> my part, all views made before -> REDUCED
    staged   copy into my slot -> ARRIVED -> copy or add up out of the slots

Each does what the function of its row does in `window.py`, `window_moves.py` and `staged.py`, step by step with the
same records; what it leaves out is the Python that finds lengths, views and hashes again in every call.
"""

from collections.abc import Callable

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.arena import Place
from dtrain.collectives.call import Call
from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, address, starts
from dtrain.collectives.node import STAGE_BYTES, Node, Peers
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.window import block_elements, owned, reduce_into

Run = Callable[[Array, Array], None]
Part = Callable[[int, Array, Array], None]  # number of the collective, source, target
_OCTET = np.dtype(np.uint8)


def _windowed(
    node: Node,
    record: Record,
    part: Part,
    aside: Place = NO_PLACE,
    sources: Peers | None = None,
    users: Peers | None = None,
) -> Run:
    """Two synchronisations around this rank's part."""

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record, aside)
        node.arrive(number)
        node.complete(number)  # works started before: REDUCED below speaks for them too
        node.await_arrived(number, sources)
        part(number, source, target)
        node.reduced(number)
        node.await_reduced(number, users)

    return run


# Reductions in the window


def add_in_place(ufunc: np.ufunc, parts: list[Array], start: int, stop: int) -> Callable[[], None]:
    """What `window.reduce_in_place` does, with all blocks cut before."""
    dtype = parts[0].dtype
    if accumulator(dtype) != dtype:
        slices = [part[start:stop] for part in parts]
        return lambda: reduce_into(ufunc, parts, start, stop, slices)
    step = block_elements(dtype, len(parts))
    first, others = parts[0], parts[1:]
    blocks = []
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        blocks.append((first[begin:end], [part[begin:end] for part in others]))

    def add() -> None:
        for total, rest in blocks:
            for block in rest:
                ufunc(total, block, total)
            for block in rest:
                block[...] = total

    return add


def window_all_reduce(call: Call) -> Run:
    """All ranks' arrays at one place become their sum."""
    node, place = call.window
    parts = node.arena.parts(place, call.source.size, call.source.dtype)
    add = add_in_place(OPERATIONS[call.op], parts, *owned(call.source.size, node.rank, node.size))

    def part(number: int, source: Array, target: Array) -> None:
        with np.errstate(all="ignore"):
            add()

    dtype, count = call.source.dtype, call.source.size
    return _windowed(node, records.record("all_reduce", "window", call.op, dtype, count, place, 0), part)


def window_shared(node: Node, source: Array, place: Place, op: str, result: Array) -> Callable[[], None]:
    """The sum is written once, into result, the same memory on all."""
    parts = node.arena.parts(place, source.size, source.dtype)
    start, stop = owned(source.size, node.rank, node.size)
    into = result[start:stop]
    ufunc = OPERATIONS[op]

    def part(number: int, source: Array, target: Array) -> None:
        with np.errstate(all="ignore"):
            reduce_into(ufunc, parts, start, stop, [into])

    record = records.record("all_reduce_shared", "window", op, source.dtype, source.size, place, 0)
    run = _windowed(node, record, part)
    return lambda: run(into, into)


def window_reduce_scatter(call: Call) -> Run:
    """Target becomes the sum of all ranks' blocks of this rank."""
    node, place = call.window
    dtype, count = call.source.dtype, call.source.size
    parts = node.arena.parts(place, count, dtype)
    start = sum(call.counts[: node.rank])
    stop = start + call.counts[node.rank]
    ufunc = OPERATIONS[call.op]

    def part(number: int, source: Array, target: Array) -> None:
        with np.errstate(all="ignore"):
            reduce_into(ufunc, parts, start, stop, [target])

    extra = hash(tuple(call.counts))
    return _windowed(node, records.record("reduce_scatter", "window", call.op, dtype, count, place, extra), part)


# Movement in the window


def _view(node: Node, rank: int, number: int, begin: int, length: int) -> Array:
    """Bytes of what a rank that has arrived put aside; the places repeat, and so do the views."""
    place = node.aside(rank, number)
    assert place is not None
    return node.arena.parts((place[0], place[1] + begin), length, _OCTET)[rank]


def window_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    node, place = call.window
    item, mine = call.source.itemsize, node.rank
    lengths = [count * item for count in call.counts]
    blocks = [slice(start, start + length) for start, length in zip(starts(lengths), lengths, strict=True)]
    others = [(mine + step) % node.size for step in range(1, node.size)]

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        own = target[blocks[mine]]
        if len(own) and address(own) != address(source):
            copy(own, source.view(np.uint8))
        for rank in others:
            copy(target[blocks[rank]], _view(node, rank, number, 0, lengths[rank]))

    extra = hash((item, *call.counts))
    return _windowed(node, records.record("all_gather", "window", "", None, 0, NO_PLACE, extra), part, place)


def window_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources. Uneven blocks have no plan."""
    node, place = call.window
    item, mine = call.source.itemsize, node.rank
    if not call.alike:
        return None
    begins = [start * item for start in starts(call.counts)]
    length = call.counts[mine] * item
    own = slice(begins[mine], begins[mine] + length)
    others = [(mine + step) % node.size for step in range(1, node.size)]

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        copy(target[mine * length : (mine + 1) * length], source.view(np.uint8)[own])
        for rank in others:
            copy(target[rank * length : (rank + 1) * length], _view(node, rank, number, begins[mine], length))

    extra = hash((item, *call.counts))
    return _windowed(node, records.record("all_to_all", "window", "", None, 0, NO_PLACE, extra), part, place)


def window_broadcast(call: Call) -> Run:
    """Target of every rank = target of root."""
    node, place = call.window
    root, dtype, count = call.root, call.target.dtype, call.target.size
    length = count * dtype.itemsize
    record = records.record("broadcast", "window", "", dtype, count, NO_PLACE, root)
    if node.rank == root:
        return _windowed(node, record, lambda number, source, target: None, place, sources=[])

    def part(number: int, source: Array, target: Array) -> None:
        copy(target.view(np.uint8), _view(node, root, number, 0, length))

    return _windowed(node, record, part, place, sources=node.only(root), users=[])


# Through the staging: in chunks, whose views are made before


def staged_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    node, item = call.stage, call.source.itemsize
    lengths = [count * item for count in call.counts]
    record = records.record("all_gather", "staged", "", None, 0, NO_PLACE, hash((tuple(call.counts), -1)))
    offsets = starts(lengths)
    chunks: list[tuple[slice, list[tuple[slice, int, slice]]]] = []  # of source; of target, whose slot, of the slot
    for begin in range(0, max(lengths), STAGE_BYTES):
        parts = [max(0, min(STAGE_BYTES, length - begin)) for length in lengths]
        fetch = [
            (slice(offset + begin, offset + begin + part), rank, slice(part))
            for rank, (offset, part) in enumerate(zip(offsets, parts, strict=True))
            if part and rank != node.rank
        ]
        chunks.append((slice(begin, begin + parts[node.rank]), fetch))
    halves = [node.slots(half, _OCTET) for half in (0, 1)]
    own = slice(offsets[node.rank], offsets[node.rank] + lengths[node.rank])

    def run(source: Array, target: Array) -> None:
        source, target = source.view(np.uint8), target.view(np.uint8)
        for mine, fetch in chunks:
            number = node.begin_record(record)
            slots = halves[node.next_half(number)]
            copy(slots[node.rank][: mine.stop - mine.start], source[mine])
            node.arrive(number)
            if mine.start == 0:
                copy(target[own], source)
            node.await_arrived(number)
            for block, rank, part in fetch:
                copy(target[block], slots[rank][part])

    return run


def staged_all_to_all(call: Call) -> Run:
    """Target = the blocks for this rank of all sources, all of one length."""
    node, size, rank = call.stage, call.stage.size, call.stage.rank
    length = call.counts[0] * call.source.itemsize
    portion = STAGE_BYTES // size
    record = records.record("all_to_all", "staged", "", None, 0, NO_PLACE, length)
    halves = []
    for half in (0, 1):
        slots = node.slots(half, _OCTET)
        mine = slots[rank][: portion * size].reshape(size, portion)
        halves.append((mine, [slot[rank * portion : (rank + 1) * portion] for slot in slots]))
    others = [other for other in range(size) if other != rank]

    def run(source: Array, target: Array) -> None:
        blocks, rows = source.view(np.uint8).reshape(size, length), target.view(np.uint8).reshape(size, length)
        for begin in range(0, length, portion):
            part = min(portion, length - begin)
            number = node.begin_record(record)
            mine, slots = halves[node.next_half(number)]
            for other in others:
                copy(mine[other, :part], blocks[other, begin : begin + part])
            node.arrive(number)
            copy(rows[rank, begin : begin + part], blocks[rank, begin : begin + part])
            node.await_arrived(number)
            for other in others:
                copy(rows[other, begin : begin + part], slots[other][:part])

    return run


def staged_broadcast(call: Call) -> Run:
    """Target of every rank = target of root, who has copied his array there."""
    node, root, dtype, count = call.stage, call.root, call.target.dtype, call.target.size
    length = count * dtype.itemsize
    record = records.record("broadcast", "staged", "", dtype, count, NO_PLACE, root)
    halves = [node.slots(half, _OCTET)[root] for half in (0, 1)]
    sources = node.only(root)

    def run(source: Array, target: Array) -> None:
        octets = target.view(np.uint8)
        for begin in range(0, length, STAGE_BYTES):
            part = min(STAGE_BYTES, length - begin)
            number = node.begin_record(record)
            slot = halves[node.next_half(number)]
            if node.rank == root:
                copy(slot[:part], octets[begin : begin + part])
                node.arrive(number)
            else:
                node.arrive(number)
                node.await_arrived(number, sources)
                copy(octets[begin : begin + part], slot[:part])

    return run


def staged_reduce_scatter(call: Call) -> Run:
    """Target = the sum of the ranks' blocks of this rank; my own block comes straight from the source."""
    node, size, rank = call.stage, call.stage.size, call.stage.rank
    dtype, count, counts = call.source.dtype, call.source.size, list(call.counts)
    portion = STAGE_BYTES // dtype.itemsize // size
    ufunc = OPERATIONS[call.op]
    record = records.record("reduce_scatter", "staged", call.op, dtype, count, NO_PLACE, hash(tuple(counts)))
    offsets = starts(counts)
    halves = [node.slots(half, dtype) for half in (0, 1)]
    others = [other for other in range(size) if other != rank]

    def run(source: Array, target: Array) -> None:
        for begin in range(0, max(counts), portion):
            lengths = [max(0, min(portion, length - begin)) for length in counts]
            number = node.begin_record(record)
            slots = halves[node.next_half(number)]
            for other in others:
                origin, length = offsets[other] + begin, lengths[other]
                slots[rank][other * portion : other * portion + length] = source[origin : origin + length]
            node.arrive(number)
            node.await_arrived(number)
            first, length = rank * portion, lengths[rank]
            parts = [slot[first : first + length] for slot in slots]
            parts[rank] = source[offsets[rank] + begin : offsets[rank] + begin + length]
            with np.errstate(all="ignore"):
                reduce_into(ufunc, parts, 0, length, [target[begin : begin + length]])

    return run


def staged_all_reduce(call: Call) -> Run | None:
    """Target = the sum; my own slice is added up straight from the source."""
    node, rank = call.stage, call.stage.rank
    dtype, count = call.source.dtype, call.source.size
    if call.source.nbytes <= SMALL_BYTES:
        return None
    ufunc = OPERATIONS[call.op]
    record = records.record("all_reduce", "staged", call.op, dtype, count, NO_PLACE, -1)
    chunk = STAGE_BYTES // dtype.itemsize
    halves = [node.slots(half, dtype) for half in (0, 1)]
    chunks = []  # where; my slice; the slices of the others
    for begin in range(0, count, chunk):
        length = min(chunk, count - begin)
        ends = [owned(length, other, node.size) for other in range(node.size)]
        others = [(other, slice(*ends[other])) for other in range(node.size) if other != rank]
        others = [(other, cut) for other, cut in others if cut.start < cut.stop]
        chunks.append((slice(begin, begin + length), slice(*ends[rank]), others))

    def run(source: Array, target: Array) -> None:
        for piece, mine, others in chunks:
            number = node.begin_record(record)
            slots = halves[node.next_half(number)]
            own, result, room = source[piece], target[piece], slots[rank]
            for _, cut in others:
                copy(room[cut], own[cut])
            node.arrive(number)
            node.complete(number)  # works started before: REDUCED below speaks for them too
            node.await_arrived(number)
            if mine.start < mine.stop:
                parts = [slot[mine] for slot in slots]
                parts[rank] = own[mine]
                with np.errstate(all="ignore"):
                    reduce_into(ufunc, parts, 0, mine.stop - mine.start, [room[mine], result[mine]])
            node.reduced(number)
            node.await_reduced(number)
            for other, cut in others:
                copy(result[cut], slots[other][cut])

    return run


# By the MPI library


def native(call: Call, name: str, alike: bool, do: Run) -> Run:
    """All ranks come together in the window before the library's collective, as in `Call.met`."""
    node = call.stage
    dtype, count = (call.source.dtype, call.source.size) if alike else (None, 0)
    record = records.record(name, "native", call.op, dtype, count, NO_PLACE, call._extra(name))

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        node.arrive(number)
        node.await_arrived(number)
        do(source, target)

    return run


def native_all_reduce(call: Call) -> Run:
    """Target = the sum of all sources."""
    transport, op, inside = call.transport, call.op, call.in_place
    return native(call, "all_reduce", True, lambda x, y: transport.all_reduce(y if inside else x, y, op))


def native_reduce_scatter(call: Call) -> Run:
    """Target = the sum of the ranks' blocks of this rank."""
    transport, op, counts = call.transport, call.op, call.counts
    return native(call, "reduce_scatter", True, lambda x, y: transport.reduce_scatter(x, y, counts, op))


def native_all_gather(call: Call) -> Run | None:
    """Target = the sources of all ranks, one after another."""
    if np.may_share_memory(call.source, call.target):
        return None  # goes out of a copy: `Call.apart`
    transport, counts = call.transport, call.counts
    return native(call, "all_gather", False, lambda x, y: transport.all_gather(x, y, counts))


def native_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources."""
    if np.may_share_memory(call.source, call.target):
        return None  # goes out of a copy: `Call.apart`
    transport, counts, out_counts = call.transport, call.counts, call.out_counts
    return native(call, "all_to_all", False, lambda x, y: transport.all_to_all(x, y, counts, out_counts))


def native_broadcast(call: Call) -> Run:
    """Target of every rank = target of root."""
    transport, root = call.transport, call.root
    return native(call, "broadcast", True, lambda x, y: transport.broadcast(y, root))


# (collective, row) -> what prepares it; it returns None for what has no prepared form.
PREPARED: dict[tuple[str, str], Callable[[Call], Run | None]] = {
    ("all_reduce", "window"): window_all_reduce,
    ("all_reduce", "staged"): staged_all_reduce,
    ("all_reduce", "native"): native_all_reduce,
    ("reduce_scatter", "window"): window_reduce_scatter,
    ("reduce_scatter", "staged"): staged_reduce_scatter,
    ("reduce_scatter", "native"): native_reduce_scatter,
    ("all_gather", "window"): window_all_gather,
    ("all_gather", "staged"): staged_all_gather,
    ("all_gather", "native"): native_all_gather,
    ("all_to_all", "window"): window_all_to_all,
    ("all_to_all", "staged"): staged_all_to_all,
    ("all_to_all", "native"): native_all_to_all,
    ("broadcast", "window"): window_broadcast,
    ("broadcast", "staged"): staged_broadcast,
    ("broadcast", "native"): native_broadcast,
}
