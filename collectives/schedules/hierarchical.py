"""Two levels: first inside the nodes, then between them, then inside again.

    node 0            node 1
    0 1 2 3           4 5 6 7       1. reduce-scatter on a ring inside each node: rank l of it has slice l of g
    │ │ │ └───────────┼─┼─┼─┘       2. all-reduce of slice l on a ring over the nodes: all g ranks of a node drive the
    │ │ └─────────────┼─┼─┘            network at once, each with n/g bytes
    └─┴── ...         4 5           3. all-gather inside each node

Inter-node bytes per rank: 2(N-1)/N·n/g for N nodes of g ranks. Reference: the hierarchical all_reduce of NCCL, HCCL and
MSCCL ("hierarchical"); Jia et al., "Highly scalable deep learning training system with mixed-precision", 2018.
"""

from collections.abc import Iterator
from math import isqrt
from typing import Any

from dtrain.collectives.schedules.schedule import Cost, Receive, Send, Step, span


def ranks_per_node(size: int, local: int) -> int:
    """`local` where it divides size; 0: the largest divisor of size up to its root."""
    if local == 0:
        return next(g for g in range(isqrt(size), 0, -1) if size % g == 0)
    if local < 0 or size % local:
        raise ValueError(f"hierarchical: local={local}: {size} ranks cannot be cut into nodes of so many; or 0: choose")
    return local


def all_reduce(rank: int, size: int, local: int) -> Iterator[Step]:
    """Ranks l, l+g, ... share slice l, which has N chunks: chunk l·N + c.

    2(g-1)α_i + 2n(g-1)/g·β_i + n(g-1)/g·γ inside, 2(N-1)α_e + 2n(N-1)/(gN)·β_e + n(N-1)/(gN)·γ between.
    """
    g = ranks_per_node(size, local)
    nodes = size // g
    node, me = rank // g, rank % g
    right, left = node * g + (me + 1) % g, node * g + (me - 1) % g
    across, back = (rank + g) % size, (rank - g) % size

    def whole(l: Any) -> Any:  # noqa: E741
        return span(l % g * nodes, nodes)

    def piece(c: int) -> list[int]:
        return [me * nodes + c % nodes]

    for k in range(g - 1):
        yield Step([Send(right, whole(me - k - 1))], [Receive(left, whole(me - k - 2), reduce=True)])
    for k in range(nodes - 1):
        yield Step([Send(across, piece(node - k))], [Receive(back, piece(node - k - 1), reduce=True)])
    for k in range(nodes - 1):
        yield Step([Send(across, piece(node - k + 1))], [Receive(back, piece(node - k))])
    for k in range(g - 1):
        yield Step([Send(right, whole(me - k))], [Receive(left, whole(me - k - 1))])


def all_reduce_cost(size: int, local: int) -> Cost:
    """Of `all_reduce` where both levels have equal links."""
    g = ranks_per_node(size, local)
    nodes = size // g
    added = (g - 1) / g + (nodes - 1) / size
    return Cost(2 * (g - 1) + 2 * (nodes - 1), 2 * added, added)
