"""Ranks as threads of one process: the same communicator without MPI, for tests.

    def function(comm, x): return comm.all_reduce(x + comm.rank)
    run_threads(4, function, 10.0)        # [46.0, 46.0, 46.0, 46.0]

All collectives rest on one operation, `share_values`: each rank puts a value on the table that nobody changes any
more, waits, and sees the values of all. Two tables take turns: who comes to the next meeting has read the last one's,
so whoever is late still finds what it came for. Invariant: sums run in rank order. A rank that fails ends the meetings,
so that nobody waits for it.
"""

import queue
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np

from dtrain.collectives.at_once import AtOnce
from dtrain.collectives.communicator import Communicator
from dtrain.collectives.desync import Letters
from dtrain.collectives.dtypes import OPERATIONS, Array, reduce_rows, starts
from dtrain.collectives.progress import Progress
from dtrain.collectives.waiting import LONGEST_NAP
from dtrain.collectives.work import Finished, Request


class RankLost(RuntimeError):
    """Another rank failed, or did not come in time; never the first failure."""


class _Room:
    """What the ranks of one communicator share."""

    def __init__(self, size: int, deadline: float, parent: "_Room | None" = None) -> None:
        self.size = size
        self.deadline = deadline
        self.tables: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)
        self.mail: dict[tuple[int, int, int], queue.SimpleQueue[Array]] = defaultdict(queue.SimpleQueue)
        self.lock = threading.Lock()
        self.rooms: list[_Room] = []
        self.broken = False
        self.letters: list[queue.SimpleQueue[tuple[int, bytes]]] = [queue.SimpleQueue() for _ in range(size)]
        self.world_ranks = list(range(size))
        self._come = 0
        self._doors = [threading.Lock() for _ in range(size)]
        for door in self._doors:
            door.acquire()
        if parent is not None:
            parent.rooms.append(self)

    def shatter(self) -> None:
        """End every wait in this room and those split from it."""
        self.broken = True
        for door in self._doors:
            with suppress(RuntimeError):  # it is open
                door.release()
        for room in self.rooms:
            room.shatter()

    def meet(self, rank: int) -> None:
        """Wait for all ranks of the room: the last one opens a door for each of the others.

        In threading.Barrier all queue for one lock when they wake, with one more made for every wait: twice the time.
        """
        with self.lock:
            self._come = (self._come + 1) % self.size
            last = not self._come
        if last and not self.broken:
            with suppress(RuntimeError):  # somebody failed meanwhile, and all doors are open
                for other, door in enumerate(self._doors):
                    if other != rank:
                        door.release()
        elif not last and not self._doors[rank].acquire(timeout=max(0.0, self.deadline - time.monotonic())):
            self.shatter()
        if self.broken:
            raise RankLost("another rank failed or did not come in time")


class _Later:
    """A receive under way."""

    def __init__(self, receive: Callable[[bool], bool]) -> None:
        self._receive = receive

    def test(self) -> bool:
        return self._receive(False)

    def wait(self) -> None:
        self._receive(True)


class _Post:
    """Letters between the threads of a room."""

    heard = False  # the threads have no watchdog: `run_threads` has a limit of its own

    def __init__(self, room: _Room, rank: int) -> None:
        self._room = room
        self._rank = rank
        self._early: deque[tuple[int, bytes]] = deque()  # fetched by `rest`

    def send(self, rank: int, text: bytes) -> None:
        self._room.letters[rank].put((self._rank, text))

    def receive(self) -> list[tuple[int, bytes]]:
        if self._room.broken:
            raise RankLost("another rank failed")
        came = [self._early.popleft() for _ in range(len(self._early))]
        with suppress(queue.Empty):
            while True:
                came.append(self._room.letters[self._rank].get_nowait())
        return came

    def rest(self, waited: float) -> None:
        with suppress(queue.Empty):  # to look again and again would take the one core that all threads share
            self._early.append(self._room.letters[self._rank].get(timeout=LONGEST_NAP))


