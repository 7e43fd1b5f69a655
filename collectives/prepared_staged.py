"""Collectives through the staging, prepared: `staged.py` in chunks whose views are made before.

copy into my slot -> ARRIVED -> copy or add up out of the slots
"""

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.call import Call
from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import OPERATIONS, Array, starts
from dtrain.collectives.node import STAGE_BYTES
from dtrain.collectives.prepared_window import Run
from dtrain.collectives.records import NO_PLACE
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.sums import owned, reduce_into

_OCTET = np.dtype(np.uint8)


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
                reduce_into(ufunc, parts, 0, mine.stop - mine.start, [room[mine], result[mine]])
            node.reduced(number)
            node.await_reduced(number)
            for other, cut in others:
                copy(result[cut], slots[other][cut])

    return run
