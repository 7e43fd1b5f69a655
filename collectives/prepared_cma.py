"""Movement straight out of arrays from anywhere, prepared: as in `prepared_window.py`, but the kernel reads.

address of the source put aside -> ARRIVED -> read the blocks of the others (`cross_memory.py`) -> REDUCED

Every call brings other arrays: where an address is not that of the call before, it is looked up again (`Find`).
"""

from dtrain.collectives import cross_memory, records
from dtrain.collectives.arena import Place
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_source import PAGE
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.parts import reads
from dtrain.collectives.prepared_window import Rows, Run, all_gather_rows, all_to_all_rows, broadcast_from_home
from dtrain.collectives.records import NO_PLACE, Record


def cma_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    return _read(call.stage, *all_gather_rows(call, "cma"))


def cma_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources. Uneven blocks have no plan, nor what is in place."""
    return _read(call.stage, *all_to_all_rows(call, "cma")) if call.alike and not call.in_place else None


def cma_broadcast(call: Call) -> Run:
    """Target of every rank = target of root. Between two ranks each moves a half: one reads, root writes."""
    node, root = call.stage, call.root
    if node.size == 2:
        return _broadcast_in_halves(call)

    def fetch(number: int, octets: Array) -> None:
        process, at = node.at_home(root, node.packed_aside(root, number))
        cross_memory.read(process or node.processes[node.rank], at, address(octets), len(octets))

    return broadcast_from_home(call, "cma", lambda target: _home(node, target), fetch)


def _broadcast_in_halves(call: Call) -> Run:
    node, (other, _), nbytes, at_root = call.stage, call.stage.peers[0], call.target.nbytes, call.at_root
    record = records.record("broadcast", "cma", "", call.target.dtype, call.target.size, NO_PLACE, call.root)
    middle = nbytes // 2 // PAGE * PAGE

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record, cross_memory.private(target))
        node.arrive(number)
        node.works.complete(number)  # works started before: REDUCED below speaks for them too
        node.await_arrived(number)
        process, there = node.at_home(other, node.packed_aside(other, number))
        if at_root:
            cross_memory.write(process, there + middle, address(target) + middle, nbytes - middle)
        else:
            cross_memory.read(process, there, address(target), middle)
        node.reduced(number)
        node.await_reduced(number)

    return run


def _home(node: Node, array: Array) -> Place:
    return node.arena.place(array) or cross_memory.private(array)


def _read(node: Node, record: Record, rows: Rows, past: bool) -> Run:
    """Every rank reads its blocks out of what the others have put aside."""
    part = reads([(0, 0, *row[1:]) for row in rows], past)
    table = part.tables[0]

    def find(number: int, expected: Array) -> None:
        for k, (rank, _, _, _) in enumerate(rows):
            if rank != node.rank:
                where = expected[rank - (rank > node.rank)] = node.packed_aside(rank, number)
                table[k, :2] = node.at_home(rank, where)

    job = Job(node, among=part, find=find)

    def run(source: Array, target: Array) -> None:
        job.meet(node.begin_record(record, _home(node, source)), source, target)

    return run
