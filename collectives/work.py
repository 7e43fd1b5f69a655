"""The handle of a collective that was started and not yet waited for.

    work = comm.all_reduce_async(gradient, out=gradient)
    ...                                   # compute something else; leave the array alone
    total = work.wait()                   # the array is complete here, and no peer reads or writes it any more

Every rank starts the same operations in the same order; the order of the waits is free.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from dtrain.collectives.dtypes import Array
from dtrain.collectives.progress import Progress


class Request(Protocol):
    """What a transport returns for an operation under way: the two questions one may ask."""

    def test(self) -> bool:
        """Has it finished? Never waits."""

    def wait(self) -> None:
        """Return when it has finished."""


class Finished(Request):
    """The request of an operation that is already over."""

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Work:
    """An operation under way; `wait` returns its array, `done` says whether `wait` would return at once."""

    def __init__(self, request: Request | None, finish: Callable[[], Array], what: tuple[object, ...] = ()) -> None:
        """`what`: in words, for reports."""
        self.what = what
        self._request = request
        self._finish = finish
        self._result: Array | None = None

    def done(self) -> bool:
        """True when the operation has finished on this rank. Helps it along, never waits."""
        return self._result is not None or self._request is None or self._request.test()

    def wait(self) -> Array:
        """The result; a second call returns the same array."""
        if self._result is None:
            if self._request is not None:
                self._request.wait()
                self._request = None
            self._result = self._finish()
        return self._result

    def then(self, change: Callable[[Array], Array]) -> "Work":
        """Itself, with `change` of its array as the result."""
        finish = self._finish
        self._finish = lambda: change(finish())
        return self


def wait_all(works: Iterable[Work]) -> list[Array]:
    """The results of several works, in their order.

    Cheap for many: the last one is waited for first, and with it all that were started before it on its communicator;
    then the others find that they are finished.
    """
    works = list(works)
    for work in reversed(works):
        work.wait()
    return [work.wait() for work in works]


class Watched(Request):
    """A request of the transport that is waited for while everything else goes on."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self._request = request
        self._progress = progress

    def test(self) -> bool:
        return self._progress.test(self._request)

    def wait(self) -> None:
        self._progress.wait(self._request)


class Deferred(Request):
    """A collective that runs when it is waited for, after those deferred before it."""

    def __init__(self, run: Callable[[], Array], queue: "deque[Deferred]") -> None:
        self._run = run
        self._queue = queue
        self._finished = False

    def test(self) -> bool:
        return self._finished

    def wait(self) -> None:
        while not self._finished:
            # Taken out first: the collective inside settles the queue, and must not meet itself.
            pending = list(self._queue)
            self._queue.clear()
            for position, deferred in enumerate(pending):
                deferred._run()
                deferred._finished = True
                if deferred is self:
                    self._queue.extend(pending[position + 1 :])
                    break
