"""Collectives over several nodes: shared memory within a node, and between nodes every rank moves its own share.

    all_reduce, 2 nodes of 2 ranks

      rank 0 | a0 a1 |  adds up a0 b0 ─►  ◄═ network ═►  ◄─ adds up c0 d0  | c0 c1 | rank 2
      rank 1 | b0 b1 |  adds up a1 b1 ─►  ◄═ network ═►  ◄─ adds up c1 d1  | d0 d1 | rank 3
                        writes both sums to all ranks of its node

Bytes that a node sends, for n bytes on N nodes; no algorithm needs fewer:

    all_reduce       2 n (N-1)/N   two nodes exchange their sums at once; more nodes first blocks, then their sums
    reduce_scatter   n (N-1)/N     the sum over the node of each block, straight to the rank that wants it
    all_gather       n/N (N-1)     each block once to each other node
    broadcast        n             from node to node, a chain (the last one sends nothing)
    all_to_all       what its ranks have for others

Pieces follow one another (`conveyor.py`): while the wire carries one, the node adds up the next and writes the last,
and both directions of the wire are in use. Arrays from elsewhere go through a staging in the window. Invariants: a sum
is in the order of the nodes, and of the ranks within a node: it depends on the layout of the ranks and the length
alone. Small floats cross the network as float32 until they are added up. Idea: multi-lane collectives (Träff, Hunold,
"Decomposing MPI collectives for exploiting multi-lane communication", CLUSTER 2020); pipelining as in HAN (Open MPI).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.collectives.arena import Place
from dtrain.collectives.conveyor import DEPTH, HierarchyWork, Portion, Steps, pipeline
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, cut, starts
from dtrain.collectives.levels import SLOT_BYTES, Levels
from dtrain.collectives.node import Node
from dtrain.collectives.sums import owned, reduce_into

# Of one message where the data lies in the window. Two hosts of 4 ranks, 1 Gbit/s, 16 MiB: 128 KiB reach 96 % of the
# wire, 512 KiB 93 %: a message waits behind all that was sent before it.
PIECE_BYTES = 128 * 1024
_OCTET = np.dtype(np.uint8)


class _Step(Portion):
    """A portion of one of the collectives below; they fill in how it is recorded."""

    def __init__(self, levels: Levels, record: Callable[[Node], int], staged: bool = True) -> None:
        super().__init__()
        self.levels = levels
        self.staged = staged
        self._record = record

    def begin(self, node: Node) -> int:
        """Write the record."""
        return self._record(node)

    def tag(self, piece: int, phase: int = 0) -> int:
        """Of a message; no two that are under way between two ranks have the same."""
        return self.sequence % 32 * 1024 + piece % 512 * 2 + phase

    def slots(self, dtype: np.dtype[Any]) -> list[Array]:
        """My slot of the staging, of all ranks of the node."""
        return self.levels.slots(self.slot, dtype)


# Sums


def _partial(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> Array:
    """The sum over the node, not yet rounded."""
    total = np.empty(stop - start, accumulator(parts[0].dtype))
    if len(parts) == 1:
        total[...] = parts[0][start:stop]
    else:
        reduce_into(ufunc, parts, start, stop, [total])
    return total


def _both(*tasks: Steps[None]) -> Steps[None]:
    """All at once."""
    return pipeline(tasks, len(tasks))


def _sum_over_nodes(
    step: _Step, ufunc: np.ufunc, mine: Array, dtype: np.dtype[Any], lane: int, piece: int
) -> Steps[Array]:
    """The sum of what the drivers of a lane have, on each of them."""
    levels, size, here = step.levels, len(step.levels.nodes), step.levels.here
    others = [node for node in range(size) if node != here]
    tag = step.tag(piece)
    if size == 2 and mine.dtype == dtype:
        peer = levels.driver(lane, others[0])
        theirs = np.empty_like(mine)
        yield from _both(levels.receive(theirs, peer, tag), levels.send(mine, peer, tag))
        ufunc(*((mine, theirs) if here == 0 else (theirs, mine)), out=theirs)
        return theirs
    counts = cut(mine.size, size)
    offsets = starts(counts)
    blocks = [mine[start : start + count] for start, count in zip(offsets, counts, strict=True)]
    came = [blocks[here] if node == here else np.empty(counts[here], mine.dtype) for node in range(size)]
    yield from _both(
        *(levels.receive(came[node], levels.driver(lane, node), tag) for node in others),
        *(levels.send(blocks[node], levels.driver(lane, node), tag) for node in others),
    )
    total = np.empty(mine.size, dtype)
    results = [total[start : start + count] for start, count in zip(offsets, counts, strict=True)]
    _add(ufunc, came, results[here])
    tag = step.tag(piece, 1)
    yield from _both(
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


class _AllReduce(_Step):
    """Of `count` elements that all ranks of the node have at one place; each rank sums up the slices of its lanes."""

    def __init__(
        self, levels: Levels, record: Callable[[Node], int], op: str, source: Array, target: Array, place: Place | None
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
        record = lambda node: node.begin("all_reduce", "window", op, source, place)  # noqa: E731
        return levels.conveyor.start("all_reduce", [_AllReduce(levels, record, op, source, target, place)])
    record = lambda node: node.begin("all_reduce", "staged", op, source)  # noqa: E731
    length = SLOT_BYTES // source.itemsize
    portions = (
        _AllReduce(levels, record, op, source[begin : begin + length], target[begin : begin + length], None)
        for begin in range(0, source.size, length)
    )
    return levels.conveyor.start("all_reduce", portions)


class _ReduceScatter(_Step):
    """Of the elements [begin, begin + length) of every block. The block of a rank is summed up, in each other node, by
    the rank that has its number there, and sent straight to it.
    """

    def __init__(
        self,
        levels: Levels,
        record: Callable[[Node], int],
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
        yield from _both(*receipts)
        _add(self.ufunc, sums, self.target[self.at + start : self.at + stop])


def start_reduce_scatter(
    levels: Levels, source: Array, target: Array, place: Place | None, counts: Sequence[int], op: str
) -> HierarchyWork:
    """Target (counts[rank],) = the sum over all ranks of block `rank` of source; `place`: of source, in the window."""
    how, extra = "staged" if place is None else "window", hash(tuple(counts))
    at = (-1, 0) if place is None else place
    record = lambda node: node.begin("reduce_scatter", how, op, source, at, extra)  # noqa: E731
    length = max(counts) if place is not None else max(1, SLOT_BYTES // source.itemsize // len(counts))
    portions = (
        _ReduceScatter(levels, record, op, source, target, counts, begin, length, place)
        for begin in range(0, max(counts), length)
    )
    return levels.conveyor.start("reduce_scatter", portions)


# Movement, in bytes


class _AllGather(_Step):
    """Of the bytes [begin, begin + length) of every block. Each rank sends its block to one rank in each other node:
    to that which has its number there.
    """

    def __init__(
        self,
        levels: Levels,
        record: Callable[[Node], int],
        source: Array,
        target: Array,
        lengths: Sequence[int],
        begin: int,
        length: int,
    ) -> None:
        super().__init__(levels, record)
        self.source, self.target = source[begin : begin + length], target
        self.offsets = [start + begin for start in starts(lengths)]
        self.lengths = [max(0, min(length, whole - begin)) for whole in lengths]
        self.homes = starts(self.lengths)

    def enter(self) -> None:
        """Copy into the staging."""
        self.parts = self.slots(_OCTET)
        self.parts[self.levels.local][self._home(self.levels.rank)] = self.source

    def _home(self, rank: int) -> slice:
        return slice(self.homes[rank], self.homes[rank] + self.lengths[rank])

    def exchange(self) -> Steps[None]:
        """Send mine, receive the others' that I drive."""
        levels, mine = self.levels, self.parts[self.levels.local]
        receipts, sends = [], []
        for node, ranks in enumerate(levels.nodes):
            if node == levels.here:
                continue
            for number in range(levels.local, len(ranks), len(levels.members)):
                if self.lengths[ranks[number]]:
                    receipts.append(levels.receive(mine[self._home(ranks[number])], ranks[number], self.tag(0)))
            if len(self.source):
                sends.append(levels.send(mine[self._home(levels.rank)], levels.driver(levels.local, node), self.tag(0)))
        return _both(*receipts, *sends)

    def leave(self) -> None:
        """Fetch all blocks from the slots of those who have them."""
        for rank, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            node, number = self.levels.node_of(rank)
            holder = number if node == self.levels.here else number % len(self.levels.members)
            self.target[offset : offset + length] = self.parts[holder][self._home(rank)]


