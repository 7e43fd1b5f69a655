"""Zero-copy collectives on arrays in the arena: the owner of a slice reads it from all ranks and writes the result.

    all_reduce in place, 3 ranks          reads                 writes
      part of rank 0   | s0 | s1 | s2 |   rank 1 reads s1       the sum into s1
      part of rank 1   | s0 | s1 | s2 |   of all parts, in      of all parts, while the block
      part of rank 2   | s0 | s1 | s2 |   blocks, in order      is in its cache

Two synchronisations, whatever the size: everybody has brought data (ARRIVED), everybody has written his slice
(REDUCED). Memory traffic for n bytes on p ranks: 2pn in place, (p+1)n for one shared result, pn + n for
reduce_scatter; staging through private copies costs 5pn, point-to-point algorithms 7 to 11 (p-1)n. Blocks must be
done in one go: a second pass over the vector to copy the result out loses all of the gain. Invariant: each element is
the sum in rank order, computed once by its owner: equal bits on all ranks, in all layouts of slices and buckets.
Idea: direct-load reductions as in XHC, YHCCL (SC 23), DPML (SC 17).
"""

from collections.abc import Callable, Sequence

from dtrain.collectives.arena import Place
from dtrain.collectives.dtypes import OPERATIONS, Array
from dtrain.collectives.flags import Peers
from dtrain.collectives.node import Node
from dtrain.collectives.records import NO_PLACE
from dtrain.collectives.sums import owned, reduce_in_place, reduce_into


class WindowWork:
    """A collective in the window under way: `compute` does this rank's part, once, when the sources have arrived.

    `sources` are the peers whose data this rank reads, `users` those that read or write its own: all by default.
    """

    def __init__(
        self,
        node: Node,
        number: int,
        compute: Callable[[], None],
        sources: Peers | None = None,
        users: Peers | None = None,
    ) -> None:
        self.number = number
        self.sources = node.peers if sources is None else sources
        self._users = node.peers if users is None else users
        self._node = node
        self._compute = compute
        node.works.enqueue(self)

    def compute(self) -> None:
        """This rank's part."""
        self._compute()

    def test(self) -> bool:
        """Has everybody finished? Computes this rank's parts of the works that are ready; never waits."""
        if self._node.closed:
            return True
        self._node.works.progress()
        return self._node.have_reduced(self.number, self._users)

    def wait(self) -> None:
        """Return when everybody has finished with my array."""
        if self._node.closed:
            return
        self._node.works.complete(self.number)
        self._node.works.progress()
        self._node.await_reduced(self.number, self._users)


def start_all_reduce(node: Node, source: Array, place: Place, op: str) -> WindowWork:
    """All ranks' arrays at this place become their sum."""
    parts = node.arena.parts(place, source.size, source.dtype)
    start, stop = owned(source.size, node.rank, node.size)
    number = node.begin("all_reduce", "window", op, source, place)
    return WindowWork(node, number, lambda: reduce_in_place(OPERATIONS[op], parts, start, stop))


def start_reduce_scatter(
    node: Node, source: Array, place: Place, target: Array, counts: Sequence[int], op: str
) -> WindowWork:
    """Target (counts[rank],), anywhere, becomes the sum of all ranks' blocks `rank`; target may be my own block."""
    parts = node.arena.parts(place, source.size, source.dtype)
    start = sum(counts[: node.rank])
    stop = start + counts[node.rank]
    number = node.begin("reduce_scatter", "window", op, source, place, hash(tuple(counts)))
    return WindowWork(node, number, lambda: reduce_into(OPERATIONS[op], parts, start, stop, [target]))


def start_reduce(
    node: Node, source: Array, place: Place, target: Array | None, at: Place | None, op: str, root: int
) -> WindowWork:
    """Target on root = the sum of all ranks' arrays at this place; `at`: the place of root's target.

    Where root's target lies in the window (it may be root's source), every rank adds up its slice straight into it;
    otherwise root adds up everything.
    """
    count = source.size
    parts = node.arena.parts(place, count, source.dtype)
    start, stop = owned(count, node.rank, node.size)
    aside = NO_PLACE if at is None else at
    number = node.begin("reduce", "window", op, source, place, root, aside)

    def compute() -> None:
        goal = node.aside(root, number) if node.rank != root else at
        if goal is not None:
            result = node.arena.part(root, goal, count, source.dtype)[start:stop]
            reduce_into(OPERATIONS[op], parts, start, stop, [result])
        elif target is not None:
            reduce_into(OPERATIONS[op], parts, 0, count, [target])

    return WindowWork(node, number, compute)
