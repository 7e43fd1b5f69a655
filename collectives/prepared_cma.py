"""Movement straight out of arrays from anywhere, prepared: as in `prepared_window.py`, but the kernel reads.

address of the source put aside -> ARRIVED -> read the blocks of the others (`cross_memory.py`) -> REDUCED

Every call brings other arrays: where an address is not that of the call before, it is looked up again (`Find`).
"""

import numpy as np

from dtrain.collectives.caches import last_level_cache
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import Array
from dtrain.collectives.long import Chunk, Meetings
from dtrain.collectives.machine_source import PAGE
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import Part, reads, trades
from dtrain.collectives.prepared_window import Rows, Run, all_gather_rows, all_to_all_rows, broadcast_rows, swapped_rows
from dtrain.collectives.records import Record

_OCTET = np.dtype(np.uint8)


def cma_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    record, rows, _ = all_gather_rows(call, "cma")
    # The own block. What the kernel copies takes room too: 8 MiB between 2 ranks take 1.1 ms past the caches, else 1.6.
    past = 2 * (call.stage.size + 1) * call.target.nbytes > last_level_cache()
    return _read(call.stage, record, rows, past)


def cma_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources, or they change places. Uneven blocks have no plan."""
    if call.in_place:
        record, rows = swapped_rows(call, "cma")
        return _met(call.stage, record, rows, trades([(0, 0, *row[1:]) for row in rows]))
    return _read(call.stage, *all_to_all_rows(call, "cma")) if call.alike else None


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
    return _met(node, record, rows, reads([(0, 0, *row[1:]) for row in rows], past), -1 if writes else 1)


def _met(node: Node, record: Record, rows: Rows, part: Part, sign: int = 1) -> Run:
    """The part, whose rows get the process, with this sign, and the address of what the others have put aside."""
    table = part.tables[0]

    def find(number: int, expected: Array) -> None:
        expected[:] = [node.packed_aside(rank, number) for rank, _ in node.peers]
        for k, (rank, _, _, _) in enumerate(rows):
            if rank != node.rank:
                process, there = node.at_home(rank, int(expected[rank - (rank > node.rank)]))
                table[k, :2] = sign * process, there

    return Meetings(node, record, _OCTET, [Chunk(0, [Job(node, among=part, find=find)])], home=True)
