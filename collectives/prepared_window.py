"""Collectives in the window, prepared: `window.py` and `window_moves.py` without finding views and lengths again.

record and place published -> ARRIVED -> my part (`parts.py`) -> REDUCED
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.arena import Place
from dtrain.collectives.caches import last_level_cache
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import OPERATIONS, Array, address, starts
from dtrain.collectives.long import Chunk, Meetings
from dtrain.collectives.meeting import Find, Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import Own, Part, added, copies, swaps
from dtrain.collectives.records import IN_PLACE, NO_PLACE, Record
from dtrain.collectives.staging import LONG
from dtrain.collectives.sums import LINE, owned
from dtrain.collectives.window_moves import halves

Run = Callable[[Array, Array], None]
_OCTET = np.dtype(np.uint8)
_TARGET = Own(True, 0)


class Windowed:
    """A `Run`: two synchronisations around this rank's part."""

    def __init__(
        self, node: Node, record: Record, part: Part, aside: Place = NO_PLACE, find: Find | None = None
    ) -> None:
        self.job = Job(node, among=part, find=find)
        self.record = *record, records.packed(aside)
        """All but its number."""
        self._begin = partial(node.begin_record, record, aside)

    def __call__(self, source: Array, target: Array) -> None:
        self.job.meet(self._begin(), source, target)


# Reductions in the window


def window_all_reduce(call: Call) -> Run:
    """All ranks' arrays at one place become their sum."""
    node, place = call.window
    dtype, count = call.source.dtype, call.source.size
    start, stop = owned(count, node.rank, node.size)
    parts = [part[start:stop] for part in node.arena.parts(place, count, dtype)]
    record = records.record("all_reduce", "window", call.op, dtype, count, place, 0)
    return Windowed(node, record, added(OPERATIONS[call.op], dtype, stop - start, parts, None))


def window_staged_all_reduce(call: Call) -> Run:
    """Target = the sum of all ranks' arrays at one place: my slices of it go into the staging too, for the others."""
    node, place = call.window
    dtype, count, mine = call.source.dtype, call.source.size, node.rank
    item, most = dtype.itemsize, _slices(call)
    record = records.record("all_reduce", "window_staged", call.op, dtype, count, place, 0)
    sources = node.arena.parts(place, count, dtype)
    past = node.size * call.target.nbytes > last_level_cache()  # the results; the slots stay in the caches

    def make(begin: int, index: int) -> Job:
        slots = node.slots(index, dtype)
        ends = [owned(min(most, count - begin), rank, node.size) for rank in range(node.size)]
        start, stop = (begin + end for end in ends[mine])
        results: list[Array | Own] = [slots[mine][: stop - start], Own(True, start)]
        add = added(OPERATIONS[call.op], dtype, stop - start, [part[start:stop] for part in sources], results)
        others = [(rank, first, last) for rank, (first, last) in enumerate(ends) if rank != mine]
        fetch = [
            (address(slots[rank]), 0, (begin + first) * item, (last - first) * item) for rank, first, last in others
        ]
        return Job(node, among=add, after=copies(fetch, past))

    chunks = [Chunk(0, [make(begin, index) for index in range(LONG.depth)]) for begin in range(0, count, most)]
    return Meetings(node, record, dtype, chunks)


