"""Collectives through the staging, prepared: `staged.py` in chunks whose parts (`parts.py`) are made before.

copy into my slot -> ARRIVED -> copy or add up out of the slots
"""

from collections.abc import Sequence

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.call import Call
from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import OPERATIONS, Array, address, starts
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import STAGE_BYTES, Node
from dtrain.collectives.parts import Own, added, copies
from dtrain.collectives.prepared_window import Run
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.sums import owned

_OCTET = np.dtype(np.uint8)


def _in_chunks(node: Node, record: Record, chunks: Sequence[Sequence[Job]]) -> Run:
    """One collective a chunk; a chunk has a job for each half of the staging."""

    def run(source: Array, target: Array) -> None:
        for jobs in chunks:
            number = node.begin_record(record)
            jobs[node.next_half(number)].meet(number, source, target)

    return run


def staged_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    node, item = call.stage, call.source.itemsize
    mine = node.rank
    lengths = [count * item for count in call.counts]
    record = records.record("all_gather", "staged", "", None, 0, NO_PLACE, hash((tuple(call.counts), -1)))
    offsets = starts(lengths)
    chunks = []
    for begin in range(0, max(lengths), STAGE_BYTES):
        parts = [max(0, min(STAGE_BYTES, length - begin)) for length in lengths]
        jobs = []
        for half in (0, 1):
            slots = [address(slot) for slot in node.slots(half, _OCTET)]
            rows = [(rank, offsets[rank] + begin, part) for rank, part in enumerate(parts) if part]
            fetch = [(slots[rank], 0, to, part) if rank != mine else (0, begin, to, part) for rank, to, part in rows]
            jobs.append(Job(node, copies([(0, begin, 0, parts[mine])], into=slots[mine]), copies(fetch), two=False))
        chunks.append(jobs)
    return _in_chunks(node, record, chunks)


def staged_all_to_all(call: Call) -> Run:
    """Target = the blocks for this rank of all sources, all of one length."""
    node, size, mine = call.stage, call.stage.size, call.stage.rank
    length = call.counts[0] * call.source.itemsize
    portion = STAGE_BYTES // size
    record = records.record("all_to_all", "staged", "", None, 0, NO_PLACE, length)
    chunks = []
    for begin in range(0, length, portion):
        part = min(portion, length - begin)
        jobs = []
        for half in (0, 1):
            slots = [address(slot) for slot in node.slots(half, _OCTET)]
            give = [(0, other * length + begin, other * portion, part) for other in range(size) if other != mine]
            fetch = [
                (slots[other], mine * portion, other * length + begin, part)
                if other != mine
                else (0, mine * length + begin, mine * length + begin, part)
                for other in range(size)
            ]
            jobs.append(Job(node, copies(give, into=slots[mine]), copies(fetch), two=False))
        chunks.append(jobs)
    return _in_chunks(node, record, chunks)


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
    node, size, mine = call.stage, call.stage.size, call.stage.rank
    dtype, count, counts = call.source.dtype, call.source.size, list(call.counts)
    item = dtype.itemsize
    portion = STAGE_BYTES // item // size
    record = records.record("reduce_scatter", "staged", call.op, dtype, count, NO_PLACE, hash(tuple(counts)))
    offsets = starts(counts)
    chunks = []
    for begin in range(0, max(counts), portion):
        lengths = [max(0, min(portion, length - begin)) for length in counts]
        jobs = []
        for half in (0, 1):
            slots = node.slots(half, dtype)
            give = [
                (0, (offsets[other] + begin) * item, other * portion * item, lengths[other] * item)
                for other in range(size)
                if other != mine
            ]
            inputs: list[Array | Own] = [slot[mine * portion :][: lengths[mine]] for slot in slots]
            inputs[mine] = Own(False, offsets[mine] + begin)
            add = added(OPERATIONS[call.op], dtype, lengths[mine], inputs, [Own(True, begin)])
            jobs.append(Job(node, copies(give, into=address(slots[mine])), add, two=False))
        chunks.append(jobs)
    return _in_chunks(node, record, chunks)


def staged_all_reduce(call: Call) -> Run | None:
    """Target = the sum; my own slice is added up straight from the source."""
    node, mine = call.stage, call.stage.rank
    dtype, count = call.source.dtype, call.source.size
    if call.source.nbytes <= SMALL_BYTES:
        return None
    item = dtype.itemsize
    record = records.record("all_reduce", "staged", call.op, dtype, count, NO_PLACE, -1)
    chunk = STAGE_BYTES // item
    chunks = []
    for begin in range(0, count, chunk):
        length = min(chunk, count - begin)
        ends = [owned(length, rank, node.size) for rank in range(node.size)]
        start, stop = ends[mine]
        others = [(rank, *end) for rank, end in enumerate(ends) if rank != mine and end[0] < end[1]]
        jobs = []
        for half in (0, 1):
            slots = node.slots(half, dtype)
            places = [address(slot) for slot in slots]
            give = [(0, (begin + first) * item, first * item, (last - first) * item) for _, first, last in others]
            inputs: list[Array | Own] = [slot[start:stop] for slot in slots]
            inputs[mine] = Own(False, begin + start)
            outputs: list[Array | Own] = [slots[mine][start:stop], Own(True, begin + start)]
            fetch = [
                (places[rank], first * item, (begin + first) * item, (last - first) * item)
                for rank, first, last in others
            ]
            add = added(OPERATIONS[call.op], dtype, stop - start, inputs, outputs)
            jobs.append(Job(node, copies(give, into=places[mine]), add, copies(fetch)))
        chunks.append(jobs)
    return _in_chunks(node, record, chunks)
