"""Trees: data flows from the root to the leaves (broadcast, scatter) or sums to the root (reduce, gather).

    binomial, 8 ranks:           0
                       ┌─────────┼───┐
                       4         2   1        rank v hears from v without its lowest bit
                     ┌─┴─┐       │
                     6   5       3
                     │
                     7

The ranks are counted from the root: v = (rank - root) mod p. Sums keep the order of the ranks when the root is 0.
References: Thakur, Rabenseifner, Gropp 2005 (see `direct.py`); Sanders, Speck, Träff, "Two-tree algorithms for full
bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.doubling import ceil_log, distances, floor_log
from dtrain.collectives.schedules.schedule import NONE, Cost, Receive, Send, Step, span


def broadcast(rank: int, size: int, root: int = 0) -> Iterator[Step]:
    """Who has the vector sends it half of the remaining distance ahead. ⌈lg p⌉(α + nβ)."""
    v = (rank - root) % size
    for distance in reversed(distances(size)):
        to, source = (rank + distance) % size, (rank - distance) % size
        yield Step(
            [Send(to, [0], when=(v % (2 * distance) == 0) & (v + distance < size))],
            [Receive(source, [0], when=v % (2 * distance) == distance)],
        )


def broadcast_cost(size: int) -> Cost:
    """Of `broadcast`."""
    return Cost(ceil_log(size), ceil_log(size))


def reduce(rank: int, size: int, root: int = 0) -> Iterator[Step]:
    """The broadcast backwards: sums of 2, 4, 8, ... neighbours. ⌈lg p⌉(α + nβ + nγ)."""
    v = (rank - root) % size
    for distance in distances(size):
        to, source = (rank - distance) % size, (rank + distance) % size
        yield Step(
            [Send(to, [0], when=v % (2 * distance) == distance)],
            [Receive(source, [0], reduce=True, when=(v % (2 * distance) == 0) & (v + distance < size))],
        )


def reduce_cost(size: int) -> Cost:
    """Of `reduce`."""
    return Cost(ceil_log(size), ceil_log(size), ceil_log(size))


def all_reduce(rank: int, size: int) -> Iterator[Step]:
    """Reduce to rank 0, then broadcast. 2⌈lg p⌉(α + nβ) + ⌈lg p⌉nγ."""
    yield from reduce(rank, size)
    yield from broadcast(rank, size)


def all_reduce_cost(size: int) -> Cost:
    """Of `all_reduce`."""
    return Cost(2 * ceil_log(size), 2 * ceil_log(size), ceil_log(size))


def gather(rank: int, size: int, root: int) -> Iterator[Step]:
    """As `reduce`, but the blocks of the subtree are sent together. ⌈lg p⌉α + n(p-1)/p·β."""
    v = (rank - root) % size
    for distance in distances(size):
        yield Step(
            [Send((rank - distance) % size, _subtree(v, distance, size, root), when=v % (2 * distance) == distance)],
            [
                Receive(
                    (rank + distance) % size,
                    _subtree(v + distance, distance, size, root),
                    when=(v % (2 * distance) == 0) & (v + distance < size),
                )
            ],
        )


def scatter(rank: int, size: int, root: int) -> Iterator[Step]:
    """The gather backwards. ⌈lg p⌉α + n(p-1)/p·β."""
    for step in reversed(list(gather(rank, size, root))):
        yield Step(
            [Send(r.peer, r.chunks, when=r.when) for r in step.receives],
            [Receive(s.peer, s.chunks, when=s.when) for s in step.sends],
        )


def gather_cost(size: int) -> Cost:
    """Of `gather` and `scatter`."""
    return Cost(ceil_log(size), (size - 1) / size)


def _subtree(v: Any, distance: int, size: int, root: int) -> Any:
    """The blocks of the `distance` ranks from v on, as far as there are any; NONE in place of the others."""
    found = span(v, distance)
    return np.where(found < size, (found + root) % size, NONE)


# The double binary tree


def parent(number: int, size: int) -> int | None:
    """In the in-order binary tree of 1 ... size: odd numbers are leaves, the largest power of two is the root."""
    bit = number & -number
    up = (number ^ bit) | (bit << 1)
    return (up if up <= size else number ^ bit) or None


def number_in_tree(rank: int, size: int, tree: int) -> int:
    """The place of a rank in tree 0 (rank + 1) or tree 1 (mirrored for even sizes, shifted by one for odd ones).

    Even in one tree is odd in the other, so no rank is interior in both.
    """
    if tree == 0:
        return rank + 1
    return size - rank if size % 2 == 0 else (rank + 1) % size + 1


def rank_in_tree(number: int, size: int, tree: int) -> int:
    """The rank at this place: the inverse of `number_in_tree`."""
    if tree == 0:
        return number - 1
    return size - number if size % 2 == 0 else (number - 2) % size


def double_tree(rank: int, size: int, segments: int) -> Iterator[Step]:
    """All-reduce: each of two trees sums half of the vector in k segments, one after the other, and sends it back down.

            ┌── 4 ──┐                 ┌── 5 ──┐            rank + 1, 8 ranks: leaves of one tree
          ┌─2─┐   ┌─6─┐             ┌─7─┐   ┌─3─┐          are interior in the other
          1   3   5   7             8   6   4   2

    Segment s leaves depth d upwards in step s + h - d and downwards in step s + h + d, h = ⌊lg p⌋. Chunk t·k + s is
    segment s of tree t. (k-1+2h)(α + n/(2k)·β) where each pair has its own link; the bandwidth term goes to 2nβ where
    a rank has one, the optimum. γ: at most n(k-1+h)/k.
    """
    height = floor_log(size)
    links = [[column[rank] for column in _links(size, tree)] for tree in (0, 1)]

    def inside(segment: Any) -> Any:
        return (0 <= segment) & (segment < segments)

    for t in range(segments - 1 + 2 * height if size > 1 else 0):
        sends, receives = [], []
        for tree, (depth, up, *down) in enumerate(links):
            leaving_up, leaving_down = t - (height - depth), t - (height + depth)
            arriving_up, arriving_down = leaving_up + 1, leaving_down + 1
            chunk = tree * segments
            sends.append(Send(up, [chunk + leaving_up], when=(up != NONE) & inside(leaving_up)))
            receives.append(Receive(up, [chunk + arriving_down], when=(up != NONE) & inside(arriving_down)))
            for child in down:
                summed, passed_on = (child != NONE) & inside(arriving_up), (child != NONE) & inside(leaving_down)
                receives.append(Receive(child, [chunk + arriving_up], reduce=True, when=summed))
                sends.append(Send(child, [chunk + leaving_down], when=passed_on))
        yield Step(sends, receives)


@lru_cache(maxsize=8)
def _links(size: int, tree: int) -> Array:
    """Rows: depth, parent, lower and upper child of every rank in a tree; NONE where there is none."""
    found = np.full((4, size), NONE)
    for number in range(size, 0, -1):
        rank, up = rank_in_tree(number, size, tree), parent(number, size)
        if up is not None:
            found[1, rank] = rank_in_tree(up, size, tree)
            found[2 if number < up else 3, found[1, rank]] = rank
    depth, above = np.zeros(size, int), found[1]
    while (above != NONE).any():
        depth += above != NONE
        above = np.where(above == NONE, NONE, found[1][above])
    found[0] = depth
    return found


def double_tree_cost(size: int, segments: int) -> Cost:
    """Of `double_tree` with a link for each pair; γ is an upper bound."""
    height = floor_log(size)
    if size == 1:
        return Cost(0)
    steps = segments - 1 + 2 * height
    return Cost(steps, steps / (2 * segments), (segments - 1 + height) / segments)
