"""The plain collectives of a transport that has nothing but messages between two ranks.

    all_gather, all_to_all     everyone receives from everyone, then sends to everyone
    broadcast, scatter         the root sends            gather    the root receives
    reductions                 gathered, then added up in the order of the ranks

Each receive is started before anything is sent, so nobody's messages have to be held. The order of sums is that of the
ranks, so results have equal bits everywhere. Started ones are done at once: all ranks come to them in one order.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtrain.collectives.at_once import AtOnce
from dtrain.collectives.dtypes import OPERATIONS, Array, reduce_rows, starts

if TYPE_CHECKING:
    from dtrain.collectives.work import Request

COLLECTIVE_TAG = -1  # users' tags begin at 0


class FromMessages(AtOnce):
    """The half of a transport that `start_send` and `start_recv` suffice for."""

    rank: int
    size: int

    if TYPE_CHECKING:  # what it is made from

        def start_send(self, source: Array, destination: int, tag: int) -> Request: ...

        def start_recv(self, target: Array, source: int, tag: int) -> Request: ...

    def send(self, source: Array, destination: int, tag: int) -> None:
        self.start_send(source, destination, tag).wait()

    def recv(self, target: Array, source: int, tag: int) -> None:
        self.start_recv(target, source, tag).wait()

    def exchange(self, incoming: Iterable[tuple[int, Array]], outgoing: Iterable[tuple[int, Array]]) -> None:
        """Receive from and send to these ranks, at once; what a rank has for itself it has to copy."""
        requests = [self.start_recv(target, rank, COLLECTIVE_TAG) for rank, target in incoming if rank != self.rank]
        requests += [self.start_send(source, rank, COLLECTIVE_TAG) for rank, source in outgoing if rank != self.rank]
        for request in requests:
            request.wait()

    def barrier(self) -> None:
        nothing = np.empty(0, np.uint8)
        everyone = [(rank, nothing) for rank in range(self.size)]
        self.exchange(everyone, everyone)

    def broadcast(self, buffer: Array, root: int) -> None:
        if self.rank == root:
            self.exchange((), ((rank, buffer) for rank in range(self.size)))
        else:
            self.exchange([(root, buffer)], ())

    def all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> None:
        blocks = _blocks(target, counts)
        if not np.shares_memory(blocks[self.rank], source):
            np.copyto(blocks[self.rank], source)
        self.exchange(enumerate(blocks), ((rank, blocks[self.rank]) for rank in range(self.size)))

    def all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        incoming, outgoing = _blocks(target, receive_counts), _blocks(source, send_counts)
        np.copyto(incoming[self.rank], outgoing[self.rank])
        self.exchange(enumerate(incoming), enumerate(outgoing))

    def gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> None:
        if target is None:
            self.exchange((), [(root, source)])
        else:
            blocks = _blocks(target, counts)
            np.copyto(blocks[self.rank], source)
            self.exchange(enumerate(blocks), ())

    def scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> None:
        if source is None:
            self.exchange([(root, target)], ())
        else:
            blocks = _blocks(source, counts)
            np.copyto(target, blocks[self.rank])
            self.exchange((), enumerate(blocks))

    def reduces(self, op: str, source: Array) -> bool:
        return True

    def all_reduce(self, source: Array, target: Array, op: str) -> None:
        everyone = np.empty((self.size, source.size), source.dtype)
        self.all_gather(source, everyone.reshape(-1), [source.size] * self.size)
        reduce_rows(OPERATIONS[op], list(everyone), target)

    def reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> None:
        everyone = np.empty((self.size, target.size), source.dtype)
        self.all_to_all(source, everyone.reshape(-1), counts, [target.size] * self.size)
        reduce_rows(OPERATIONS[op], list(everyone), target)

    def reduce(self, source: Array, target: Array | None, op: str, root: int) -> None:
        everyone = None if target is None else np.empty((self.size, source.size), source.dtype)
        self.gather(source, None if everyone is None else everyone.reshape(-1), [source.size] * self.size, root)
        if target is not None and everyone is not None:
            reduce_rows(OPERATIONS[op], list(everyone), target)

    def scan(self, source: Array, target: Array, op: str, inclusive: bool) -> None:
        everyone = np.empty((self.size, source.size), source.dtype)
        self.all_gather(source, everyone.reshape(-1), [source.size] * self.size)
        if self.rank or inclusive:
            reduce_rows(OPERATIONS[op], list(everyone[: self.rank + inclusive]), target)


def _blocks(flat: Array, counts: Sequence[int]) -> list[Array]:
    return [flat[start : start + count] for start, count in zip(starts(counts), counts, strict=True)]
