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
            own[...] = source.view(np.uint8)
        for rank in others:
            target[blocks[rank]] = _view(node, rank, number, 0, lengths[rank])

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
        target[mine * length : (mine + 1) * length] = source.view(np.uint8)[own]
        for rank in others:
            target[rank * length : (rank + 1) * length] = _view(node, rank, number, begins[mine], length)

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
        target.view(np.uint8)[...] = _view(node, root, number, 0, length)

    return _windowed(node, record, part, place, sources=node.only(root), users=[])


# Through the staging


def staged_all_gather(call: Call) -> Run | None:
    """Target = the sources of all ranks, one after another."""
    node, item = call.stage, call.source.itemsize
    lengths = [count * item for count in call.counts]
    if max(lengths) > STAGE_BYTES:
        return None
    record = records.record("all_gather", "staged", "", None, 0, NO_PLACE, hash((tuple(call.counts), -1)))
    slots = [[slot[:length] for slot, length in zip(node.slots(half, _OCTET), lengths, strict=True)] for half in (0, 1)]
    blocks = [slice(start, start + length) for start, length in zip(starts(lengths), lengths, strict=True)]
    if min(lengths) == 0:
        return None

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        now = slots[node.next_half(number)]
        now[node.rank][...] = source.view(np.uint8)
        node.arrive(number)
        target = target.view(np.uint8)
        node.await_arrived(number)
        for block, slot in zip(blocks, now, strict=True):
            target[block] = slot

    return run


def staged_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources, all of one length."""
    node, size, rank = call.stage, call.stage.size, call.stage.rank
    length = call.counts[0] * call.source.itemsize
    portion = STAGE_BYTES // size
    if length > portion:
        return None
    record = records.record("all_to_all", "staged", "", None, 0, NO_PLACE, length)
    forms = []
    for half in (0, 1):
        slots = node.slots(half, _OCTET)
        mine = slots[rank][: portion * size].reshape(size, portion)[:, :length]
        forms.append((mine, [slot[rank * portion : rank * portion + length] for slot in slots]))

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        mine, parts = forms[node.next_half(number)]
        mine[...] = source.view(np.uint8).reshape(size, length)
        node.arrive(number)
        rows = target.view(np.uint8).reshape(size, length)
        node.await_arrived(number)
        for row, part in zip(rows, parts, strict=True):
            row[...] = part

    return run


def staged_broadcast(call: Call) -> Run | None:
    """Target of every rank = target of root, who has copied his array there."""
    node, root, dtype, count = call.stage, call.root, call.target.dtype, call.target.size
    length = count * dtype.itemsize
    if length > STAGE_BYTES:
        return None
    record = records.record("broadcast", "staged", "", dtype, count, NO_PLACE, root)
    slots = [node.slots(half, _OCTET)[root][:length] for half in (0, 1)]
    sources = node.only(root)

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        slot = slots[node.next_half(number)]
        if node.rank == root:
            slot[...] = target.view(np.uint8)
            node.arrive(number)
            return
        node.arrive(number)
        node.await_arrived(number, sources)
        target.view(np.uint8)[...] = slot

    return run


def staged_reduce_scatter(call: Call) -> Run | None:
    """Target = the sum of the ranks' blocks of this rank."""
    node, size, rank = call.stage, call.stage.size, call.stage.rank
    dtype, count, counts = call.source.dtype, call.source.size, list(call.counts)
    portion = STAGE_BYTES // dtype.itemsize // size
    if max(counts) > portion:
        return None
    ufunc = OPERATIONS[call.op]
    record = records.record("reduce_scatter", "staged", call.op, dtype, count, NO_PLACE, hash(tuple(counts)))
    blocks = [slice(start, start + length) for start, length in zip(starts(counts), counts, strict=True)]
    forms: list[tuple[list[Array], list[Array]]] = []
    for half in (0, 1):
        slots = node.slots(half, dtype)
        mine = [slots[rank][owner * portion : owner * portion + counts[owner]] for owner in range(size)]
        forms.append((mine, [slot[rank * portion : rank * portion + counts[rank]] for slot in slots]))

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        mine, parts = forms[node.next_half(number)]
        for room, block in zip(mine, blocks, strict=True):
            room[...] = source[block]
        node.arrive(number)
        node.await_arrived(number)
        with np.errstate(all="ignore"):
            reduce_into(ufunc, parts, 0, counts[rank], [target])

    return run


def staged_all_reduce(call: Call) -> Run | None:
    """Target = the sum; my own slice is added up straight from the source."""
    node, rank = call.stage, call.stage.rank
    dtype, count = call.source.dtype, call.source.size
    if not SMALL_BYTES < call.source.nbytes <= STAGE_BYTES // dtype.itemsize * dtype.itemsize:
        return None
    ufunc = OPERATIONS[call.op]
    record = records.record("all_reduce", "staged", call.op, dtype, count, NO_PLACE, -1)
    start, stop = owned(count, rank, node.size)
    mine = slice(start, stop)
    others = [owned(count, other, node.size) for other in range(node.size) if other != rank]
    cuts = [slice(*ends) for ends in others if ends[0] < ends[1]]
    forms: list[tuple[list[Array], list[tuple[slice, Array]], list[Array]]] = []
    for half in (0, 1):
        slots = [slot[:count] for slot in node.slots(half, dtype)]
        owners = [slot for other, slot in enumerate(slots) if other != rank]
        fetch = [(cut, slot[cut]) for cut, slot in zip(cuts, owners, strict=False)]
        forms.append(([slot[mine] for slot in slots], fetch, [slots[rank][cut] for cut in cuts]))

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record)
        parts, fetch, rooms = forms[node.next_half(number)]
        for room, cut in zip(rooms, cuts, strict=True):
            room[...] = source[cut]
        node.arrive(number)
        node.complete(number)  # works started before: REDUCED below speaks for them too
        node.await_arrived(number)
        if start < stop:
            own = list(parts)
            own[rank] = source[mine]
            with np.errstate(all="ignore"):
                reduce_into(ufunc, own, 0, stop - start, [parts[rank], target[mine]])
        node.reduced(number)
        node.await_reduced(number)
        for cut, part in fetch:
            target[cut] = part

    return run


# (collective, row) -> what prepares it; it returns None for what has no prepared form.
PREPARED: dict[tuple[str, str], Callable[[Call], Run | None]] = {
    ("all_reduce", "window"): window_all_reduce,
    ("all_reduce", "staged"): staged_all_reduce,
    ("reduce_scatter", "window"): window_reduce_scatter,
    ("reduce_scatter", "staged"): staged_reduce_scatter,
    ("all_gather", "window"): window_all_gather,
    ("all_gather", "staged"): staged_all_gather,
    ("all_to_all", "window"): window_all_to_all,
    ("all_to_all", "staged"): staged_all_to_all,
    ("broadcast", "window"): window_broadcast,
    ("broadcast", "staged"): staged_broadcast,
}
