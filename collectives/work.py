"""The handle of a collective that was started and not yet waited for.

    work = comm.all_reduce_async(gradient, out=gradient)
    ...                                   # compute something else; leave the array alone
    total = work.wait()                   # the array is complete here, and no peer reads or writes it any more

Every rank starts the same operations in the same order; the order of the waits is free.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from dtrain.collectives.dtypes import Array


class Request(Protocol):
    """What a transport returns for an operation under way: the two questions one may ask."""

    def test(self) -> bool:
        """Has it finished? Never waits."""

    def wait(self) -> None:
        """Return when it has finished."""


class Work:
    """An operation under way; `wait` returns its array, `done` says whether `wait` would return at once."""

    def __init__(self, request: Request | None, finish: Callable[[], Array]) -> None:
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


def wait_all(works: Iterable[Work]) -> list[Array]:
    """The results of several works, in their order.

    Cheap for many: the last one is waited for first, and with it all that were started before it on its communicator;
    then the others find that they are finished.
    """
    works = list(works)
    for work in reversed(works):
        work.wait()
    return [work.wait() for work in works]
