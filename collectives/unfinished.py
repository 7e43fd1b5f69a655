"""Works started in the shared memory of a node and not finished: a part of each is still to be computed by this rank.

    start w5   data published       [ w5 ]            ARRIVED = 5
    start w6   data published       [ w5 w6 ]         ARRIVED = 6
    a wait for anything: the sources of w5 have come  ─►  computed   [ w6 ]   REDUCED = 5

Invariant: parts are computed in the order of the numbers, each by one thread: REDUCED = n speaks for all works up to n.
"""

import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from dtrain.collectives.flags import Peers
from dtrain.collectives.progress import Progress

if TYPE_CHECKING:
    from dtrain.collectives.node import Node

IN_FLIGHT = 64  # far below `records.RING`, so that no record is overwritten that a peer may read


class Pending(Protocol):
    """A work whose part of this rank is still to be computed."""

    number: int
    sources: Peers  # whose data it needs

    def compute(self) -> None:
        """Compute this rank's part; the sources have arrived."""


class Unfinished:
    """The works of one rank in one communicator, in their order; helped along in every wait (`progress.py`)."""

    def __init__(self, node: "Node", together: Progress) -> None:
        self.pending: deque[Pending] = deque()
        self.at_work = False
        """One of them is computed, maybe by the other thread."""
        self.last = 0
        """The number of the last work started."""
        self._node = node
        self._together = together
        self._computing = threading.RLock()  # held by the thread that takes works from `pending`
        together.queues.append(self)

    def close(self) -> None:
        """Take part no more."""
        with self._computing:
            self._together.queues.remove(self)
            self.pending.clear()

    def enqueue(self, work: Pending) -> None:
        """Publish the data of a work; its part is computed later, in the order of the numbers."""
        self.pending.append(work)
        self.last = work.number
        self._node.arrive(work.number)

    def has_pending(self) -> bool:
        """Is a part of this rank still to be computed?"""
        return bool(self.pending)

    def progress(self) -> None:
        """Compute the parts of works whose sources have arrived, unless another thread is at it. Never waits."""
        if self.pending and self._computing.acquire(blocking=False):
            try:
                while self.pending and self._node.have_arrived(self.pending[0].number, self.pending[0].sources):
                    self._compute()
            finally:
                self._computing.release()

    def complete(self, number: int) -> None:
        """Compute the parts of all works up to this number, waiting for the peers where needed."""
        with self._computing:
            while self.pending and self.pending[0].number <= number:
                self._compute()
        self._together.check()

    def _compute(self) -> None:
        work = self.pending[0]
        self._node.await_arrived(work.number, work.sources)
        if not self.pending or self.pending[0] is not work:
            return  # done by `progress` within the wait
        self.at_work = True
        self.pending.popleft()  # first: what fails is not tried again
        work.compute()
        self._node.reduced(work.number)
        self.at_work = False