def start_all_gather(levels: Levels, source: Array, target: Array, counts: Sequence[int]) -> HierarchyWork:
    """Target = the sources of all ranks one after another."""
    lengths = [count * source.itemsize for count in counts]
    extra = hash(tuple(lengths))
    record = lambda node: node.begin("all_gather", "staged", extra=extra)  # noqa: E731
    source, target = source.view(np.uint8), target.view(np.uint8)
    length = SLOT_BYTES // len(counts)
    portions = (
        _AllGather(levels, record, source, target, lengths, begin, length) for begin in range(0, max(lengths), length)
    )
    return levels.conveyor.start("all_gather", portions)


class _Broadcast(_Step):
    """Every lane of the root's node is the head of a chain over the other nodes."""

    def __init__(self, levels: Levels, record: Callable[[Node], int], buffer: Array, root: int) -> None:
        super().__init__(levels, record)
        self.buffer, self.root = buffer, root
        self.holder = -1  # number of the root in this node
        if root in levels.members:
            self.holder = levels.members.index(root)

    def enter(self) -> None:
        """On root: copy into the staging."""
        self.parts = self.slots(_OCTET)
        if self.levels.rank == self.root:
            self.parts[self.levels.local][: self.buffer.size] = self.buffer

    def exchange(self) -> Steps[None]:
        """Pass my lanes on."""
        return _both(*(self._pass(lane) for lane in self.levels.mine))

    def _pass(self, lane: int) -> Steps[None]:
        levels, size = self.levels, len(self.levels.nodes)
        first = levels.node_of(self.root)[0]
        position = (levels.here - first) % size
        start, stop = owned(self.buffer.size, lane, levels.lanes)
        block = self.parts[self.holder if position == 0 else levels.local][start:stop]
        if start == stop:
            return
        if position > 0:
            yield from levels.receive(block, levels.driver(lane, (levels.here - 1) % size), self.tag(lane))
        if position < size - 1:
            yield from levels.send(block, levels.driver(lane, (levels.here + 1) % size), self.tag(lane))

    def leave(self) -> None:
        """Fetch what the others have."""
        levels = self.levels
        if levels.rank == self.root:
            return
        for lane in range(levels.lanes):
            start, stop = owned(self.buffer.size, lane, levels.lanes)
            holder = self.holder if self.holder >= 0 else lane % len(levels.members)
            self.buffer[start:stop] = self.parts[holder][start:stop]


