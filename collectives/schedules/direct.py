"""Algorithms without forwarding: every block goes from its source to its destination in one message.

    direct      all messages in one step: 0 ⇉ 1, 2, 3      one latency, needs a link to each peer (a full mesh)
    pairwise    in step k to rank r+k, from rank r-k        p-1 latencies, one message in and one out at any time

References: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19, 2005
(pairwise); Huawei HCCL's mesh algorithm. The costs of `direct` count a link of its own for each pair; the simulator
shares the links that a cluster has.
"""

from collections.abc import Iterator

from dtrain.collectives.schedules.schedule import Cost, Receive, Send, Step


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Chunk j to rank j, who adds in the order of the ranks; the sums back to all. 2α + 2n/p·β + n(p-1)/p·γ."""
    yield from reduce_scatter(rank, size)
    yield from all_gather(rank, size)


def all_reduce_cost(size: int) -> Cost:
    """Of `all_reduce`."""
    return Cost(2, 2 / size, (size - 1) / size) if size > 1 else Cost(0)


def reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """Block j to rank j, all at once. α + n/p·β + n(p-1)/p·γ."""
    peers = [(rank + k) % size for k in range(1, size)]
    yield Step([Send(peer, [peer]) for peer in peers], [Receive(peer, [rank], reduce=True) for peer in peers])


def reduce_scatter_cost(size: int) -> Cost:
    """Of `reduce_scatter`."""
    return Cost(1, 1 / size, (size - 1) / size) if size > 1 else Cost(0)


def all_gather(rank: int, size: int) -> Iterator[Step]:
    """My block to all, all at once. α + n/p·β."""
    peers = [(rank + k) % size for k in range(1, size)]
    yield Step([Send(peer, [rank]) for peer in peers], [Receive(peer, [peer]) for peer in peers])


def one_step_cost(size: int) -> Cost:
    """Of one step of messages of n/p bytes: `all_gather`, `all_to_all`, `gather`, `scatter`."""
    return Cost(1, 1 / size) if size > 1 else Cost(0)


def all_to_all(rank: int, size: int) -> Iterator[Step]:
    """Chunk (i, j) = i·p + j from rank i to rank j, all at once. α + n/p·β."""
    peers = [(rank + k) % size for k in range(1, size)]
    yield Step(
        [Send(peer, [rank * size + peer]) for peer in peers],
        [Receive(peer, [peer * size + rank]) for peer in peers],
    )


def gather(rank: int, size: int, root: int) -> Iterator[Step]:
    """Everyone's block to the root at once. α + n/p·β."""
    if rank == root:
        yield Step(receives=[Receive(peer, [peer]) for peer in range(size) if peer != root])
    else:
        yield Step([Send(root, [rank])])


def scatter(rank: int, size: int, root: int) -> Iterator[Step]:
    """Everyone's block from the root at once. α + n/p·β."""
    if rank == root:
        yield Step([Send(peer, [peer]) for peer in range(size) if peer != root])
    else:
        yield Step(receives=[Receive(root, [rank])])


def pairwise_reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """In step k my part of block r+k to its owner. (p-1)α + n(p-1)/p·(β+γ)."""
    for k in range(1, size):
        to, source = (rank + k) % size, (rank - k) % size
        yield Step([Send(to, [to])], [Receive(source, [rank], reduce=True)])


def pairwise_reduce_scatter_cost(size: int) -> Cost:
    """Of `pairwise_reduce_scatter`."""
    return Cost(size - 1, (size - 1) / size, (size - 1) / size)


def pairwise_all_to_all(rank: int, size: int) -> Iterator[Step]:
    """In step k to rank r+k, from rank r-k: no rank is flooded. (p-1)α + n(p-1)/p·β.

    Uneven blocks: (p-1)α + β·Σ_k max_i n(i, i+k), at most.
    """
    for k in range(1, size):
        to, source = (rank + k) % size, (rank - k) % size
        yield Step([Send(to, [rank * size + to])], [Receive(source, [source * size + rank])])


def pairwise_all_to_all_cost(size: int) -> Cost:
    """Of `pairwise_all_to_all`."""
    return Cost(size - 1, (size - 1) / size)