def _slices(call: Call) -> int:
    """The most elements whose slices (`owned`) each fit into a slot."""
    return call.stage.size * (LONG.nbytes // call.source.itemsize // LINE * LINE)


def window_all_reduce_shared(node: Node, place: Place, op: str, result: Array) -> Windowed:
    """The sum of all ranks' arrays at this place is written once, into `result`, the same memory on all."""
    dtype, count = result.dtype, result.size
    start, stop = owned(count, node.rank, node.size)
    parts = [part[start:stop] for part in node.arena.parts(place, count, dtype)]
    record = records.record("all_reduce_shared", "window", op, dtype, count, place, 0)
    return Windowed(node, record, added(OPERATIONS[op], dtype, stop - start, parts, [result[start:stop]]))


def window_reduce_scatter(call: Call) -> Run:
    """Target becomes the sum of all ranks' blocks of this rank."""
    node, place = call.window
    dtype, count, length = call.source.dtype, call.source.size, call.counts[node.rank]
    start = sum(call.counts[: node.rank])
    parts = [part[start : start + length] for part in node.arena.parts(place, count, dtype)]
    record = records.record("reduce_scatter", "window", call.op, dtype, count, place, hash(tuple(call.counts)))
    return Windowed(node, record, added(OPERATIONS[call.op], dtype, length, parts, [_TARGET]))


# Movement in the window


def view(node: Node, rank: int, number: int, begin: int, length: int) -> Array:
    """Bytes of what a rank that has arrived put aside; the places repeat, and so do the views."""
    place = node.aside(rank, number)
    assert place is not None
    return node.arena.parts((place[0], place[1] + begin), length, _OCTET)[rank]


Rows = list[tuple[int, int, int, int]]  # (rank, where it begins there, where in my target, bytes)


def _moved(node: Node, record: Record, blocks: Rows, place: Place, make: Callable[[Rows], Part]) -> Run:
    """Every rank copies or swaps its blocks out of what the others have put aside; `make` gets addresses for ranks."""
    part = make([(0, *block[1:]) for block in blocks])
    table = part.tables[0]

    def find(number: int, expected: Array) -> None:
        expected[:] = [node.packed_aside(rank, number) for rank, _ in node.peers]
        for row, (rank, begin, _, length) in enumerate(blocks):
            if rank != node.rank:
                table[row, 0] = address(view(node, rank, number, begin, length)) - begin

    return Windowed(node, record, part, place, find)


def all_gather_rows(call: Call, how: str) -> tuple[Record, Rows, bool]:
    """Target = the sources of all ranks: the record, the rows, and whether they go past the caches."""
    node, item = call.stage, call.source.itemsize
    lengths = [count * item for count in call.counts]
    offsets = starts(lengths)
    ranks = [(node.rank + step) % node.size for step in range(node.size)]
    rows = [(rank, 0, offsets[rank], lengths[rank]) for rank in ranks]
    past = (node.size + 1) * sum(lengths) > last_level_cache()
    return records.record("all_gather", how, "", None, 0, NO_PLACE, hash((item, *call.counts))), rows, past


def all_to_all_rows(call: Call, how: str) -> tuple[Record, Rows, bool]:
    """Target = the blocks for this rank of all sources, all equally long: the same three."""
    node, item, mine = call.stage, call.source.itemsize, call.stage.rank
    begin, length = item * starts(call.counts)[mine], item * call.counts[mine]
    ranks = [(mine + step) % node.size for step in range(node.size)]
    rows = [(rank, begin, rank * length, length) for rank in ranks]
    past = 2 * node.size * node.size * length >= last_level_cache()  # they never have all of it to themselves
    return records.record("all_to_all", how, "", None, 0, NO_PLACE, hash((item, *call.counts))), rows, past


def swapped_rows(call: Call, how: str) -> tuple[Record, Rows]:
    """All_to_all in place: the record and the rows that change places, all equally long but for their halves."""
    node, item = call.stage, call.source.itemsize
    record = records.record("all_to_all", IN_PLACE[how], "", None, 0, NO_PLACE, hash((item, *call.counts)))
    return record, halves(node, item * call.counts[node.rank])


def window_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    node, place = call.window
    record, rows, past = all_gather_rows(call, "window")
    return _moved(node, record, rows, place, partial(copies, past=past))


def window_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources, or they change places. Uneven blocks have no plan."""
    node, place = call.window
    if call.in_place:
        return _moved(node, *swapped_rows(call, "window"), place, swaps)
    if not call.alike:
        return None
    record, rows, past = all_to_all_rows(call, "window")
    return _moved(node, record, rows, place, partial(copies, past=past))


def window_broadcast(call: Call) -> Run:
    """Target of every rank = target of root."""
    node, place = call.window
    past = node.size * call.target.nbytes > last_level_cache()
    return _moved(node, *broadcast_rows(call, "window"), place, partial(copies, past=past))


def broadcast_rows(call: Call, how: str) -> tuple[Record, Rows]:
    """Target of every rank = target of root: the record and the rows; root has none."""
    record = records.record("broadcast", how, "", call.target.dtype, call.target.size, NO_PLACE, call.root)
    return record, [] if call.at_root else [(call.root, 0, 0, call.target.nbytes)]
