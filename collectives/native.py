"""What the MPI library moves between all ranks, as the transport asks for it: bytes, blocking and started.

Everything travels as bytes, so every dtype of NumPy is welcome. Counts of MPI are C ints: whatever is longer than
`limit` bytes goes in pieces, or block by block. Works on an mpi4py communicator without importing mpi4py; only
`mpi.py` does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array, starts
from dtrain.collectives.work import Finished, Request

COLLECTIVE_TAG = 32767  # messages inside a collective; the largest tag every MPI has, users' tags stay below


class Moves:
    """The half of the transport over MPI that computes nothing."""

    limit = 1 << 30  # bytes in one MPI call
    rank: int
    size: int
    _comm: Any

    def together(self, requests: list[Any], *buffers: Any) -> Request:
        """Several requests as one, which keeps the buffers alive."""
        raise NotImplementedError

    def send(self, source: Array, destination: int, tag: int) -> None:
        raise NotImplementedError

    def recv(self, target: Array, source: int, tag: int) -> None:
        raise NotImplementedError

    def barrier(self) -> None:
        self._comm.Barrier()

    def broadcast(self, buffer: Array, root: int) -> None:
        for piece in self.pieces(octets(buffer)):
            self._comm.Bcast(piece, root)

    def all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> None:
        item = target.itemsize
        lengths = [count * item for count in counts]
        if sum(lengths) <= self.limit:
            if min(lengths) == max(lengths):
                self._comm.Allgather(octets(source), [octets(target), lengths[0]])
            else:
                self._comm.Allgatherv(octets(source), [octets(target), (lengths, starts(lengths))])
            return
        for root, (start, count) in enumerate(zip(starts(counts), counts, strict=True)):
            block = target[start : start + count]
            if root == self.rank and not np.shares_memory(block, source):
                np.copyto(block, source)
            self.broadcast(block, root)

    def all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        self.start_all_to_all(source, target, send_counts, receive_counts).wait()

    def gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> None:
        lengths = [count * source.itemsize for count in counts]
        if sum(lengths) <= self.limit:
            into = None if target is None else [octets(target), (lengths, starts(lengths))]
            self._comm.Gatherv(octets(source), into, root)
        elif target is None:
            self.send(source, root, COLLECTIVE_TAG)
        else:
            for rank, (start, count) in enumerate(zip(starts(counts), counts, strict=True)):
                if rank == root:
                    np.copyto(target[start : start + count], source)
                else:
                    self.recv(target[start : start + count], rank, COLLECTIVE_TAG)

    def scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> None:
        lengths = [count * target.itemsize for count in counts]
        if sum(lengths) <= self.limit:
            origin = None if source is None else [octets(source), (lengths, starts(lengths))]
            self._comm.Scatterv(origin, octets(target), root)
        elif source is None:
            self.recv(target, root, COLLECTIVE_TAG)
        else:
            for rank, (start, count) in enumerate(zip(starts(counts), counts, strict=True)):
                if rank == root:
                    np.copyto(target, source[start : start + count])
                else:
                    self.send(source[start : start + count], rank, COLLECTIVE_TAG)

    # Non-blocking: what is too long for one call is done at once, where the library could not do it in pieces

    def start_barrier(self) -> Request:
        return self.together([self._comm.Ibarrier()])

    def start_broadcast(self, buffer: Array, root: int) -> Request:
        return self.together([self._comm.Ibcast(piece, root) for piece in self.pieces(octets(buffer))], buffer)

    def start_all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> Request:
        lengths = [count * target.itemsize for count in counts]
        if sum(lengths) > self.limit:
            self.all_gather(source, target, counts)
            return Finished()
        into = [octets(target), (lengths, starts(lengths))]
        return self.together([self._comm.Iallgatherv(octets(source), into)], source, target)

    def start_all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Request:
        # All messages posted at once, as MPI_Alltoallv does; done here because only the two ends of a pair know its
        # length, and with it whether it must go in pieces.
        outgoing, incoming = starts(send_counts), starts(receive_counts)
        requests: list[Any] = []
        for shift in range(1, self.size):
            origin = (self.rank - shift) % self.size
            block = target[incoming[origin] : incoming[origin] + receive_counts[origin]]
            requests += [self._comm.Irecv(piece, origin, COLLECTIVE_TAG) for piece in self.pieces(octets(block))]
        for shift in range(1, self.size):
            to = (self.rank + shift) % self.size
            block = source[outgoing[to] : outgoing[to] + send_counts[to]]
            requests += [self._comm.Isend(piece, to, COLLECTIVE_TAG) for piece in self.pieces(octets(block))]
        here, there = outgoing[self.rank], incoming[self.rank]
        np.copyto(target[there : there + receive_counts[self.rank]], source[here : here + send_counts[self.rank]])
        return self.together(requests, source, target)

    def start_gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> Request:
        lengths = [count * source.itemsize for count in counts]
        if sum(lengths) > self.limit:
            self.gather(source, target, counts, root)
            return Finished()
        into = None if target is None else [octets(target), (lengths, starts(lengths))]
        return self.together([self._comm.Igatherv(octets(source), into, root)], source, target)

    def start_scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> Request:
        lengths = [count * target.itemsize for count in counts]
        if sum(lengths) > self.limit:
            self.scatter(source, target, counts, root)
            return Finished()
        origin = None if source is None else [octets(source), (lengths, starts(lengths))]
        return self.together([self._comm.Iscatterv(origin, octets(target), root)], source, target)

    def start_send(self, source: Array, destination: int, tag: int) -> Request:
        pieces = self.pieces(octets(source))
        return self.together([self._comm.Isend(piece, destination, tag) for piece in pieces], source)

    def start_recv(self, target: Array, source: int, tag: int) -> Request:
        pieces = self.pieces(octets(target))
        return self.together([self._comm.Irecv(piece, source, tag) for piece in pieces], target)

    def pieces(self, flat: Array) -> list[Array]:
        """Bytes in pieces of at most `limit`; an empty one when there is nothing, so that messages pair up."""
        return [flat[start : start + self.limit] for start in range(0, max(1, len(flat)), self.limit)]


def octets(array: Array) -> Array:
    """The bytes of a flat array."""
    return array.view(np.uint8)
