"""What this rank has started and not finished, over all communicators split from one world: helped along in every wait.

    rank 0   start w5                all_reduce #6 ......(waits for rank 1 in #6)
    rank 1            start w5   w5.wait() ......(waits until rank 0 has computed its slice of w5)   all_reduce #6

Works in shared memory need the processor of every rank, and most MPI libraries move messages only inside their calls.
Whoever waits therefore computes the slices that are ready and asks after the open requests; otherwise the picture above
would be a deadlock. Invariant: `poll` never waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from dtrain.collectives.waiting import hand_over

if TYPE_CHECKING:
    from dtrain.collectives.work import Request


class Queue(Protocol):
    """Works under way in one communicator's shared memory."""

    def has_pending(self) -> bool:
        """Is a part of this rank still to be computed?"""

    def progress(self) -> None:
        """Compute what is ready; never waits."""


class Progress:
    """The queues and the open requests of one rank."""

    def __init__(self) -> None:
        self.queues: list[Queue] = []
        self._requests: list[Request] = []

    def watch(self, request: Request) -> None:
        """Ask after this request in every wait, until it has finished."""
        self._requests.append(request)

    def busy(self) -> bool:
        """Is there anything to help along?"""
        return bool(self._requests) or any(queue.has_pending() for queue in self.queues)

    def poll(self) -> None:
        """Help everything along; never waits."""
        for queue in self.queues:
            queue.progress()
        if self._requests:
            self._requests = [request for request in self._requests if not request.test()]

    def wait(self, request: Request) -> None:
        """Return when the request has finished; meanwhile the rest goes on."""
        while any(queue.has_pending() for queue in self.queues):
            if request.test():
                break
            self.poll()
            hand_over()
        request.wait()
        if request in self._requests:
            self._requests.remove(request)
