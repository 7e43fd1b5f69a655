"""Recursive halving: exchange half of what is left with the partner, add, go on with the other half.

    8 chunks, rank 0:   ████████  →1: 4-7   ████····  →2: 2-3   ██······  →4: 1   █·······
                                  ←1: 0-3             ←2: 0-1             ←4: 0

lg p steps and each byte sent once: short and long vectors alike, for powers of two. Rabenseifner's all_reduce is this
and the same way back. Other sizes fold first: either whole vectors are added (MPICH), or the two of a pair add one half
each (Open MPI), which saves half of that adding for one more message.
Reference: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004.
"""

from collections.abc import Callable, Iterator

from dtrain.collectives.schedules.doubling import distances, floor_log, folded, unfolded
from dtrain.collectives.schedules.schedule import Cost, Receive, Send, Step


def power_below(size: int) -> int:
    """The number p' = 2^⌊log p⌋ of ranks that stay after folding."""
    return 1 << floor_log(size)


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Rabenseifner, whole vectors folded, p' chunks. 2lg p·α + 2n(p-1)/p·β + n(p-1)/p·γ for powers of two.

    Others: (2⌊lg p⌋+2)α + (2(p'-1)/p'+2)nβ + (1+(p'-1)/p')nγ. Partners 1 away come first, so that sums keep the order.
    """
    power = power_below(size)
    everything = range(power)
    number, paired = folded(rank, size), rank < 2 * (size - power)
    if paired:
        fold_in = Step([Send(rank + 1, everything)]), Step(receives=[Receive(rank - 1, everything, reduce=True)])
        yield fold_in[rank % 2]
    elif size > power:
        yield Step()
    yield from _halve_and_double(number, power, size, unfolded)
    if paired:
        fold_out = Step(receives=[Receive(rank + 1, everything)]), Step([Send(rank - 1, everything)])
        yield fold_out[rank % 2]


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
    everything, lower, upper = range(power), range(power // 2), range(power // 2, power)
    extra = size - power
    paired = rank < 2 * extra
    number = rank - extra if not paired else rank // 2 if rank % 2 == 0 else None
    if paired and rank % 2 == 0:
        yield Step([Send(rank + 1, upper)], [Receive(rank + 1, lower, reduce=True)])
        yield Step(receives=[Receive(rank + 1, upper)])
    elif paired:
        yield Step([Send(rank - 1, lower)], [Receive(rank - 1, upper, reduce=True)])
        yield Step([Send(rank - 1, upper)])
    elif extra:
        yield from (Step(), Step())
    yield from _halve_and_double(number, power, size, _even_unfolded)
    if paired:
        yield Step([Send(rank + 1, everything)]) if rank % 2 == 0 else Step(receives=[Receive(rank - 1, everything)])


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
    number, paired = folded(rank, size), rank < 2 * extra

    def blocks(first: int, last: int) -> range:
        """Of the staying ranks number first to last - 1: two each for those of a pair."""
        return range(first + min(first, extra), last + min(last, extra))

    if paired:
        fold_in = Step([Send(rank + 1, range(size))]), Step(receives=[Receive(rank - 1, range(size), reduce=True)])
        yield fold_in[rank % 2]
    elif extra:
        yield Step()
    for distance in reversed(distances(power)):
        if number is None:
            yield Step()
            continue
        peer = number ^ distance
        mine, theirs = number - number % distance, peer - peer % distance
        yield Step(
            [Send(unfolded(peer, size), blocks(theirs, theirs + distance))],
            [Receive(unfolded(peer, size), blocks(mine, mine + distance), reduce=True)],
        )
    if paired:
        fold_out = Step(receives=[Receive(rank + 1, [rank])]), Step([Send(rank - 1, [rank - 1])])
        yield fold_out[rank % 2]


def reduce_scatter_cost(size: int) -> Cost:
    """Of `reduce_scatter`: exact, with the double blocks of the pairs on the critical path."""
    power = power_below(size)
    if size == power:
        return Cost(floor_log(size), (size - 1) / size, (size - 1) / size)
    halved = sum(distance + min(distance, size - power) for distance in distances(power)) / size
    return Cost(floor_log(size) + 2, 1 + halved + 1 / size, 1 + halved)


def _halve_and_double(number: int | None, power: int, size: int, rank_of: Callable[[int, int], int]) -> Iterator[Step]:
    """All-reduce among those who stay; the others (number None) are idle."""
    if number is None:
        yield from [Step()] * (2 * floor_log(power))
        return
    first, last, way_back = 0, power, []
    for distance in distances(power):
        peer, middle = rank_of(number ^ distance, size), (first + last) // 2
        lower, upper = range(first, middle), range(middle, last)
        kept, sent = (upper, lower) if number & distance else (lower, upper)
        yield Step([Send(peer, sent)], [Receive(peer, kept, reduce=True)])
        way_back.append(Step([Send(peer, kept)], [Receive(peer, sent)]))
        first, last = kept.start, kept.stop
    yield from reversed(way_back)


def _halve_and_double_cost(power: int) -> Cost:
    return Cost(2 * floor_log(power), 2 * (power - 1) / power, (power - 1) / power)


def _even_unfolded(number: int, size: int) -> int:
    """As `unfolded`, where the lower rank of each pair stays."""
    extra = size - power_below(size)
    return 2 * number if number < extra else number + extra
