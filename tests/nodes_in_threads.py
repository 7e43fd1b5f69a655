"""Ranks as threads of one process, on nodes as a test wants them: `run_nodes([0, 0, 1], function)`.

As `run_threads`, but ranks of one node number share segments (of this process's memory), and those of others only send
messages.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.collectives import Communicator, threads


class Segment:
    """Memory of the ranks of one node."""

    def __init__(self, parts: list[memoryview]) -> None:
        self.parts = parts

    def fence(self) -> None:
        pass

    def free(self) -> None:
        self.parts = []


class Transport(threads.Transport):
    """The threads of a room, spread over nodes."""

    shares = True
    crowded = True  # never spin: only one thread runs at a time

    def __init__(self, room: Any, rank: int, nodes: list[int]) -> None:
        super().__init__(room, rank)
        self.nodes = nodes
        self.hosts = [f"host{node}" for node in nodes]

    def share(self, nbytes: int) -> Any:
        assert len(set(self.nodes)) == 1, "only ranks of one node share memory"
        return Segment(self.share_values(np.zeros(nbytes, np.uint8).data))  # its pages come when they are touched

    def split(self, color: int | None, key: int) -> "Transport | None":
        rows = self.share_values((color, key, self.rank, self.nodes[self.rank]))
        part = super().split(color, key)
        members = sorted((row[1:] for row in rows if row[0] == color), key=lambda row: row[:2])
        return None if part is None else Transport(part._room, part.rank, [row[2] for row in members])


def run_nodes(
    nodes: Sequence[int], function: Callable[..., Any], *args: Any, timeout: float = 60.0, patience: float = 60.0
) -> list[Any]:
    """function(comm, *args) on one rank per entry, which is the number of its node; the results in rank order.

    `patience`: the time limit of the communicators; `timeout`: of all together.
    """
    size = len(nodes)
    room = threads._Room(size, time.monotonic() + timeout)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(Communicator(Transport(room, rank, list(nodes)), timeout=patience), *args)
        except BaseException as failure:
            failures.append(failure)
            room.shatter()

    ranks = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(max(0.0, room.deadline + 1.0 - time.monotonic()))
    failures.sort(key=lambda failure: isinstance(failure, threads.RankLost))
    if failures:
        raise failures[0]
    if any(thread.is_alive() for thread in ranks):
        raise TimeoutError(f"run_nodes: not finished after {timeout} s")
    return results
