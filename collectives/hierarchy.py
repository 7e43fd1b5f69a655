"""Sums over several nodes: shared memory within a node, and between nodes every rank moves its own share.

    all_reduce, 2 nodes of 2 ranks

      rank 0 | a0 a1 |  adds up a0 b0 ─►  ◄═ network ═►  ◄─ adds up c0 d0  | c0 c1 | rank 2
      rank 1 | b0 b1 |  adds up a1 b1 ─►  ◄═ network ═►  ◄─ adds up c1 d1  | d0 d1 | rank 3
                        writes both sums to all ranks of its node

Bytes that a node sends, for n bytes on N nodes; no algorithm needs fewer:

    all_reduce       2 n (N-1)/N   two nodes exchange their sums at once; more nodes first blocks, then their sums
    reduce_scatter   n (N-1)/N     the sum over the node of each block, straight to the rank that wants it

Pieces follow one another (`conveyor.py`): while the wire carries one, the node adds up the next and writes the last,
and both directions of the wire are in use. Arrays from elsewhere go through a staging in the window. Invariants: a sum
is in the order of the nodes, and of the ranks within a node: it depends on the layout of the ranks and the length
alone. Small floats cross the network as float32 until they are added up. Idea: multi-lane collectives (Träff, Hunold,
"Decomposing MPI collectives for exploiting multi-lane communication", CLUSTER 2020); pipelining as in HAN (Open MPI).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.arena import Place
from dtrain.collectives.conveyor import DEPTH, HierarchyWork, Steps, both, pipeline
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, cut, starts
from dtrain.collectives.levels import SLOT_BYTES, Levels, LevelsPortion
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.sums import owned, reduce_into

# Of one message where the data lies in the window. Two hosts of 4 ranks, 1 Gbit/s, 16 MiB: 128 KiB reach 96 % of the
# wire, 512 KiB 93 %: a message waits behind all that was sent before it.
PIECE_BYTES = 128 * 1024


def _partial(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> Array:
    """The sum over the node, not yet rounded."""
    total = np.empty(stop - start, accumulator(parts[0].dtype))
    if len(parts) == 1:
        total[...] = parts[0][start:stop]
    else:
        reduce_into(ufunc, parts, start, stop, [total])
    return total


def _sum_over_nodes(
    step: LevelsPortion, ufunc: np.ufunc, mine: Array, dtype: np.dtype[Any], lane: int, piece: int
) -> Steps[Array]:
    """The sum of what the drivers of a lane have, on each of them."""
    levels, size, here = step.levels, len(step.levels.nodes), step.levels.here
    others = [node for node in range(size) if node != here]
    tag = step.tag(piece)
    if size == 2 and mine.dtype == dtype:
        peer = levels.driver(lane, others[0])
        theirs = np.empty_like(mine)
        yield from both(levels.receive(theirs, peer, tag), levels.send(mine, peer, tag))
        ufunc(*((mine, theirs) if here == 0 else (theirs, mine)), out=theirs)
        return theirs
    counts = cut(mine.size, size)
    offsets = starts(counts)
    blocks = [mine[start : start + count] for start, count in zip(offsets, counts, strict=True)]
    came = [blocks[here] if node == here else np.empty(counts[here], mine.dtype) for node in range(size)]
    yield from both(
        *(levels.receive(came[node], levels.driver(lane, node), tag) for node in others),
        *(levels.send(blocks[node], levels.driver(lane, node), tag) for node in others),
    )
    total = np.empty(mine.size, dtype)
    results = [total[start : start + count] for start, count in zip(offsets, counts, strict=True)]
    _add(ufunc, came, results[here])
    tag = step.tag(piece, 1)
    yield from both(
        *(levels.receive(results[node], levels.driver(lane, node), tag) for node in others),
        *(levels.send(results[here], levels.driver(lane, node), tag) for node in others),
    )
    return total


def _add(ufunc: np.ufunc, parts: Sequence[Array], target: Array) -> None:
    """Target = the sum of the parts in their order, rounded once."""
    total = parts[0].copy()
    for part in parts[1:]:
        ufunc(total, part, out=total)
    target[...] = total


class _AllReduce(LevelsPortion):
    """Of `count` elements that all ranks of the node have at one place; each rank sums up the slices of its lanes."""

    def __init__(
        self, levels: Levels, record: Record, op: str, source: Array, target: Array, place: Place | None
    ) -> None:
        super().__init__(levels, record, staged=place is None)
        self.ufunc = OPERATIONS[op]
        self.source, self.target, self.place = source, target, place
        self.parts: list[Array] = []

    def enter(self) -> None:
        """Copy into the staging, or know where the others have theirs."""
        if self.place is not None:
            self.parts = self.levels.node.arena.parts(self.place, self.source.size, self.source.dtype)
            return
        self.parts = [slot[: self.source.size] for slot in self.slots(self.source.dtype)]
        self.parts[self.levels.local][...] = self.source

    def exchange(self) -> Steps[None]:
        """Piece by piece."""
        return pipeline(self._pieces(), DEPTH)

    def _pieces(self) -> Iterator[Steps[None]]:
        lanes, count = self.levels.lanes, self.source.size
        slices = [owned(count, lane, lanes) for lane in self.levels.mine]
        length = PIECE_BYTES // accumulator(self.source.dtype).itemsize
        for number, offset in enumerate(range(0, max(stop - start for start, stop in slices), length)):
            for lane, (start, stop) in zip(self.levels.mine, slices, strict=True):
                if start + offset < stop:
                    yield self._piece(start + offset, min(start + offset + length, stop), lane, number * lanes + lane)

    def _piece(self, start: int, stop: int, lane: int, piece: int) -> Steps[None]:
        mine = _partial(self.ufunc, self.parts, start, stop)
        total = yield from _sum_over_nodes(self, self.ufunc, mine, self.source.dtype, lane, piece)
        # In the window everybody's array gets it; in the staging mine, where the others fetch it.
        for part in self.parts if self.place is not None else [self.parts[self.levels.local]]:
            part[start:stop] = total

    def leave(self) -> None:
        """Fetch the sums from those who drove the lanes."""
        lanes, members = self.levels.lanes, len(self.levels.members)
        for lane in range(lanes):
            start, stop = owned(self.source.size, lane, lanes)
            self.target[start:stop] = self.parts[lane % members][start:stop]


def start_all_reduce(levels: Levels, source: Array, target: Array, place: Place | None, op: str) -> HierarchyWork:
    """Target (count,) = the sum over all ranks of source (count,). `place`: of source, where the sum replaces it."""
    if place is not None:
        record = records.record("all_reduce", "window", op, source.dtype, source.size, place)
        return levels.conveyor.start("all_reduce", [_AllReduce(levels, record, op, source, target, place)])
    record = records.record("all_reduce", "staged", op, source.dtype, source.size)
    length = SLOT_BYTES // source.itemsize
    portions = (
        _AllReduce(levels, record, op, source[begin : begin + length], target[begin : begin + length], None)
        for begin in range(0, source.size, length)
    )
    return levels.conveyor.start("all_reduce", portions)


class _ReduceScatter(LevelsPortion):
    """Of the elements [begin, begin + length) of every block. The block of a rank is summed up, in each other node, by
    the rank that has its number there, and sent straight to it.
    """

    def __init__(
        self,
        levels: Levels,
        record: Record,
        op: str,
        source: Array,
        target: Array,
        counts: Sequence[int],
        begin: int,
        length: int,
        place: Place | None,
    ) -> None:
        super().__init__(levels, record, staged=place is None)
        self.ufunc = OPERATIONS[op]
        self.source, self.target, self.place = source, target, place
        self.offsets = [start + begin for start in starts(counts)]  # of the blocks in source
        self.lengths = [max(0, min(length, count - begin)) for count in counts]
        self.homes = self.offsets if place is not None else starts(self.lengths)  # and where all have them
        self.at = begin
        self.parts: list[Array] = []

    def enter(self) -> None:
        """Copy into the staging, or know where the others have theirs."""
        if self.place is not None:
            self.parts = self.levels.node.arena.parts(self.place, self.source.size, self.source.dtype)
            return
        self.parts = self.slots(self.source.dtype)
        mine = self.parts[self.levels.local]
        for home, offset, length in zip(self.homes, self.offsets, self.lengths, strict=True):
            mine[home : home + length] = self.source[offset : offset + length]

    def exchange(self) -> Steps[None]:
        """Piece by piece: what others want from me, and mine."""
        return pipeline(self._pieces(), DEPTH * len(self.levels.nodes))

    def _pieces(self) -> Iterator[Steps[None]]:
        levels, members = self.levels, len(self.levels.members)
        duties = [  # the first to begin with are not the same for all nodes
            ranks[number]
            for shift in range(1, len(levels.nodes))
            for ranks in [levels.nodes[(levels.here + shift) % len(levels.nodes)]]
            for number in range(levels.local, len(ranks), members)
        ]
        step = PIECE_BYTES // accumulator(self.source.dtype).itemsize
        for piece, offset in enumerate(range(0, max(self.lengths), step)):
            for rank in duties:
                if offset < self.lengths[rank]:
                    yield self._give(rank, offset, min(offset + step, self.lengths[rank]), piece)
            if offset < self.lengths[levels.rank]:
                yield self._take(offset, min(offset + step, self.lengths[levels.rank]), piece)

    def _give(self, rank: int, start: int, stop: int, piece: int) -> Steps[None]:
        home = self.homes[rank]
        partial = _partial(self.ufunc, self.parts, home + start, home + stop)
        yield from self.levels.send(partial, rank, self.tag(piece))

    def _take(self, start: int, stop: int, piece: int) -> Steps[None]:
        levels, home = self.levels, self.homes[self.levels.rank]
        wide = accumulator(self.source.dtype)
        sums = [np.empty(stop - start, wide) for _ in levels.nodes]
        senders = [
            (node, levels.driver(levels.local, node)) for node in range(len(levels.nodes)) if node != levels.here
        ]
        receipts = [levels.receive(sums[node], sender, self.tag(piece)) for node, sender in senders]
        for receipt in receipts:
            next(receipt)  # posted before the sum, so that the wire need not wait for it
        sums[levels.here] = _partial(self.ufunc, self.parts, home + start, home + stop)
        yield from both(*receipts)
        _add(self.ufunc, sums, self.target[self.at + start : self.at + stop])


def start_reduce_scatter(
    levels: Levels, source: Array, target: Array, place: Place | None, counts: Sequence[int], op: str
) -> HierarchyWork:
    """Target (counts[rank],) = the sum over all ranks of block `rank` of source; `place`: of source, in the window."""
    how, at = ("staged", NO_PLACE) if place is None else ("window", place)
    record = records.record("reduce_scatter", how, op, source.dtype, source.size, at, hash(tuple(counts)))
    length = max(counts) if place is not None else max(1, SLOT_BYTES // source.itemsize // len(counts))
    portions = (
        _ReduceScatter(levels, record, op, source, target, counts, begin, length, place)
        for begin in range(0, max(counts), length)
    )
    return levels.conveyor.start("reduce_scatter", portions)
