"""The forms of the collectives on one node that are prepared once and run often: for `plans.py`.

    window   prepared_window.py
    staged   prepared_staged.py
    cma      prepared_cma.py
    native   here: all ranks come together in the window, then the MPI library's collective

Each does what the function of its row does in `ways.py`, step by step with the same records; what it leaves out is the
Python that finds lengths, views and hashes again in every call.
"""

from collections.abc import Callable

import numpy as np

from dtrain.collectives import prepared_cma, prepared_staged, prepared_window, records
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import Array
from dtrain.collectives.meeting import Job
from dtrain.collectives.prepared_window import Run
from dtrain.collectives.records import NO_PLACE


def native(call: Call, name: str, alike: bool, do: Run) -> Run:
    """All ranks come together in the window before the library's collective, as in `Call.met`."""
    node = call.stage
    dtype, count = (call.source.dtype, call.source.size) if alike else (None, 0)
    record = records.record(name, "native", call.op, dtype, count, NO_PLACE, call.extra(name))

    job = Job(node, two=False)

    def run(source: Array, target: Array) -> None:
        job.meet(node.begin_record(record), source, target)
        do(source, target)

    return run


def native_all_reduce(call: Call) -> Run:
    """Target = the sum of all sources."""
    transport, op, inside = call.transport, call.op, call.in_place
    return native(call, "all_reduce", True, lambda x, y: transport.all_reduce(y if inside else x, y, op))


def native_reduce_scatter(call: Call) -> Run:
    """Target = the sum of the ranks' blocks of this rank."""
    transport, op, counts = call.transport, call.op, call.counts
    return native(call, "reduce_scatter", True, lambda x, y: transport.reduce_scatter(x, y, counts, op))


def native_all_gather(call: Call) -> Run | None:
    """Target = the sources of all ranks, one after another."""
    if np.may_share_memory(call.source, call.target):
        return None  # goes out of a copy: `Call.apart`
    transport, counts = call.transport, call.counts
    return native(call, "all_gather", False, lambda x, y: transport.all_gather(x, y, counts))


def native_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources."""
    if np.may_share_memory(call.source, call.target):
        return None  # goes out of a copy: `Call.apart`
    transport, counts, out_counts = call.transport, call.counts, call.out_counts
    return native(call, "all_to_all", False, lambda x, y: transport.all_to_all(x, y, counts, out_counts))


def native_broadcast(call: Call) -> Run:
    """Target of every rank = target of root."""
    transport, root = call.transport, call.root
    return native(call, "broadcast", True, lambda x, y: transport.broadcast(y, root))


# (collective, row) -> what prepares it; it returns None for what has no prepared form.
PREPARED: dict[tuple[str, str], Callable[[Call], Run | None]] = {
    ("all_reduce", "window"): prepared_window.window_all_reduce,
    ("all_reduce", "window_staged"): prepared_window.window_staged_all_reduce,
    ("all_reduce", "staged"): prepared_staged.staged_all_reduce,
    ("all_reduce", "native"): native_all_reduce,
    ("reduce_scatter", "window"): prepared_window.window_reduce_scatter,
    ("reduce_scatter", "staged"): prepared_staged.staged_reduce_scatter,
    ("reduce_scatter", "native"): native_reduce_scatter,
    ("all_gather", "window"): prepared_window.window_all_gather,
    ("all_gather", "staged"): prepared_staged.staged_all_gather,
    ("all_gather", "cma"): prepared_cma.cma_all_gather,
    ("all_gather", "native"): native_all_gather,
    ("all_to_all", "window"): prepared_window.window_all_to_all,
    ("all_to_all", "staged"): prepared_staged.staged_all_to_all,
    ("all_to_all", "cma"): prepared_cma.cma_all_to_all,
    ("all_to_all", "native"): native_all_to_all,
    ("broadcast", "window"): prepared_window.window_broadcast,
    ("broadcast", "staged"): prepared_staged.staged_broadcast,
    ("broadcast", "cma"): prepared_cma.cma_broadcast,
    ("broadcast", "native"): native_broadcast,
}
