"""Bruck's algorithms: ⌈lg p⌉ steps for any number of ranks, on a circle where step k reaches 2^k (or p/2^k) ahead.

    all_gather, 5 ranks    0 ◄── 1                from r+1: 1 block      0 has 0 1
    (every rank as 0)      0 ◄────── 2            from r+2: 2 blocks     0 1 2 3
                           0 ◄────────────── 4    from r+4: the 1 that is missing

References: Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems",
TPDS 8, 1997; Träff, "Optimal, non-pipelined reduce-scatter and allreduce algorithms", arXiv:2410.14234 (circulant);
HCCL's "nonuniform hierarchical ring" (nhr), whose way is also that of NCCL's "parallel aggregated trees" (PAT).
"""

from collections.abc import Iterator
from itertools import pairwise

from dtrain.collectives.schedules.doubling import ceil_log, distances
from dtrain.collectives.schedules.schedule import Cost, Fold, Receive, Send, Step


def all_gather(rank: int, size: int) -> Iterator[Step]:
    """All blocks known so far to rank r - 2^k. ⌈lg p⌉α + n(p-1)/p·β.

    The blocks lie where they belong from the start, so Bruck's final rotation is not needed.
    """
    yield from _gather(rank, size, place=0)


def gather_reduce(rank: int, size: int) -> Iterator[Step]:
    """All-reduce by gathering all vectors and adding them locally. ⌈lg p⌉α + (p-1)n(β+γ): tiny vectors only.

    Places 1 to p are scratch: rank i's vector in place i + 1. Everyone adds in the order of the ranks, so all results
    have the same bits.
    """
    yield Step(folds=[Fold(1 + rank, [0])])
    yield from _gather(rank, size, place=1)
    yield Step(folds=[Fold(0, [1 + i for i in range(size)])])


def _gather(rank: int, size: int, place: int) -> Iterator[Step]:
    for distance in distances(size):
        count = min(distance, size - distance)
        yield Step(
            [Send((rank - distance) % size, [(rank + i) % size + place for i in range(count)])],
            [Receive((rank + distance) % size, [(rank + distance + i) % size + place for i in range(count)])],
        )


def gather_reduce_cost(size: int) -> Cost:
    """Of `gather_reduce`."""
    return Cost(ceil_log(size), size - 1, size - 1)


def all_to_all(rank: int, size: int) -> Iterator[Step]:
    """A block that must go i ranks ahead takes a hop of 2^k for each bit k of i. ⌈lg p⌉α + (n/p)·Σ_i bits(i)·β.

    That is n/2·lg p·β for powers of two. Chunk (i, j) = i·p + j goes from rank i to rank j; each keeps its name on the
    way, so that blocks of uneven lengths can travel.
    """
    for distance in distances(size):
        hops = [i for i in range(size) if i & distance]

        def chunks(holder: int, hops: list[int] = hops, distance: int = distance) -> list[int]:
            origins = [(i, (holder - i % distance) % size) for i in hops]
            return [origin * size + (origin + i) % size for i, origin in origins]

        source = (rank - distance) % size
        yield Step([Send((rank + distance) % size, chunks(rank))], [Receive(source, chunks(source))])


def all_to_all_cost(size: int) -> Cost:
    """Of `all_to_all`."""
    return Cost(ceil_log(size), sum(i.bit_count() for i in range(size)) / size)


def skips(size: int) -> list[int]:
    """The distances of the circulant graph: p, ⌈p/2⌉, ⌈p/4⌉, ..., 1."""
    found = [size]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)
    return found


def circulant_reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """Sums for the far half of the circle go to the rank half way, and so on. ⌈lg p⌉α + n(p-1)/p·(β+γ), any p.

    5 ranks:   blocks r+3, r+4 to rank r+3    block r+2 to rank r+2    block r+1 to rank r+1
    """
    spans = skips(size)
    for span, skip in pairwise(spans):
        yield Step(
            [Send((rank + skip) % size, [(rank + i) % size for i in range(skip, span)])],
            [Receive((rank - skip) % size, [(rank + i) % size for i in range(span - skip)], reduce=True)],
        )


def circulant_reduce_scatter_cost(size: int) -> Cost:
    """Of `circulant_reduce_scatter`."""
    return Cost(ceil_log(size), (size - 1) / size, (size - 1) / size)


def circulant_all_reduce(rank: int, size: int) -> Iterator[Step]:
    """`circulant_reduce_scatter` and the same way back. 2⌈lg p⌉α + 2n(p-1)/p·β + n(p-1)/p·γ, any p: all three optimal
    for a reduce-scatter with an all-gather."""
    yield from circulant_reduce_scatter(rank, size)
    spans = skips(size)[::-1]
    for skip, span in pairwise(spans):
        yield Step(
            [Send((rank - skip) % size, [(rank + i) % size for i in range(span - skip)])],
            [Receive((rank + skip) % size, [(rank + i) % size for i in range(skip, span)])],
        )


def circulant_all_reduce_cost(size: int) -> Cost:
    """Of `circulant_all_reduce`."""
    return Cost(2 * ceil_log(size), 2 * (size - 1) / size, (size - 1) / size)


def nhr_reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """A block that must go i ranks ahead takes a hop of 2^k for each bit k of i, and meets others on the way that it is
    added to. ⌈lg p⌉α + n(p-1)/p·(β+γ), any p, and the longest hops carry least: where far is slow, as between racks.

    5 ranks:   blocks r+1, r+3 to rank r+1    block r+2 to rank r+2    block r+4 to rank r+4
    """
    for distance in distances(size):
        further = range(0, size - distance, 2 * distance)
        yield Step(
            [Send((rank + distance) % size, [(rank + distance + i) % size for i in further])],
            [Receive((rank - distance) % size, [(rank + i) % size for i in further], reduce=True)],
        )


def nhr_all_gather(rank: int, size: int) -> Iterator[Step]:
    """The way back of `nhr_reduce_scatter`: own block far first, in the end many blocks near. ⌈lg p⌉α + n(p-1)/p·β."""
    for distance in reversed(distances(size)):
        further = range(0, size - distance, 2 * distance)
        yield Step(
            [Send((rank - distance) % size, [(rank + i) % size for i in further])],
            [Receive((rank + distance) % size, [(rank + distance + i) % size for i in further])],
        )


def nhr_all_reduce(rank: int, size: int) -> Iterator[Step]:
    """There and back. 2⌈lg p⌉α + 2n(p-1)/p·β + n(p-1)/p·γ, any p."""
    yield from nhr_reduce_scatter(rank, size)
    yield from nhr_all_gather(rank, size)
