"""Started collectives of a transport that has plain ones only: done when started, as all ranks come to them."""

from collections.abc import Sequence

from dtrain.collectives.dtypes import Array
from dtrain.collectives.transport import Transport
from dtrain.collectives.work import Finished, Request


class AtOnce:
    """The part of a transport whose collectives end before they return."""

    def start_all_reduce(self: Transport, source: Array, target: Array, op: str) -> Request:
        self.all_reduce(source, target, op)
        return Finished()

    def start_reduce_scatter(self: Transport, source: Array, target: Array, counts: Sequence[int], op: str) -> Request:
        self.reduce_scatter(source, target, counts, op)
        return Finished()

    def start_all_gather(self: Transport, source: Array, target: Array, counts: Sequence[int]) -> Request:
        self.all_gather(source, target, counts)
        return Finished()

    def start_broadcast(self: Transport, buffer: Array, root: int) -> Request:
        self.broadcast(buffer, root)
        return Finished()

    def start_barrier(self: Transport) -> Request:
        self.barrier()
        return Finished()

    def start_reduce(self: Transport, source: Array, target: Array | None, op: str, root: int) -> Request:
        self.reduce(source, target, op, root)
        return Finished()

    def start_scan(self: Transport, source: Array, target: Array, op: str, inclusive: bool) -> Request:
        self.scan(source, target, op, inclusive)
        return Finished()

    def start_all_to_all(
        self: Transport, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Request:
        self.all_to_all(source, target, send_counts, receive_counts)
        return Finished()

    def start_gather(self: Transport, source: Array, target: Array | None, counts: Sequence[int], root: int) -> Request:
        self.gather(source, target, counts, root)
        return Finished()

    def start_scatter(
        self: Transport, source: Array | None, target: Array, counts: Sequence[int], root: int
    ) -> Request:
        self.scatter(source, target, counts, root)
        return Finished()
