"""All_to_all of uneven blocks on one node: nobody but the two ends knows how long a block is.

    my slot of the staging   | where | begin, bytes for rank 0 | for rank 1 | ... | the data, where it is short |
    then ARRIVED; every rank looks into the slots, and copies its blocks: out of the slots, or straight out of the
    arrays of the others (`cross_memory.py`); then REDUCED, if anybody's data is not in his slot

What is short costs one synchronisation, what is long two and no copy but that of the result. All ranks see all the
words `where`, so all know which. Experts (MoE) and uneven heads (Ulysses) exchange this way.
"""

from collections.abc import Sequence

import numpy as np

from dtrain.collectives import cross_memory, records
from dtrain.collectives.dtypes import Array, address, starts
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import reads
from dtrain.collectives.records import NO_PLACE
from dtrain.collectives.waiting import CollectiveMismatch

SHORT_BYTES = 128 * 1024  # the data of a rank; above, one copy of the kernel beats two
_SHORT = -1  # where: in the slot
_WORD, _OCTET = np.dtype(np.int64), np.dtype(np.uint8)


def exchange(node: Node, source: Array, target: Array, counts: Sequence[int], out_counts: Sequence[int]) -> None:
    """Target = the blocks for this rank; counts and out_counts in elements; source and target are flat and disjoint."""
    known = node.kept.get(__name__)
    if known is None:
        known = node.kept[__name__] = _Exchanges(node)
    known.exchange(source, target, counts, out_counts)


class _Exchanges:
    """Those of one communicator."""

    def __init__(self, node: Node) -> None:
        self._node, size = node, node.size
        self._turn = 0
        self._head = -(-8 * (1 + 2 * size) // 64) * 64  # bytes before the data
        part = reads([(0, 0, 0, 0, 0)] * size)
        self._table = part.tables[0]
        self._job = Job(node, among=part, find=self._find)
        self._lengths: Sequence[int] = ()
        self._offsets: Sequence[int] = ()
        self._index = 0

    def exchange(self, source: Array, target: Array, counts: Sequence[int], out_counts: Sequence[int]) -> None:
        node, item = self._node, source.itemsize
        self._turn += 1
        record = records.record("all_to_all", "cma", "", None, 0, NO_PLACE, hash((item,)))
        number = node.begin_record(record, (0, self._turn))  # new each time: every rank looks into the slots
        self._index = index = node.free_slot(number)
        head, begin = [_SHORT], 0
        for count in counts:
            head += begin, count * item
            begin += count * item
        if begin <= SHORT_BYTES:
            node.slots(index, _OCTET)[node.rank][self._head : self._head + begin] = source.view(_OCTET)
        else:
            head[0] = records.packed(node.arena.place(source) or cross_memory.private(source))
        node.slots(index, _WORD)[node.rank][: len(head)] = head
        self._lengths = [count * item for count in out_counts]
        self._offsets = starts(self._lengths)
        self._job.meet(number, source, target)

    def _find(self, number: int, expected: Array) -> None:
        node, mine = self._node, self._node.rank
        two = False
        rows = []
        for rank, slot in enumerate(node.slots(self._index, _WORD)):
            where, begin, nbytes = slot[[0, 1 + 2 * mine, 2 + 2 * mine]].tolist()
            two = two or where != _SHORT
            if nbytes != self._lengths[rank]:
                raise CollectiveMismatch(
                    f"all_to_all: rank {rank} has {nbytes} bytes for rank {mine}, which expects "
                    f"{self._lengths[rank]} (out_counts)"
                )
            rows.append((*self._home(rank, where), begin, self._offsets[rank], nbytes))
        self._table[...] = rows[mine:] + rows[:mine]  # from the own on, so that not all read one source at once
        self._job.needs_second(two)
        for rank, _ in node.peers:
            expected[rank - (rank > mine)] = node.packed_aside(rank, number)

    def _home(self, rank: int, where: int) -> tuple[int, int]:
        """Process, 0 for this one, and address of what a rank has brought, 0 for this rank's own."""
        node = self._node
        if rank == node.rank:
            return 0, 0
        if where == _SHORT:
            return 0, address(node.slots(self._index, _OCTET)[rank]) + self._head
        return node.at_home(rank, where)