class Transport(AtOnce):
    """The primitive operations between the threads of a room."""

    name = "threads"
    shares = False  # threads share everything already; windows are for processes
    threaded = True
    crowded = False

    def __init__(self, room: _Room, rank: int) -> None:
        self._room = room
        self._turn = 0  # which table the next meeting has
        self.rank = rank
        self.size = room.size
        self.hosts = [socket.gethostname()] * room.size
        self.nodes = [0] * room.size
        self.world_ranks = room.world_ranks

    def share_values(self, value: Any) -> list[Any]:
        """The values of all ranks, which nobody may change any more."""
        table = self._room.tables[self._turn]
        self._turn = 1 - self._turn
        table[self.rank] = value
        self._room.meet(self.rank)
        return list(table)

    def say(self, words: str) -> list[str]:
        """What all ranks say: compared without letters (`desync.py`)."""
        return self.share_values(words)

    def barrier(self) -> None:
        self._room.meet(self.rank)

    def broadcast(self, buffer: Array, root: int) -> None:
        told = self.share_values(buffer.copy() if self.rank == root else None)
        if self.rank != root:
            np.copyto(buffer, told[root])

    def all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> None:
        np.concatenate(self.share_values(source.copy()), out=target)

    def all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        offsets = starts(send_counts)
        blocks = [source[start : start + count].copy() for start, count in zip(offsets, send_counts, strict=True)]
        np.concatenate([row[self.rank] for row in self.share_values(blocks)], out=target)

    def gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> None:
        sources = self.share_values(source.copy())
        if target is not None:
            np.concatenate(sources, out=target)

    def scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> None:
        start = starts(counts)[self.rank]
        sources = self.share_values(None if source is None else source.copy())
        np.copyto(target, sources[root][start : start + counts[self.rank]])

    def send(self, source: Array, destination: int, tag: int) -> None:
        self._mailbox(self.rank, destination, tag).put(source.copy())

    def recv(self, target: Array, source: int, tag: int) -> None:
        self._receiver(target, source, tag)(True)

    def reduces(self, op: str, source: Array) -> bool:
        return True

    def all_reduce(self, source: Array, target: Array, op: str) -> None:
        reduce_rows(OPERATIONS[op], self.share_values(source.copy()), target)

    def reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> None:
        block = slice(starts(counts)[self.rank], starts(counts)[self.rank] + counts[self.rank])
        reduce_rows(OPERATIONS[op], [other[block] for other in self.share_values(source.copy())], target)

    def reduce(self, source: Array, target: Array | None, op: str, root: int) -> None:
        sources = self.share_values(source.copy())
        if target is not None:
            reduce_rows(OPERATIONS[op], sources, target)

    def scan(self, source: Array, target: Array, op: str, inclusive: bool) -> None:
        sources, before = self.share_values(source.copy()), self.rank + inclusive
        if before:  # rank 0 of an exclusive one needs nobody's
            reduce_rows(OPERATIONS[op], sources[:before], target)

    # Non-blocking: collectives meet at once (a thread always comes), messages are truly late.

    def start_send(self, source: Array, destination: int, tag: int) -> Request:
        self.send(source, destination, tag)
        return Finished()

    def start_recv(self, target: Array, source: int, tag: int) -> Request:
        return _Later(self._receiver(target, source, tag))

    def split(self, color: int | None, key: int) -> "Transport | None":
        entries = sorted(self.share_values((color, key, self.rank)), key=lambda entry: entry[1:])
        group = [rank for other, _, rank in entries if other == color]
        leader = color is not None and group[0] == self.rank
        mine = _Room(len(group), self._room.deadline, self._room) if leader else None
        if mine is not None:
            mine.world_ranks = [self.world_ranks[rank] for rank in group]
        rooms = self.share_values(mine)
        return None if color is None else Transport(rooms[group[0]], group.index(self.rank))

    def share(self, nbytes: int) -> NoReturn:
        raise AssertionError("threads have no segments")

    def post(self) -> _Post:
        return _Post(self._room, self.rank)

    def close(self) -> None:
        """The room goes with its last rank."""

    def abort(self, code: int) -> NoReturn:
        raise RuntimeError(f"rank {self.rank} aborted with code {code}")

    def _mailbox(self, source: int, destination: int, tag: int) -> "queue.SimpleQueue[Array]":
        with self._room.lock:
            return self._room.mail[source, destination, tag]

    def _receiver(self, target: Array, source: int, tag: int) -> Callable[[bool], bool]:
        mailbox = self._mailbox(source, self.rank, tag)
        arrived = False

        def receive(patient: bool) -> bool:
            nonlocal arrived
            while not arrived:
                try:
                    message = mailbox.get(timeout=0.05) if patient else mailbox.get_nowait()
                except queue.Empty:
                    if self._room.broken or time.monotonic() > self._room.deadline:
                        raise RankLost(f"no message came from rank {source}, tag {tag}") from None
                    if not patient:
                        return False
                    continue
                if message.nbytes != target.nbytes:
                    raise ValueError(
                        f"recv from rank {source}, tag {tag}: {message.nbytes} bytes came, out= has {target.nbytes}"
                    )
                np.copyto(target.view(np.uint8), message.view(np.uint8))
                arrived = True
            return True

        return receive


def run_threads(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """function(comm, *args) on `size` ranks, each a thread; the results in rank order.

    The first exception of a rank ends the others (their collectives raise RankLost) and is raised here. TimeoutError
    after `timeout` seconds.
    """
    room = _Room(size, time.monotonic() + timeout)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            transport, progress = Transport(room, rank), Progress()
            progress.letters = Letters(transport.post())
            results[rank] = function(Communicator(transport, progress=progress), *args)
        except BaseException as failure:
            failures.append((rank, failure))
            room.shatter()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, room.deadline + 1.0 - time.monotonic()))
    first = next(((rank, failure) for rank, failure in failures if not isinstance(failure, RankLost)), None)
    if first is not None:
        first[1].add_note(f"on rank {first[0]} of {size}")
        raise first[1]
    if failures or any(thread.is_alive() for thread in threads):
        room.shatter()
        waiting = [thread.name for thread in threads if thread.is_alive()] or [f"rank {rank}" for rank, _ in failures]
        raise TimeoutError(f"run_threads: not finished after {timeout} s: {', '.join(waiting)}")
    return results
