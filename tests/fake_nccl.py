"""NCCL between threads: every call is compared with those of the other ranks, then done with NumPy.

Refused with an error, where the real thing would hang, crash or deliver rubbish: pointers outside of an allocation or
on another GPU, counts, types and roots that differ, buffers that overlap otherwise than NCCL allows, messages that
nobody receives, unknown streams, numbers that are no ints.
"""

import bisect
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fake_cuda import DTYPES, OPS, Stream, allocations, local, lock, starts

WAIT = 20.0  # seconds for the other ranks


class NcclError(RuntimeError):
    pass


class _Room:
    """What the ranks of one NCCL communicator share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.table: list[Any] = [None] * size
        # All of them now: two threads that ask a defaultdict for a missing one at the same time may get two.
        self.mail: dict[tuple[int, int], queue.Queue[Any]] = {
            pair: queue.Queue() for pair in itertools.product(range(size), repeat=2)
        }
        self.gpus: set[int] = set()
        self.ranks: set[int] = set()


_rooms: dict[tuple[int, ...], _Room] = {}


def get_version() -> int:
    return 21903


def get_unique_id() -> tuple[int, ...]:
    with lock:
        number = len(_rooms) + 1
        name = tuple([-128, 127, number % 100, number // 100] + [0] * 124)
        _rooms[name] = None  # type: ignore[assignment]
    return name


def groupStart() -> None:
    if local.group is not None:
        raise NcclError("groups are not nested here")
    local.group = []


def groupEnd() -> None:
    group, local.group = local.group, None
    if group is None:
        raise NcclError("groupEnd without groupStart")
    if group:
        communicators = {id(entry[0]) for entry in group}
        streams = {entry[-1] for entry in group}
        if len(communicators) > 1 or len(streams) > 1:
            raise NcclError("one communicator and one stream per group are enough here")
        entries = [entry[1:-1] for entry in group]
        Stream.known[streams.pop()].give(lambda: group[0][0]._messages(entries))


class NcclCommunicator:
    def __init__(self, ndev: int, commId: tuple[int, ...], rank: int) -> None:
        assert type(ndev) is int and type(rank) is int and type(commId) is tuple and len(commId) == 128
        if commId not in _rooms:
            raise NcclError("no such unique id")
        with lock:
            room = _rooms[commId] = _rooms[commId] or _Room(ndev)
            if room.size != ndev or rank in room.ranks or not 0 <= rank < ndev:
                raise NcclError(f"rank {rank} of {ndev}: there are {room.ranks} of {room.size} already")
            if local.gpu in room.gpus:
                raise NcclError(f"Duplicate GPU detected: rank {rank} on GPU {local.gpu}")
            room.ranks.add(rank)
            room.gpus.add(local.gpu)
        self._room, self._rank, self._gpu = room, rank, local.gpu
        self._alive = True
        room.barrier.wait(WAIT)

    def destroy(self) -> None:
        self._alive = False

    # Collectives: (name, what must be equal on all ranks), my memory, what to do with the memory of all

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, op, stream)
        source, target = self._memory(sendbuf, count, datatype), self._memory(recvbuf, count, datatype)
        _disjoint_or(source, target, sendbuf == recvbuf)
        total = lambda all_: _sum(op, all_)  # noqa: E731
        self._give(stream, ("allReduce", count, datatype, op), source, target, total)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, op, root, stream)
        source = self._memory(sendbuf, count, datatype)
        target = self._memory(recvbuf, count, datatype) if self._rank == root else None
        if target is not None:
            _disjoint_or(source, target, sendbuf == recvbuf)
        total = lambda all_: _sum(op, all_)  # noqa: E731
        self._give(stream, ("reduce", count, datatype, op, root), source, target, total)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, recvcount, datatype, op, stream)
        source = self._memory(sendbuf, recvcount * self._room.size, datatype)
        target = self._memory(recvbuf, recvcount, datatype)
        mine = slice(self._rank * recvcount, (self._rank + 1) * recvcount)
        _disjoint_or(source, target, recvbuf == sendbuf + self._rank * target.nbytes)
        total = lambda all_: _sum(op, all_)[mine]  # noqa: E731
        self._give(stream, ("reduceScatter", recvcount, datatype, op), source, target, total)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._check(sendbuff, recvbuff, count, datatype, root, stream)
        source = self._memory(sendbuff, count, datatype) if self._rank == root else None
        target = self._memory(recvbuff, count, datatype)
        self._give(stream, ("broadcast", count, datatype, root), source, target, lambda all_: all_[root])

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, stream)
        source = self._memory(sendbuf, count, datatype)
        target = self._memory(recvbuf, count * self._room.size, datatype)
        _disjoint_or(source, target, sendbuf == recvbuf + self._rank * source.nbytes)
        self._give(stream, ("allGather", count, datatype), source, target, np.concatenate)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._message("send", sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._message("recv", recvbuf, count, datatype, peer, stream)

    def _message(self, kind: str, at: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._check(at, count, datatype, peer, stream)
        if peer == self._rank or not 0 <= peer < self._room.size or not count:
            raise NcclError(f"{kind} of {count} elements between {self._rank} and {peer}")
        entry = (kind, self._memory(at, count, datatype), datatype, peer)
        if local.group is not None:
            local.group.append((self, *entry, stream))
        else:
            Stream.known[stream].give(lambda: self._messages([entry]))

    def _messages(self, entries: list[Any]) -> None:
        leaving = [memory for kind, memory, *_ in entries if kind == "send"]
        landing = [memory for kind, memory, *_ in entries if kind == "recv"]
        for position, target in enumerate(landing):
            if any(np.shares_memory(target, other) for other in leaving + landing[:position]):
                raise NcclError("a message lands where another one of its group is")
        received = []
        for kind, memory, datatype, peer in entries:
            if kind == "send":
                taken = threading.Event()
                received.append(taken)
                self._room.mail[self._rank, peer].put((memory.copy(), datatype, taken))
        for kind, memory, datatype, peer in entries:
            if kind == "recv":
                content, other, taken = self._room.mail[peer, self._rank].get(timeout=WAIT)
                if other != datatype or len(content) != len(memory):
                    raise NcclError(f"{len(content)} elements of type {other} come, {len(memory)} of {datatype} wanted")
                np.copyto(memory, content)
                taken.set()
        if not all(taken.wait(WAIT) for taken in received):
            raise NcclError("a message that nobody receives")

    def _give(self, stream: int, same: Any, source: Any, target: Any, use_all: Callable[[Any], Any]) -> None:
        def run() -> None:
            room = self._room
            room.table[self._rank] = (same, source)
            room.barrier.wait(WAIT)
            words = {entry[0] for entry in room.table}
            result = use_all([entry[1] for entry in room.table]).copy() if len(words) == 1 else None
            room.barrier.wait(WAIT)
            if result is None:
                raise NcclError(f"the ranks do not do the same: {words}")
            if target is not None:
                np.copyto(target, result)

        Stream.known[stream].give(run)

    def _check(self, *numbers: Any) -> None:
        if not all(type(number) is int for number in numbers):
            raise TypeError(f"{numbers}: only ints")
        if not self._alive:
            raise NcclError("the communicator was destroyed")
        if local.gpu != self._gpu:
            raise NcclError("another GPU is current than the one the communicator was made on")
        if numbers[-1] not in Stream.known:
            raise NcclError(f"no stream {numbers[-1]}")

    def _memory(self, at: int, count: int, datatype: int) -> Any:
        dtype = DTYPES[datatype]
        nbytes = count * dtype.itemsize
        with lock:
            position = bisect.bisect_right(starts, at) - 1
            home = allocations.get(starts[position]) if position >= 0 else None
        if home is not None and at + nbytes <= home.start + len(home.octets):
            if home.gpu != self._gpu:
                raise NcclError(f"memory of GPU {home.gpu}, the communicator is on {self._gpu}")
            return home.octets[at - home.start : at - home.start + nbytes].view(dtype)
        raise NcclError(f"{nbytes} bytes at {at}: outside of every allocation")


def _sum(op: int, arrays: list[Any]) -> Any:
    total = arrays[0].copy()
    with np.errstate(all="ignore"):
        for array in arrays[1:]:
            total = OPS[op](total, array)
    return total


def _disjoint_or(source: Any, target: Any, allowed: bool) -> None:
    if np.shares_memory(source, target) and not allowed:
        raise NcclError("the buffers overlap, and not as NCCL allows")
