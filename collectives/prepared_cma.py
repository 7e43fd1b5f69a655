"""Movement straight out of arrays from anywhere, prepared: as in `prepared_window.py`, but the kernel reads.

address of the source put aside -> ARRIVED -> read the blocks of the others (`cross_memory.py`) -> REDUCED

Every call brings other arrays: where an address is not that of the call before, it is looked up again (`Find`).
"""

import numpy as np

from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import Array
from dtrain.collectives.long import Chunk, Meetings
from dtrain.collectives.machine_source import PAGE
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import reads
from dtrain.collectives.prepared_window import Rows, Run, all_gather_rows, all_to_all_rows, broadcast_rows
from dtrain.collectives.records import Record

_OCTET = np.dtype(np.uint8)


def cma_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    return _read(call.stage, *all_gather_rows(call, "cma"))


def cma_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources, in place out of a copy. Uneven blocks have no plan."""
    if not call.alike:
        return None
    run = _read(call.stage, *all_to_all_rows(call, "cma"))
    return (lambda source, target: run(source.copy(), target)) if call.in_place else run


def cma_broadcast(call: Call) -> Run:
    """Target of every rank = target of root. Between two ranks each moves a half: one reads, root writes."""
    node, (record, rows), nbytes = call.stage, broadcast_rows(call, "cma"), call.target.nbytes
    if node.size == 2:
        middle = nbytes // 2 // PAGE * PAGE
        other = node.peers[0][0]
        rows = [(other, middle, middle, nbytes - middle) if call.at_root else (other, 0, 0, middle)]
    return _read(node, record, rows, past=False, writes=call.at_root)


def _read(node: Node, record: Record, rows: Rows, past: bool, writes: bool = False) -> Run:
    """Every rank reads its blocks out of what the others have put aside, or writes its own into it."""
    part = reads([(0, 0, *row[1:]) for row in rows], past)
    table = part.tables[0]

    def find(number: int, expected: Array) -> None:
        expected[:] = [node.packed_aside(rank, number) for rank, _ in node.peers]
        for k, (rank, _, _, _) in enumerate(rows):
            if rank != node.rank:
                process, there = node.at_home(rank, int(expected[rank - (rank > node.rank)]))
                table[k, :2] = -process if writes else process, there

    return Meetings(node, record, _OCTET, [Chunk(0, [Job(node, among=part, find=find)])], home=True)
