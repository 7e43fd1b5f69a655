"""Every algorithm of the catalogue, and inputs for it."""

import numpy as np

from dtrain.collectives.schedules import ALGORITHMS

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
