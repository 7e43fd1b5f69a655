"""Collectives through the staging, prepared: `staged.py` in chunks whose parts (`parts.py`) are made before.

copy into my slot -> ARRIVED -> copy or add up out of the slots

All chunks of one length have the same two jobs, one for each slot; where a chunk begins, its source and target begin.
What fits into a short slot is one call of machine code, record and all (`small.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.collectives import records, small
from dtrain.collectives.caches import last_level_cache
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import OPERATIONS, Array, address, starts
from dtrain.collectives.long import Chunk, Meetings
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import Own, added, copies
from dtrain.collectives.prepared_window import Run
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.staging import LONG, SHORT, ring_for
from dtrain.collectives.sums import owned

_OCTET = np.dtype(np.uint8)


# (lengths of a chunk, number of the slot) -> what is done with it
Make = Callable[[tuple[int, ...], int], Job]


def _in_chunks(node: Node, record: Record, counts: Sequence[int], most: int, dtype: np.dtype[Any], make: Make) -> Run:
    """One collective for each `most` of all counts; they are in elements of this dtype."""
    known: dict[tuple[int, ...], list[Job]] = {}
    chunks = []
    for begin in range(0, max(counts), most):
        lengths = tuple(max(0, min(most, count - begin)) for count in counts)
        if lengths not in known:
            known[lengths] = [make(lengths, index) for index in range(LONG.depth)]
        chunks.append(Chunk(begin, known[lengths]))
    return Meetings(node, record, dtype, chunks)


def staged_all_gather(call: Call) -> Run | None:
    """Target = the sources of all ranks, one after another."""
    node, item, mine = call.stage, call.source.itemsize, call.stage.rank
    if ring_for(max(call.counts) * item) is SHORT:
        return small.all_gather(node, call.source.shape, call.source.dtype) if small.able(node) else None
    record = records.record("all_gather", "staged", "", None, 0, NO_PLACE, hash((tuple(call.counts), -1)))
    counts = [count * item for count in call.counts]
    offsets = starts(counts)
    past = node.size * sum(counts) > last_level_cache()  # the results; the slots stay in the caches

    def make(lengths: tuple[int, ...], index: int) -> Job:
        slots = [address(slot) for slot in node.slots(index, _OCTET)]
        own = (0, 0, 0, lengths[mine])
        rows = [(slots[rank] * (rank != mine), 0, offsets[rank], part) for rank, part in enumerate(lengths) if part]
        return Job(node, copies([own], into=slots[mine]), copies(rows, past), two=False)

    return _in_chunks(node, record, counts, LONG.nbytes, _OCTET, make)


def staged_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources, all of one length."""
    node, size, mine = call.stage, call.stage.size, call.stage.rank
    length, portion = call.counts[0] * call.source.itemsize, LONG.portion(size, 1)
    if ring_for(size * length) is SHORT:
        return small.all_to_all(node, call.source.shape, call.source.dtype) if small.able(node) else None
    record = records.record("all_to_all", "staged", "", None, 0, NO_PLACE, length)

    def make(lengths: tuple[int, ...], index: int) -> Job:
        slots, part = [address(slot) for slot in node.slots(index, _OCTET)], lengths[0]
        give = [(0, rank * length, rank * portion, part) for rank in range(size) if rank != mine]
        rows = [(slots[rank], mine * portion, rank * length, part) for rank in range(size) if rank != mine]
        rows.append((0, mine * length, mine * length, part))
        return Job(node, copies(give, into=slots[mine]), copies(rows), two=False)

    return _in_chunks(node, record, [length], portion, _OCTET, make)


def staged_broadcast(call: Call) -> Run | None:
    """Target of every rank = target of root, who has copied his array there."""
    node, root, dtype, count = call.stage, call.root, call.target.dtype, call.target.size
    length = count * dtype.itemsize
    if ring_for(length) is SHORT:
        return small.broadcast(node, call.target.shape, dtype, root) if small.able(node) else None
    record = records.record("broadcast", "staged", "", dtype, count, NO_PLACE, root)

    def make(lengths: tuple[int, ...], index: int) -> Job:
        slot, rows = address(node.slots(index, _OCTET)[root]), [(0, 0, 0, lengths[0])]
        if call.at_root:
            return Job(node, copies(rows, into=slot), two=False)
        return Job(node, among=copies([(slot, *rows[0][1:])]), two=False)

    return _in_chunks(node, record, [length], LONG.nbytes, _OCTET, make)


def staged_reduce_scatter(call: Call) -> Run | None:
    """Target = the sum of the ranks' blocks of this rank; my own block comes straight from the source."""
    node, mine = call.stage, call.stage.rank
    dtype, counts = call.source.dtype, list(call.counts)
    item, portion = dtype.itemsize, LONG.portion(node.size, dtype.itemsize)
    if ring_for(node.size * max(counts) * item) is SHORT:
        return small.reduce_scatter(node, call.source.shape, dtype, call.op, counts) if small.able(node) else None
    extra = hash(tuple(counts))
    record = records.record("reduce_scatter", "staged", call.op, dtype, call.source.size, NO_PLACE, extra)
    offsets = starts(counts)

    def make(lengths: tuple[int, ...], index: int) -> Job:
        slots, length = node.slots(index, dtype), lengths[mine]
        rows = [
            (0, offsets[rank] * item, rank * portion * item, part * item)
            for rank, part in enumerate(lengths)
            if rank != mine
        ]
        inputs: list[Array | Own] = [slot[mine * portion :][:length] for slot in slots]
        inputs[mine] = Own(False, offsets[mine])
        add = added(OPERATIONS[call.op], dtype, length, inputs, [Own(True, 0)])
        return Job(node, copies(rows, into=address(slots[mine])), add, two=False)

    return _in_chunks(node, record, counts, portion, dtype, make)


def staged_all_reduce(call: Call) -> Run | None:
    """Target = the sum; my own slice is added up straight from the source."""
    node, mine = call.stage, call.stage.rank
    dtype, count = call.source.dtype, call.source.size
    if call.source.nbytes <= SMALL_BYTES:
        return None
    item = dtype.itemsize
    record = records.record("all_reduce", "staged", call.op, dtype, count, NO_PLACE, -1)

    def make(lengths: tuple[int, ...], index: int) -> Job:
        slots = node.slots(index, dtype)
        ends = [owned(lengths[0], rank, node.size) for rank in range(node.size)]
        start, stop = ends[mine]
        others = [
            (rank, first * item, (last - first) * item) for rank, (first, last) in enumerate(ends) if rank != mine
        ]
        give = [(0, first, first, length) for _, first, length in others]
        fetch = [(address(slots[rank]), first, first, length) for rank, first, length in others]
        inputs: list[Array | Own] = [slot[start:stop] for slot in slots]
        inputs[mine] = Own(False, start)
        add = added(OPERATIONS[call.op], dtype, stop - start, inputs, [slots[mine][start:stop], Own(True, start)])
        return Job(node, copies(give, into=address(slots[mine])), add, copies(fetch))

    return _in_chunks(node, record, [count], LONG.nbytes // item, dtype, make)
