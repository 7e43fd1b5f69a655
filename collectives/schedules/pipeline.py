"""Long vectors in pieces: while one chunk is forwarded, the next one arrives.

    chain, 4 ranks, 3 chunks      step    0     1     2     3     4
                              0 → 1       c0    c1    c2
                              1 → 2             c0    c1    c2
                              2 → 3                   c0    c1    c2

The more chunks, the less a rank waits for the first one, and the more latencies are paid: S* = √((p-2)nβ/α).
References: van de Geijn et al., "Building a high-performance collective communication library", SC 1994 (scatter +
all_gather); Träff, "Optimal broadcast schedules in logarithmic time with applications to broadcast, all-broadcast,
reduction and all-reduction", arXiv:2407.18004 (circulant graph).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules import bruck, ring, tree
from dtrain.collectives.schedules.doubling import ceil_log
from dtrain.collectives.schedules.schedule import Cost, Receive, Send, Step


def chain_broadcast(rank: int, size: int, segments: int, root: int) -> Iterator[Step]:
    """From each rank to the next, chunk after chunk. (S+p-2)(α + n/S·β)."""
    v, ahead, behind = (rank - root) % size, (rank + 1) % size, (rank - 1) % size
    sends, receives = v + 1 < size, v > 0
    for t in range(segments + size - 2 if size > 1 else 0):
        out, into = t - v, t - v + 1
        yield Step(
            [Send(ahead, [out], when=sends & (0 <= out) & (out < segments))],
            [Receive(behind, [into], when=receives & (0 <= into) & (into < segments))],
        )


def chain_broadcast_cost(size: int, segments: int) -> Cost:
    """Of `chain_broadcast`."""
    steps = segments + size - 2
    return Cost(steps, steps / segments) if size > 1 else Cost(0)


def chain_reduce(rank: int, size: int, segments: int, root: int) -> Iterator[Step]:
    """The same chain towards the root, adding. (S+p-2)(α + n/S·(β+γ))."""
    v, ahead, behind = (rank - root) % size, (rank - 1) % size, (rank + 1) % size
    sends, receives = v > 0, v + 1 < size
    for t in range(segments + size - 2 if size > 1 else 0):
        into = t - (size - 2 - v)
        out = into - 1
        yield Step(
            [Send(ahead, [out], when=sends & (0 <= out) & (out < segments))],
            [Receive(behind, [into], reduce=True, when=receives & (0 <= into) & (into < segments))],
        )


def chain_reduce_cost(size: int, segments: int) -> Cost:
    """Of `chain_reduce`."""
    steps = segments + size - 2
    return Cost(steps, steps / segments, steps / segments) if size > 1 else Cost(0)


def chain_scan(rank: int, size: int) -> Iterator[Step]:
    """Each rank adds what the one before has. (p-1)(α + nβ + nγ): each vector is sent once."""
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    for t in range(size - 1):
        yield Step([Send(ahead, [0], when=rank == t)], [Receive(behind, [0], reduce=True, when=rank == t + 1)])


def chain_scan_cost(size: int) -> Cost:
    """Of `chain_scan`."""
    return Cost(size - 1, size - 1, size - 1)


def scatter_all_gather(rank: int, size: int, root: int) -> Iterator[Step]:
    """Broadcast: scatter by a binomial tree, then Bruck's all_gather. 2⌈lg p⌉α + 2n(p-1)/p·β."""
    yield from tree.scatter(rank, size, root)
    yield from bruck.all_gather(rank, size)


def scatter_all_gather_cost(size: int) -> Cost:
    """Of `scatter_all_gather`."""
    return Cost(2 * ceil_log(size), 2 * (size - 1) / size)


def scatter_ring(rank: int, size: int, root: int) -> Iterator[Step]:
    """Broadcast: scatter by a binomial tree, then all_gather on a ring. (⌈lg p⌉+p-1)α + 2n(p-1)/p·β."""
    yield from tree.scatter(rank, size, root)
    yield from ring.all_gather(rank, size)


