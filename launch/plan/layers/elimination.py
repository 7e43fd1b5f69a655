"""The assignment of choices to variables with the least sum of costs: exact, by eliminating one variable after another.

    minimise  Σ own[v][x_v] + Σ between[v, w][x_v, x_w]

    a ── b ── c         best of a for each choice of b, added to b; then b for each choice of c; then c: a chain
                        (dynamic programming). A variable with several neighbours leaves a table over all of them.

The one that leaves the smallest table goes first. On chains and trees tables have one dim, on graphs with residual
connections two or three; any graph is solved exactly, at a cost exponential in its tree width only.
Reference: Bertelè and Brioschi, Nonserial Dynamic Programming, 1972; Jia et al. (OptCNN), arXiv:1802.04924, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dtrain.arrays import Array
from dtrain.errors import UserError

LARGEST = 1 << 24  # numbers of one table

Factor = tuple[tuple[int, ...], Array]
"""A table over variables, a dim each."""


def cheapest(own: Sequence[Array], between: Mapping[tuple[int, int], Array]) -> tuple[float, list[int]]:
    """(the least sum, the choice of every variable)."""
    factors: list[Factor] = [((v,), costs) for v, costs in enumerate(own)]
    factors += [(pair, costs) for pair, costs in between.items()]
    of: list[set[int]] = [set() for _ in own]  # the factors of each variable
    for number, (variables, _) in enumerate(factors):
        for v in variables:
            of[v].add(number)
    neighbours = [{w for number in of[v] for w in factors[number][0]} - {v} for v in range(len(own))]
    sizes = [len(costs) for costs in own]
    left, total = set(range(len(own))), 0.0

    def leaves(v: int) -> tuple[int, int]:
        return math.prod(sizes[w] for w in neighbours[v]), v

    order = [leaves(v) for v in range(len(own))]  # the table that each would leave now
    decided: list[tuple[int, tuple[int, ...], Array]] = []  # variable, on which others it depends, its best choices
    while left:
        v = min(order[v] for v in left)[1]
        others = tuple(sorted(neighbours[v]))
        if sizes[v] * math.prod(sizes[w] for w in others) > LARGEST:
            raise UserError(
                f"the ops of this model are joined too closely: {len(others) + 1} of them must be tried at once"
            )
        table = _sum([factors[number] for number in of[v]], (*others, v), sizes)
        decided.append((v, others, table.argmin(axis=-1)))
        table = table.min(axis=-1)
        left.remove(v)
        for number in list(of[v]):
            for w in factors[number][0]:
                of[w].discard(number)
        for w in others:
            neighbours[w] |= set(others)
            neighbours[w] -= {v, w}
        for w in others:
            order[w] = leaves(w)
        if others:
            factors.append((others, table))
            for w in others:
                of[w].add(len(factors) - 1)
        else:
            total += float(table)
    chosen = [0] * len(own)
    for v, others, best in reversed(decided):
        chosen[v] = int(best[tuple(chosen[w] for w in others)])
    return total, chosen


def _sum(factors: Sequence[Factor], variables: tuple[int, ...], sizes: Sequence[int]) -> Array:
    """All of them over these variables."""
    table = np.zeros([sizes[v] for v in variables])
    for mine, costs in factors:
        order = sorted(range(len(mine)), key=lambda i: variables.index(mine[i]))
        shape = [sizes[v] if v in mine else 1 for v in variables]
        table += costs.transpose(order).reshape(shape)
    return table


def value(own: Sequence[Array], between: Mapping[tuple[int, int], Array], chosen: Sequence[int]) -> float:
    """The sum of one assignment."""
    alone = sum(float(costs[chosen[v]]) for v, costs in enumerate(own))
    return alone + sum(float(costs[chosen[v], chosen[w]]) for (v, w), costs in between.items())
