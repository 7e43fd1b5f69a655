"""Movement over several nodes: what a node wants goes to one of its ranks, once; the others fetch it in shared memory.

    all_gather, 2 nodes of 2 ranks, each block with the rank of its number

      rank 0 | a |   ─►  ═ a ═►  ◄═ c ═   | a . c . |        staging of rank 0
      rank 1 | b |   ─►  ═ b ═►  ◄═ d ═   | . b . d |        of rank 1; both read both

Bytes that a node sends, for n bytes in all on N nodes; no algorithm needs fewer:

    all_gather       n/N (N-1)     each block once to each other node
    broadcast        n             from node to node, a chain (the last one sends nothing)
    all_to_all       what its ranks have for others

Everything is bytes here and goes through the staging, portion by portion (`conveyor.py`); sums: `hierarchy.py`.
"""

from collections.abc import Sequence

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.conveyor import HierarchyWork, Steps, both
from dtrain.collectives.dtypes import Array, starts
from dtrain.collectives.levels import SLOT_BYTES, Levels, LevelsPortion
from dtrain.collectives.records import Record
from dtrain.collectives.sums import owned

_OCTET = np.dtype(np.uint8)


class _AllGather(LevelsPortion):
    """Of the bytes [begin, begin + length) of every block. Each rank sends its block to one rank in each other node:
    to that which has its number there.
    """

    def __init__(
        self,
        levels: Levels,
        record: Record,
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
        return both(*receipts, *sends)

    def leave(self) -> None:
        """Fetch all blocks from the slots of those who have them."""
        for rank, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            node, number = self.levels.node_of(rank)
            holder = number if node == self.levels.here else number % len(self.levels.members)
            self.target[offset : offset + length] = self.parts[holder][self._home(rank)]


def start_all_gather(levels: Levels, source: Array, target: Array, counts: Sequence[int]) -> HierarchyWork:
    """Target = the sources of all ranks one after another."""
    lengths = [count * source.itemsize for count in counts]
    record = records.record("all_gather", "staged", extra=hash(tuple(lengths)))
    source, target = source.view(np.uint8), target.view(np.uint8)
    length = SLOT_BYTES // len(counts)
    portions = (
        _AllGather(levels, record, source, target, lengths, begin, length) for begin in range(0, max(lengths), length)
    )
    return levels.conveyor.start("all_gather", portions)


class _Broadcast(LevelsPortion):
    """Every lane of the root's node is the head of a chain over the other nodes."""

    def __init__(self, levels: Levels, record: Record, buffer: Array, root: int) -> None:
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
        return both(*(self._pass(lane) for lane in self.levels.mine))

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
    record = records.record("broadcast", "staged", dtype=buffer.dtype, count=buffer.size, extra=root)
    octets = buffer.view(np.uint8)
    portions = (
        _Broadcast(levels, record, octets[begin : begin + SLOT_BYTES], root)
        for begin in range(0, octets.size, SLOT_BYTES)
    )
    return levels.conveyor.start("broadcast", portions)


class _AllToAll(LevelsPortion):
    """Bytes [begin, begin + length) of every block: within the node through the staging, to other nodes directly."""

    def __init__(
        self,
        levels: Levels,
        record: Record,
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
        return both(*receipts, *sends)

    def leave(self) -> None:
        """Fetch what the ranks of my node have for me."""
        start = self.levels.local * self.length
        for number, rank in enumerate(self.levels.members):
            self.into[rank] = self.parts[number][start : start + self.length]


def start_all_to_all(levels: Levels, source: Array, target: Array, count: int) -> HierarchyWork:
    """Block i of source goes to rank i; all blocks of all ranks have `count` elements; source and target disjoint."""
    block = count * source.itemsize
    record = records.record("all_to_all", "staged", extra=block)
    source, target = source.view(np.uint8), target.view(np.uint8)
    length = SLOT_BYTES // max(map(len, levels.nodes))
    portions = (_AllToAll(levels, record, source, target, block, begin, length) for begin in range(0, block, length))
    return levels.conveyor.start("all_to_all", portions)
