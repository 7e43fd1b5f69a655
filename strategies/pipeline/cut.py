"""Where a model is cut into stages: by hand, or such that the slowest stage is as fast as can be.

    costs of the blocks  5 1 1 1 1 5  in 3 stages:  5 │ 1 1 1 1 │ 5    no cut has a shorter longest stage than 5

The pipeline runs at the pace of its slowest stage, so the largest sum is what counts (the linear partition problem,
solved exactly by dynamic programming; Skiena, The Algorithm Design Manual, section 10.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dtrain.errors import UserError


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """How many of the blocks, in order, each stage gets, at least one: the largest sum of costs is the least possible.

    Among equally good cuts the one with the smaller sum of squares of the stages' costs.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise UserError(f"parallel.pp: {stages} stages need as many blocks; the model has {count}")
    until = [0.0, *accumulate(costs)]
    # best[i]: (largest stage, sum of squares) and the last cut of the best way to give the first i blocks to s stages
    best: list[tuple[float, float]] = [(until[i], until[i] ** 2) for i in range(count + 1)]
    cuts: list[list[int]] = []
    for stage in range(2, stages + 1):
        following = [(float("inf"), float("inf"))] * (count + 1)
        cut = [0] * (count + 1)
        for i in range(stage, count + 1):
            for j in range(stage - 1, i):
                last = until[i] - until[j]
                whole = (max(best[j][0], last), best[j][1] + last**2)
                if whole < following[i]:
                    following[i], cut[i] = whole, j
        best = following
        cuts.append(cut)
    stop, sizes = count, []
    for cut in reversed(cuts):
        sizes.append(stop - cut[stop])
        stop = cut[stop]
    return [stop, *reversed(sizes)]


def by_hand(sizes: Sequence[int], blocks: int, stages: int) -> list[int]:
    """`sizes` after a check: blocks per stage."""
    if len(sizes) != stages or sum(sizes) != blocks or min(sizes, default=0) < 0:
        raise UserError(f"pipeline.cut: {list(sizes)}; allowed: {stages} numbers from 0 with the sum {blocks}")
    return list(sizes)
