"""Every algorithm of the catalogue, inputs for it, and the executor straight over a transport."""

import numpy as np

from dtrain.collectives.schedules import ALGORITHMS
from dtrain.collectives.schedules.executor import Run
from dtrain.collectives.schedules.planner import make_plan
from dtrain.collectives.schedules.segments import SEGMENT_BYTES

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows if collective != "barrier"]
ROOTED = ("broadcast", "reduce", "gather", "scatter")


def draw(rng, count, dtype):
    """Numbers whose sums are not exact, so that their order shows in the bits."""
    if dtype.kind == "b":
        return rng.integers(0, 2, count).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, 100, count).astype(dtype)
    return rng.uniform(0.5, 1.5, count).astype(dtype)


def given(plan, count, rng, dtype):
    """Inputs of all ranks and `counts` for the specification."""
    size, none = plan.size, np.empty(0, dtype)
    if plan.collective == "all_to_all":
        counts = rng.integers(0, count + 2, (size, size))
        return [draw(rng, n, dtype) for n in counts.sum(axis=1)], counts
    if plan.collective in ("all_gather", "gather"):
        counts = rng.integers(0, count + 2, size)
        return [draw(rng, n, dtype) for n in counts], counts
    if plan.collective in ("broadcast", "scatter"):
        return [draw(rng, count, dtype) if rank == plan.root else none for rank in range(size)], count
    return [draw(rng, count, dtype) for _ in range(size)], count


def execute(transport, plan, array, counts=None, op="sum", out=None, segment_bytes=SEGMENT_BYTES):
    """What this rank gets by the messages of a transport, without a communicator; `out` may be `array` itself."""
    spec = plan.specification
    lengths = spec.lengths(len(array) if counts is None else counts)
    in_place = out is array and spec.given(transport.rank) == spec.wanted(transport.rank)
    ready = make_plan(plan, transport.rank, lengths, array.dtype.itemsize, in_place, segment_bytes)
    target = np.empty(ready.lengths[1], array.dtype) if out is None else out
    if not in_place and np.may_share_memory(array, target):
        array = array.copy()
    Run(ready, transport, array, target, op if spec.reduces else "").wait()
    return target