def scatter_ring_cost(size: int) -> Cost:
    """Of `scatter_ring`."""
    return Cost(ceil_log(size) + size - 1, 2 * (size - 1) / size)


def circulant_broadcast(rank: int, size: int, segments: int, root: int) -> Iterator[Step]:
    """In each round every rank sends a chunk one skip ahead and receives another. (k-1+⌈lg p⌉)(α + n/k·β), any p.

    Skips ⌈p/2^q⌉, ..., ⌈p/2⌉ in turns. Which chunk comes in which round says `_receives`; what a rank sends is what the
    rank ahead receives. No broadcast of k chunks needs fewer rounds.
    """
    v, rounds = (rank - root) % size, ceil_log(size)
    ahead = bruck.skips(size)[:0:-1]  # smallest first
    mine = _received(v, size, segments)
    theirs = [_received((v + skip) % size, size, segments) for skip in ahead]
    idle = -(segments - 1) % rounds if rounds else 0  # so that the last round uses the largest skip
    for t in range(segments - 1 + rounds if rounds else 0):
        skip = ahead[(t + idle) % rounds]
        sent, received = theirs[(t + idle) % rounds][t], mine[t]
        yield Step(
            [Send((rank + skip) % size, [sent], when=sent >= 0)],
            [Receive((rank - skip) % size, [received], when=received >= 0)],
        )


def _received(v: Any, size: int, segments: int) -> Array:
    """`_receives` of one rank, or of all that are in an array: shape (rounds,) or (rounds, ranks)."""
    return np.array([_receives(int(u), size, segments) for u in np.ravel(v)]).T.reshape(-1, *np.shape(v))


@lru_cache(maxsize=1 << 13)  # every rank asks for those of its neighbours
def _receives(v: int, size: int, segments: int) -> list[int]:
    """The chunk that rank v (counted from the root) receives in each round; -1: none."""
    rounds = ceil_log(size)
    total = segments - 1 + rounds
    if v == 0:
        return [-1] * total  # the root has all
    blocks = _receive_schedule(v, size)
    idle = -(segments - 1) % rounds
    found: list[int] = []
    for i in range(idle, idle + total):
        chunk = min(blocks[i % rounds] + i // rounds * rounds - idle, segments - 1)
        found.append(chunk if chunk >= 0 and chunk not in found else -1)  # numbers past the end all mean the last chunk
    return found


def _receive_schedule(v: int, size: int) -> list[int]:
    """For each round of a cycle the chunk that arrives, relative to those of the next cycle: the paper's algorithm.

    A depth-first search over the ways from the root to v along ever smaller skips; each way stands for the chunk that
    the root sent with its first skip, and no two rounds may bring the same one.
    """
    skip = [*bruck.skips(size)[:0:-1], size]
    rounds = len(skip) - 1
    found = [0] * rounds
    left = list(range(rounds, -1, -1))  # skips not yet used, largest first; `rounds` stands for the root itself

    rest = v
    for own in range(rounds - 1, -1, -1):
        if skip[own] == rest:
            break
        if skip[own] < rest:
            rest -= skip[own]
    left.remove(own)

    def search(at: int, below: int, first: int, k: int) -> int:
        for e in [e for e in left if e <= first]:
            if e not in left or k == rounds:
                continue
            if at + skip[e] <= size + v - skip[k] and at + skip[e] < below:
                if at + skip[e] <= size + v - skip[k + 1]:
                    k = search(at + skip[e], below, e, k)
                if k == rounds or at > size + v - skip[k + 1]:
                    return k
                below = at + skip[e]
                found[k] = e
                k += 1
                left.remove(e)
        return k

    search(0, 2 * size, rounds, 0)
    return [own if e == rounds else e - rounds for e in found]


def circulant_broadcast_cost(size: int, segments: int) -> Cost:
    """Of `circulant_broadcast`."""
    steps = segments - 1 + ceil_log(size)
    return Cost(steps, steps / segments) if size > 1 else Cost(0)
