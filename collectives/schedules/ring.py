"""Algorithms on a ring: every rank talks to its two neighbours only, so no link is ever shared.

    step 0     0 ──c0──► 1 ──c1──► 2 ──c2──► 3 ──c3──► (0)      each chunk travels once around and is added up,
    step 1     0 ──c3──► 1 ──c0──► 2 ──c1──► 3 ──c2──► (0)      then once more around as the result

Best bandwidth for long vectors and any number of ranks; latency grows with the number of ranks.
References: Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69, 2009;
Chen et al., "Performance evaluation of allgather algorithms on terascale Linux cluster", 2005 (neighbour exchange).
"""

from collections.abc import Iterator

from dtrain.collectives.schedules.schedule import Cost, Receive, Send, Step


def even(size: int) -> bool:
    """It needs an even number of ranks."""
    return size % 2 == 0 or size == 1


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Reduce-scatter around the ring, then all-gather. 2(p-1)α + 2n(p-1)/p·β + n(p-1)/p·γ.

    After the first half rank r has the sum of chunk r+1.
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        yield Step([Send(right, [(rank - k) % size])], [Receive(left, [(rank - k - 1) % size], reduce=True)])
    for k in range(size - 1):
        yield Step([Send(right, [(rank - k + 1) % size])], [Receive(left, [(rank - k) % size])])


def all_reduce_cost(size: int) -> Cost:
    """Of `all_reduce`."""
    return Cost(2 * (size - 1), 2 * (size - 1) / size, (size - 1) / size)


def segmented_all_reduce(rank: int, size: int, segments: int) -> Iterator[Step]:
    """As `all_reduce`, each block in `segments` chunks (Open MPI's segmented ring): a chunk is added while in cache.

    Chunk c*S + s is segment s of block c. (S+1)(p-1)α + 2n(p-1)/p·β + n(p-1)/p·γ.
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for s in range(segments):
        for k in range(size - 1):
            mine, next_one = (rank - k) % size * segments + s, (rank - k - 1) % size * segments + s
            yield Step([Send(right, [mine])], [Receive(left, [next_one], reduce=True)])
    for k in range(size - 1):
        mine, next_one = (rank - k + 1) % size * segments, (rank - k) % size * segments
        sent, received = ([first + s for s in range(segments)] for first in (mine, next_one))
        yield Step([Send(right, sent)], [Receive(left, received)])


def segmented_all_reduce_cost(size: int, segments: int) -> Cost:
    """Of `segmented_all_reduce`."""
    return Cost((segments + 1) * (size - 1), 2 * (size - 1) / size, (size - 1) / size)


def reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """The first half of the ring, begun one chunk earlier so that rank r ends with block r.

    (p-1)α + n(p-1)/p·(β+γ).
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        yield Step([Send(right, [(rank - k - 1) % size])], [Receive(left, [(rank - k - 2) % size], reduce=True)])


def reduce_scatter_cost(size: int) -> Cost:
    """Of `reduce_scatter`."""
    return Cost(size - 1, (size - 1) / size, (size - 1) / size)


def all_gather(rank: int, size: int) -> Iterator[Step]:
    """Every block travels around the ring. (p-1)α + n(p-1)/p·β."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        yield Step([Send(right, [(rank - k) % size])], [Receive(left, [(rank - k - 1) % size])])


def all_gather_cost(size: int) -> Cost:
    """Of `all_gather`."""
    return Cost(size - 1, (size - 1) / size)


def neighbour_exchange(rank: int, size: int) -> Iterator[Step]:
    """All-gather in half the steps: pairs of blocks go to the left and to the right in turns (even sizes).

        step 0   0═1   2═3   4═5        own blocks
        step 1  (5)0   1═2   3═4   5(0)     the pair that came last
        step 2   0═1   2═3   4═5

    p/2·α + n(p-1)/p·β.
    """
    if size == 1:
        return
    side = 2 * (rank % 2) - 1  # odd ranks go right in odd steps, even ranks left
    pair, pairs = rank // 2, size // 2
    yield Step([Send(rank - side, [rank])], [Receive(rank - side, [rank - side])])
    sent = pair
    for k in range(1, pairs):
        received = (pair + side * (k + 1) // 2 if k % 2 else pair - side * k // 2) % pairs
        peer = (rank + side if k % 2 else rank - side) % size
        yield Step([Send(peer, [2 * sent, 2 * sent + 1])], [Receive(peer, [2 * received, 2 * received + 1])])
        sent = received


def neighbour_exchange_cost(size: int) -> Cost:
    """Of `neighbour_exchange`."""
    return Cost(size // 2, (size - 1) / size)
