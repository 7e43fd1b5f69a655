"""Recursive halving: exchange half of what is left with the partner, add, go on with the other half.

    8 chunks, rank 0:   ████████  →1: 4-7   ████····  →2: 2-3   ██······  →4: 1   █·······
                                  ←1: 0-3             ←2: 0-1             ←4: 0

lg p steps and each byte sent once: short and long vectors alike, for powers of two. Rabenseifner's all_reduce is this
and the same way back. Other sizes fold first: either whole vectors are added (MPICH), or the two of a pair add one half
each (Open MPI), which saves half of that adding for one more message.
Reference: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dtrain.collectives.schedules.doubling import distances, floor_log, folded, unfolded
from dtrain.collectives.schedules.schedule import NONE, Cost, Receive, Send, Step, span


def power_below(size: int) -> int:
    """The number p' = 2^⌊log p⌋ of ranks that stay after folding."""
    return 1 << floor_log(size)


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Rabenseifner, whole vectors folded, p' chunks. 2lg p·α + 2n(p-1)/p·β + n(p-1)/p·γ for powers of two.

    Others: (2⌊lg p⌋+2)α + (2(p'-1)/p'+2)nβ + (1+(p'-1)/p')nγ. Partners 1 away come first, so that sums keep the order.
    """
    power = power_below(size)
    everything = range(power)
    number, lower, upper, alone = folded(rank, size)
    if size > power:
        yield Step([Send(rank + 1, everything, when=lower)], [Receive(rank - 1, everything, reduce=True, when=upper)])
    yield from _halve_and_double(number, upper | alone, power, lambda number: unfolded(number, size))
    if size > power:
        yield Step([Send(rank - 1, everything, when=upper)], [Receive(rank + 1, everything, when=lower)])


def all_reduce_cost(size: int) -> Cost:
    """Of `all_reduce`."""
    power = power_below(size)
    cost = _halve_and_double_cost(power)
    return cost if size == power else Cost(cost.alpha + 2, cost.beta + 2, cost.gamma + 1)


def half_folded_all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Rabenseifner with Open MPI's folding: the two of a pair add one half each, then one goes on with both.

        0 ──upper──► 1     0 ◄──upper── 1      ...      0 ──all──► 1
        0 ◄──lower── 1

    Folding in costs 2α + nβ + n/2·γ, folding out α + nβ.
    """
    power = power_below(size)
    everything, first_half, last_half = range(power), range(power // 2), range(power // 2, power)
    number, lower, upper, alone = folded(rank, size)
    if size > power:
        yield Step(
            [Send(rank + 1, last_half, when=lower), Send(rank - 1, first_half, when=upper)],
            [
                Receive(rank + 1, first_half, reduce=True, when=lower),
                Receive(rank - 1, last_half, reduce=True, when=upper),
            ],
        )
        yield Step([Send(rank - 1, last_half, when=upper)], [Receive(rank + 1, last_half, when=lower)])
    lower_stays = lambda number: np.minimum(2 * number, number + size - power)  # noqa: E731
    yield from _halve_and_double(number, lower | alone, power, lower_stays)
    if size > power:
        yield Step([Send(rank + 1, everything, when=lower)], [Receive(rank - 1, everything, when=upper)])


def half_folded_all_reduce_cost(size: int) -> Cost:
    """Of `half_folded_all_reduce`."""
    power = power_below(size)
    cost = _halve_and_double_cost(power)
    return cost if size == power else Cost(cost.alpha + 3, cost.beta + 2, cost.gamma + 0.5)


def reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """Recursive halving, far partners first, so that everyone ends with its own block. lg p·α + n(p-1)/p·(β+γ).

    Other sizes fold whole vectors first; a rank that stays then works for the two blocks of its pair and hands one
    out at the end: (⌊lg p⌋+2)α, and the heaviest path is that of the pairs (`reduce_scatter_cost`).
    """
    power = power_below(size)
    extra = size - power
    number, lower, upper, alone = folded(rank, size)

    def blocks(first: Any, count: int) -> Any:
        """Of so many staying ranks from number first on: two each for those of a pair."""
        begin, last = (end + np.minimum(end, extra) for end in (first, first + count))
        found = span(begin, count + min(count, extra))
        return np.where(found < last, found, NONE)

    if extra:
        yield Step([Send(rank + 1, range(size), when=lower)], [Receive(rank - 1, range(size), reduce=True, when=upper)])
    for distance in reversed(distances(power)):
        number_of_peer, stays = number ^ distance, upper | alone
        mine, theirs = (start - start % distance for start in (number, number_of_peer))
        peer = unfolded(number_of_peer, size)
        yield Step(
            [Send(peer, blocks(theirs, distance), when=stays)],
            [Receive(peer, blocks(mine, distance), reduce=True, when=stays)],
        )
    if extra:
        yield Step([Send(rank - 1, [rank - 1], when=upper)], [Receive(rank + 1, [rank], when=lower)])


def reduce_scatter_cost(size: int) -> Cost:
    """Of `reduce_scatter`: exact, with the double blocks of the pairs on the critical path."""
    power = power_below(size)
    if size == power:
        return Cost(floor_log(size), (size - 1) / size, (size - 1) / size)
    halved = sum(distance + min(distance, size - power) for distance in distances(power)) / size
    return Cost(floor_log(size) + 2, 1 + halved + 1 / size, 1 + halved)


def _halve_and_double(number: Any, stays: Any, power: int, rank_of: Callable[[Any], Any]) -> Iterator[Step]:
    """All-reduce among those who stay; the others are idle."""
    first, way_back = 0 * number, []
    for distance in distances(power):
        peer, half, upper = rank_of(number ^ distance), power // (2 * distance), number // distance % 2
        kept, sent = (span(first + half * which, half) for which in (upper, 1 - upper))
        yield Step([Send(peer, sent, when=stays)], [Receive(peer, kept, reduce=True, when=stays)])
        way_back.append(Step([Send(peer, kept, when=stays)], [Receive(peer, sent, when=stays)]))
        first = first + half * upper
    yield from reversed(way_back)


def _halve_and_double_cost(power: int) -> Cost:
    return Cost(2 * floor_log(power), 2 * (power - 1) / power, (power - 1) / power)