def start_broadcast(levels: Levels, buffer: Array, root: int) -> HierarchyWork:
    """Buffer of every rank = buffer of root."""
    record = lambda node: node.begin("broadcast", "staged", array=buffer, extra=root)  # noqa: E731
    octets = buffer.view(np.uint8)
    portions = (
        _Broadcast(levels, record, octets[begin : begin + SLOT_BYTES], root)
        for begin in range(0, octets.size, SLOT_BYTES)
    )
    return levels.conveyor.start("broadcast", portions)


class _AllToAll(_Step):
    """Bytes [begin, begin + length) of every block: within the node through the staging, to other nodes directly."""

    def __init__(
        self,
        levels: Levels,
        record: Callable[[Node], int],
        source: Array,
        target: Array,
        block: int,
        begin: int,
        length: int,
    ) -> None:
        super().__init__(levels, record)
        self.length = min(length, block - begin)
        self.rows = source.reshape(-1, block)[:, begin : begin + self.length]
        self.into = target.reshape(-1, block)[:, begin : begin + self.length]

    def enter(self) -> None:
        """Copy what the ranks of my node get into the staging."""
        self.parts = self.slots(_OCTET)
        mine = self.parts[self.levels.local]
        for number, rank in enumerate(self.levels.members):
            mine[number * self.length : (number + 1) * self.length] = self.rows[rank]

    def exchange(self) -> Steps[None]:
        """Each block straight to its rank, a node after the other."""
        levels, size = self.levels, len(self.levels.nodes)
        receipts, sends = [], []
        for shift in range(1, size):
            behind, ahead = levels.nodes[(levels.here - shift) % size], levels.nodes[(levels.here + shift) % size]
            receipts += [levels.receive(self.into[rank], rank, self.tag(0)) for rank in behind]
            sends += [levels.send(self.rows[rank], rank, self.tag(0)) for rank in ahead]
        return _both(*receipts, *sends)

    def leave(self) -> None:
        """Fetch what the ranks of my node have for me."""
        start = self.levels.local * self.length
        for number, rank in enumerate(self.levels.members):
            self.into[rank] = self.parts[number][start : start + self.length]


def start_all_to_all(levels: Levels, source: Array, target: Array, count: int) -> HierarchyWork:
    """Block i of source goes to rank i; all blocks of all ranks have `count` elements; source and target disjoint."""
    block = count * source.itemsize
    record = lambda node: node.begin("all_to_all", "staged", extra=block)  # noqa: E731
    source, target = source.view(np.uint8), target.view(np.uint8)
    length = SLOT_BYTES // max(map(len, levels.nodes))
    portions = (_AllToAll(levels, record, source, target, block, begin, length) for begin in range(0, block, length))
    return levels.conveyor.start("all_to_all", portions)
