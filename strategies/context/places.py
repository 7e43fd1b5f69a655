"""Which tokens of a sample a context-parallel rank has: runs of neighbours, in order.

    blocks (Ulysses, or no causal mask), cp = 4          zigzag (ring with a causal mask), cp = 4
    │  0  │  1  │  2  │  3  │                            │0│1│2│3│3│2│1│0│

A token sees those before it, so with plain blocks the last rank has seven times the work of the first. In zigzag order
rank i has blocks i and 2 cp - 1 - i of 2 cp, and all have the same. Where the length does not divide, the first blocks
have one token more.
Reference: Brandon et al., "Striped attention", arXiv:2311.09431 (balance); the zigzag order of Llama 3,
arXiv:2407.21783, section 3.3.2.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives.dtypes import spans

Runs = tuple[tuple[int, int], ...]
"""Start and stop of neighbouring tokens."""


def blocks(length: int, size: int) -> tuple[Runs, ...]:
    """For each rank one run."""
    return tuple((run,) for run in spans(length, size))


def zigzag(length: int, size: int) -> tuple[Runs, ...]:
    """For each rank two runs of a causal attention with equal work; an empty one is left out."""
    runs = spans(length, 2 * size)
    return tuple(tuple(run for run in (runs[i], runs[-1 - i]) if run[0] < run[1]) for i in range(size))


def count(runs: Runs) -> int:
    """How many tokens these are."""
    return sum(stop - start for start, stop in runs)


def positions(runs: Runs) -> Array:
    """Of all tokens of the runs, (T,) int64."""
    return np.concatenate([np.arange(start, stop) for start, stop in runs])


def local(runs: Runs) -> list[tuple[slice, int]]:
    """The runs as (where they lie in the array of this rank, position of the first token)."""
    ends = [0, *accumulate(stop - start for start, stop in runs)]
    return [(slice(*ends[i : i + 2]), run[0]) for i, run in enumerate(runs)]
