"""What this rank has started and not finished, over all communicators split from one world: helped along in every wait.

    rank 0   start w5                all_reduce #6 ......(waits for rank 1 in #6)
    rank 1            start w5   w5.wait() ......(waits until rank 0 has computed its slice of w5)   all_reduce #6

Works in shared memory need the processor of every rank, and most MPI libraries move messages only inside their calls.
Whoever waits therefore computes the slices that are ready and asks after the open requests; otherwise the picture above
would be a deadlock. Where it pays, a thread does the same while the rank computes (`background.py`).

Invariants: `poll` never waits. A request is asked after by one thread at a time (MPI forbids two), and a slice is
computed by one: whoever does not get the lock leaves it to the one who has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import ref

from dtrain.collectives.waiting import LIMIT, YIELD_SECONDS, hand_over, nap

if TYPE_CHECKING:
    from dtrain.collectives.background import Background
    from dtrain.collectives.desync import Letters
    from dtrain.collectives.group import Group
    from dtrain.collectives.watchdog import Watchdog
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
        self.background: Background | None = None
        self.letters: Letters | None = None
        self.watchdog: Watchdog | None = None
        self.failure: BaseException | None = None  # of the thread, raised where this rank waits
        self.crowded = False  # more ranks than cores
        self._requests: list[Request] = []
        self._groups: list[ref[Group]] = []  # never changed, but replaced: another thread may be reading it
        self._lock = threading.Lock()

    def join(self, group: Group) -> None:
        """One more communicator."""
        self._groups = [*(each for each in self._groups if each() is not None), ref(group)]

    def groups(self) -> list[Group]:
        """All communicators that somebody still has."""
        return [group for each in self._groups if (group := each()) is not None]

    def watch(self, request: Request) -> None:
        """Ask after this request in every wait, until it has finished."""
        with self._lock:
            self._requests.append(request)

    def wake(self) -> None:
        """Something was started: the thread, if there is one, sees to it."""
        if self.background is not None:
            self.background.wake()

    def busy(self) -> bool:
        """Is there anything to help along?"""
        return bool(self._requests) or any(queue.has_pending() for queue in tuple(self.queues))

    def poll(self) -> None:
        """Help everything along; never waits."""
        for queue in tuple(self.queues):
            queue.progress()
        if self._requests and self._lock.acquire(blocking=False):
            try:
                self._requests = [request for request in self._requests if not request.test()]
            finally:
                self._lock.release()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self.failure is not None and (self.background is None or not self.background.is_me()):
            raise self.failure

    def tell(self, ranks: list[int]) -> list[str]:
        """What these ranks of the world are doing, for the report of who waits for them too long."""
        return [LIMIT] if self.watchdog is None else self.watchdog.tell(ranks)

    def test(self, request: Request) -> bool:
        """Has the request finished? Never waits."""
        with self._lock:
            finished = request.test()
            if finished and request in self._requests:  # whoever asks may never wait
                self._requests.remove(request)
            return finished

    def wait(self, request: Request) -> None:
        """Return when the request has finished; meanwhile the rest goes on."""
        while any(queue.has_pending() for queue in tuple(self.queues)):
            if self.test(request):
                break
            self.poll()
            hand_over()
        with self._lock:  # from here on it is this thread's alone
            if request in self._requests:
                self._requests.remove(request)
        if self.crowded:  # inside its calls the MPI library spins on the core that the sender needs
            _patiently(request.test)
        request.wait()
        self.check()


def _patiently(done: Callable[[], bool]) -> None:
    """Return when done() says so: looks between which other processes run, then naps.

    Here and not in `waiting.py`: without a limit of its own, the watchdog must see it, as a call of the library.
    """
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited < YIELD_SECONDS:
            hand_over()
        else:
            time.sleep(nap(waited))
