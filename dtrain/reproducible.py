"""Same bits for any number of data ranks: sums over samples are one binary tree over the microbatches of a step.

    microbatch    0   1   2   3   4   5   6   7          dp=1   rank 0 has all
                  └ + ┘   └ + ┘   └ + ┘   └ + ┘          dp=2   rank 0: 0..3    rank 1: 4..7
                    └── + ──┘       └── + ──┘            dp=4   each a pair: the upper two rows are between ranks
                        └────── + ──────┘                dp=8   all rows are

A range of microbatches is halved until one is left, so the ranges of 2, 4, 8, … ranks are nodes of the same tree: a
rank adds up its own below its node (`MicrobatchTree`), the ranks add up their nodes above (`fixed_tree.py`). Addition
commutes to the last bit, so only the tree matters. The norm is a sum of integers (of multiples of one power of two,
`sum_squares`): exact, in any order. All else is done element by element.

Invariant: with equal train.micro_batch and global batch, parameters have the same bits for any power of two of data
ranks, naive, ddp or ZeRO. Costs a copy of the gradients per level of the tree, and sums that no backward hides.
Reference: Demmel and Nguyen, "Fast reproducible floating-point summation", IEEE ARITH 2013 (pre-rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives.dtypes import spans
from dtrain.flat import FlatBuffers
from dtrain.parameter import Parameter

MANTISSA = 52  # bits of float64 behind the first
ELEMENTS = 32  # bits of the largest number of parameters
FOLDS = 3  # (MANTISSA - ELEMENTS) bits each of every square


class MicrobatchTree:
    """Adds the gradients of the microbatches of this rank up, in a callback of each parameter before all others."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.merges: Sequence[int] = ()
        """After which microbatch how many partial sums become one."""
        self.kept: dict[str, list[Array]] = {}
        self.met: dict[str, int] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.on_gradient(self._arrival(parameter))

    def begin(self, microbatches: int) -> None:
        """A step of so many microbatches begins."""
        self.merges = merges(microbatches)
        self.met.clear()

    def _arrival(self, parameter: Parameter) -> Callable[[Array], None]:
        def arrived(gradient: Array) -> None:
            """Of one microbatch alone: that of the ones before is taken away."""
            number = self.met.get(parameter.name, 0)
            self.met[parameter.name] = number + 1
            last = number + 1 == len(self.merges)
            stack = self.kept.setdefault(parameter.name, [])
            stack.append(gradient if last else gradient.copy())
            for _ in range(self.merges[number]):
                right, left = stack.pop(), stack.pop()
                left += right
                stack.append(left)
            if last:
                (total,) = stack
                if total is not gradient:
                    gradient[...] = total
                stack.clear()
            else:
                parameter.grad = None  # and no other callback hears of it

        return arrived


@cache
def merges(leaves: int) -> tuple[int, ...]:
    """For each leaf of the tree, how many inner nodes are complete with it: [0, 1, 0, 2] of four."""
    counts = [0] * leaves

    def halve(first: int, stop: int) -> None:
        if stop - first > 1:
            middle = (first + stop) // 2
            halve(first, middle)
            halve(middle, stop)
            counts[stop - 1] += 1

    halve(0, leaves)
    return tuple(counts)


def sum_squares(flat: FlatBuffers) -> float:
    """The square of the global gradient norm, with the same bits in every layout. Collective over the mesh.

    Every square is rounded to a multiple of a power of two so large that the sum of all of them is exact, what that
    lost to a multiple of a smaller one, and so on.
    """
    flat.fill_missing()
    assert flat.mesh is not None
    comm = flat.mesh.comm
    shares = []
    for group in flat.groups:
        index, count = group.replicas()
        start, stop = spans(group.owned_grad.size, count)[index]
        shares.append(np.square(group.owned_grad[start:stop], dtype=np.float64))
    squares = np.concatenate(shares) if shares else np.zeros(0)
    largest = float(comm.all_reduce(np.array([squares.max(initial=0.0)]), op="max")[0])
    if largest == 0 or not math.isfinite(largest):
        return largest
    exponent, sums = math.frexp(largest)[1], []
    for _ in range(FOLDS):
        exponent += ELEMENTS - MANTISSA
        quantum = math.ldexp(1.0, max(exponent, -1022))
        rounded = np.rint(squares / quantum) * quantum
        sums.append(rounded.sum())
        squares = squares - rounded
    return math.fsum(comm.all_reduce(np.array(sums)).tolist())
