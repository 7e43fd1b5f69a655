"""Recursive doubling: after step k every rank knows the chunks, or the sum, of 2^(k+1) ranks.

    0 ═ 1   2 ═ 3   4 ═ 5   6 ═ 7      distance 1
    0 ═════ 2   1 ═════ 3   ...        distance 2
    0 ═════════════ 4   ...            distance 4

Fewest steps; with sums the whole vector in each, so for short vectors.
References: Thakur, Rabenseifner, Gropp 2005 (see `direct.py`); Hillis & Steele, "Data parallel algorithms", CACM 29,
1986 (scan); Hensgen, Finkel, Manber, "Two algorithms for barrier synchronization", 1988 (dissemination).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.schedules.schedule import Cost, Fold, Receive, Send, Step, span


def power_of_two(size: int) -> bool:
    """It needs a power of two."""
    return size & (size - 1) == 0


def floor_log(size: int) -> int:
    """⌊log2 size⌋."""
    return size.bit_length() - 1


def ceil_log(size: int) -> int:
    """⌈log2 size⌉, and 0 for no rank at all."""
    return (size - 1).bit_length() if size > 0 else 0


def distances(size: int) -> list[int]:
    """1, 2, 4, ... below size: ⌈log2 size⌉ of them."""
    return [1 << k for k in range(ceil_log(size))]


class Folded(NamedTuple):
    """What folding makes of a rank, or of the array of all ranks; see `folded`."""

    number: Any  # among those that stay
    lower: Any  # of a pair
    upper: Any
    alone: Any


def folded(rank: Any, size: int) -> Folded:
    """Where neighbours are paired, 0+1, 2+3, ..., until 2^⌊log p⌋ ranks are left: one of each pair stays."""
    extra = size - (1 << floor_log(size))
    paired, odd = rank < 2 * extra, rank % 2 == 1
    return Folded(np.maximum(rank // 2, rank - extra), paired & (rank % 2 == 0), paired & odd, rank >= 2 * extra)


def unfolded(number: Any, size: int) -> Any:
    """The rank that is `number` among those that stay, where the upper rank of each pair does, as in MPICH.

    It has the sum of both in the order of the ranks.
    """
    return np.minimum(2 * number + 1, number + size - (1 << floor_log(size)))


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Exchange the whole vector with partners 1, 2, 4, ... away. ⌈lg p⌉(α + nβ + nγ) for powers of two.

    Others fold first: (⌊lg p⌋+2)(α + nβ) + (⌊lg p⌋+1)nγ.

        5 ranks:   0→1   then 1,2,3,4 among themselves, then   1→0
    """
    power = 1 << floor_log(size)
    number, lower, upper, alone = folded(rank, size)
    if size > power:
        yield Step([Send(rank + 1, [0], when=lower)], [Receive(rank - 1, [0], reduce=True, when=upper)])
    for distance in distances(power):
        peer, stays = unfolded(number ^ distance, size), upper | alone
        yield Step([Send(peer, [0], when=stays)], [Receive(peer, [0], reduce=True, when=stays)])
    if size > power:
        yield Step([Send(rank - 1, [0], when=upper)], [Receive(rank + 1, [0], when=lower)])


def all_reduce_cost(size: int) -> Cost:
    """Of `all_reduce`."""
    steps = floor_log(size)
    return Cost(steps, steps, steps) if power_of_two(size) else Cost(steps + 2, steps + 2, steps + 1)


def all_gather(rank: int, size: int) -> Iterator[Step]:
    """Exchange all blocks known so far with partners 1, 2, 4, ... away (powers of two). lg p·α + n(p-1)/p·β."""
    for distance in distances(size):
        peer = rank ^ distance
        mine, theirs = rank - rank % distance, peer - peer % distance
        yield Step([Send(peer, span(mine, distance))], [Receive(peer, span(theirs, distance))])


def all_gather_cost(size: int) -> Cost:
    """Of `all_gather`, and of every all-gather in ⌈lg p⌉ steps."""
    return Cost(ceil_log(size), (size - 1) / size)


def scan(rank: int, size: int) -> Iterator[Step]:
    """My sum so far to rank r+1, r+2, r+4, ...; what comes is of ranks before mine. ⌈lg p⌉(α + nβ + nγ)."""
    for distance in distances(size):
        yield Step(
            [Send(rank + distance, [0], when=rank + distance < size)],
            [Receive(rank - distance, [0], reduce=True, when=rank >= distance)],
        )


def scan_cost(size: int) -> Cost:
    """Of `scan`."""
    return Cost(ceil_log(size), ceil_log(size), ceil_log(size))


def exscan(rank: int, size: int) -> Iterator[Step]:
    """Everything moves one rank up, then `scan` without rank 0. (1+⌈lg(p-1)⌉)(α + nβ) + ⌈lg(p-1)⌉nγ.

    Place 1 keeps the rank's own vector while its neighbour's arrives in place 0.
    """
    if size == 1:
        return
    yield Step(folds=[Fold(1, [0])])
    yield Step([Send(rank + 1, [1], when=rank + 1 < size)], [Receive(rank - 1, [0], when=rank > 0)])
    for distance in distances(size - 1):
        yield Step(
            [Send(rank + distance, [0], when=(rank > 0) & (rank + distance < size))],
            [Receive(rank - distance, [0], reduce=True, when=rank > distance)],
        )


def exscan_cost(size: int) -> Cost:
    """Of `exscan`."""
    steps = ceil_log(size - 1)
    return Cost(steps + 1, steps + 1, steps) if size > 1 else Cost(0)


def dissemination(rank: int, size: int) -> Iterator[Step]:
    """Barrier: in step k tell rank r + 2^k that you, and all who told you, have come. ⌈lg p⌉α."""
    for distance in distances(size):
        yield Step(
            [Send((rank + distance) % size, [0])],
            [Receive((rank - distance) % size, [0], reduce=True)],
        )


def dissemination_cost(size: int) -> Cost:
    """Of `dissemination`."""
    return Cost(ceil_log(size))
