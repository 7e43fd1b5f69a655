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

from dtrain.collectives.schedules.doubling import ceil_log, distances, floor_log
from dtrain.collectives.schedules.schedule import NONE, Cost, Receive, Send, Step


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


def _subtree(v: int, distance: int, size: int, root: int) -> list[int]:
    """The blocks of the `distance` ranks from v on, as far as there are any; NONE in place of the others."""
    return [(i + root) % size * (i < size) + NONE * (i >= size) for i in (v + k for k in range(distance))]


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
    links = [_links(rank, size, tree) for tree in (0, 1)]
    for t in range(segments - 1 + 2 * height if size > 1 else 0):
        sends, receives = [], []
        for tree, (depth, up, down) in enumerate(links):
            leaving_up, arriving_up = t - (height - depth), t - (height - depth - 1)
            leaving_down, arriving_down = t - (height + depth), t - (height + depth - 1)
            if up is not None and 0 <= leaving_up < segments:
                sends.append(Send(up, [tree * segments + leaving_up]))
            if up is not None and 0 <= arriving_down < segments:
                receives.append(Receive(up, [tree * segments + arriving_down]))
            for child in down:
                if 0 <= arriving_up < segments:
                    receives.append(Receive(child, [tree * segments + arriving_up], reduce=True))
                if 0 <= leaving_down < segments:
                    sends.append(Send(child, [tree * segments + leaving_down]))
        yield Step(sends, receives)


def _links(rank: int, size: int, tree: int) -> tuple[int, int | None, list[int]]:
    """Depth, parent and children of a rank in a tree."""
    number = number_in_tree(rank, size, tree)
    up, depth = parent(number, size), 0
    above = up
    while above is not None:
        above, depth = parent(above, size), depth + 1
    half, down = (number & -number) // 2, []
    if half:
        down.append(number - half)
        while half and number + half > size:
            half //= 2
        down += [number + half] if half else []
    children = [rank_in_tree(child, size, tree) for child in down]
    return depth, None if up is None else rank_in_tree(up, size, tree), children


def double_tree_cost(size: int, segments: int) -> Cost:
    """Of `double_tree` with a link for each pair; γ is an upper bound."""
    height = floor_log(size)
    if size == 1:
        return Cost(0)
    steps = segments - 1 + 2 * height
    return Cost(steps, steps / (2 * segments), (segments - 1 + height) / segments)
