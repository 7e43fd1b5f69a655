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
from dtrain.collectives.prepared_window import Rows, Run, all_gather_rows, all_to_all_rows, broadcast_rows
from dtrain.collectives.records import NO_PLACE, Record


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
    node = call.stage
    if node.size == 2:
        return _broadcast_in_halves(call)

    return _read(node, *broadcast_rows(call, "cma"), past=False)


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
        expected[:] = [node.packed_aside(rank, number) for rank, _ in node.peers]
        for k, (rank, _, _, _) in enumerate(rows):
            if rank != node.rank:
                table[k, :2] = node.at_home(rank, int(expected[rank - (rank > node.rank)]))

    job = Job(node, among=part, find=find)

    def run(source: Array, target: Array) -> None:
        job.meet(node.begin_record(record, _home(node, source)), source, target)

    return run
