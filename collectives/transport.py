"""The seam between the communicator and what moves its bytes: MPI (`mpi.py`), threads (`threads.py`), or `Alone`.

A transport sees only flat, contiguous arrays of the machine's byte order, never checks them, and knows no algorithm.
`counts` are elements per rank.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from dtrain.collectives.dtypes import Array
from dtrain.collectives.work import Request


class Segment(Protocol):
    """Memory shared by the ranks of one node, one part per rank, every part mapped by every rank."""

    parts: list[memoryview]

    def fence(self) -> None:
        """Order the memory accesses of this rank before and after the call."""

    def free(self) -> None:
        """Collective: unmap."""


class Post(Protocol):
    """Short texts between any two ranks of the world, apart from all collectives; for checks and reports."""

    heard: bool  # whether a rank can read its letters while its main thread is elsewhere

    def send(self, rank: int, text: bytes) -> None:
        """To a rank of the world; never waits."""

    def receive(self) -> list[tuple[int, bytes]]:
        """What has come, with its senders; never waits."""

    def rest(self, waited: float) -> None:
        """Let others run, after a wait of so many seconds: a moment, at most until a letter comes."""


class Transport(Protocol):
    """The primitive operations between `size` ranks."""

    rank: int
    size: int
    world_ranks: list[int]  # of each rank: its number in the world
    hosts: list[str]  # of each rank
    nodes: list[int]  # of each rank: equal numbers share memory
    name: str
    shares: bool  # whether `share` works between ranks of one node
    threaded: bool  # whether several threads of a rank may call it at once
    crowded: bool  # more ranks of the job on this node than cores they may use

    @property
    def say(self) -> Callable[[str], list[str]] | None:
        """Collective: what all ranks say. None: they write letters (`post`)."""

    def barrier(self) -> None: ...
    def broadcast(self, buffer: Array, root: int) -> None: ...
    def all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> None: ...
    def all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None: ...
    def gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> None: ...
    def scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> None: ...
    def send(self, source: Array, destination: int, tag: int) -> None: ...
    def recv(self, target: Array, source: int, tag: int) -> None: ...

    def reduces(self, op: str, source: Array) -> bool:
        """Whether the reductions below know this operation for this dtype."""

    def all_reduce(self, source: Array, target: Array, op: str) -> None: ...
    def reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> None: ...
    def reduce(self, source: Array, target: Array | None, op: str, root: int) -> None: ...
    def scan(self, source: Array, target: Array, op: str, inclusive: bool) -> None:
        """The ranks up to mine; `inclusive`: with mine, else rank 0's target is undefined."""

    def start_all_reduce(self, source: Array, target: Array, op: str) -> Request: ...
    def start_reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> Request: ...
    def start_all_gather(self, source: Array, target: Array, counts: Sequence[int]) -> Request: ...
    def start_broadcast(self, buffer: Array, root: int) -> Request: ...
    def start_barrier(self) -> Request: ...
    def start_reduce(self, source: Array, target: Array | None, op: str, root: int) -> Request: ...
    def start_scan(self, source: Array, target: Array, op: str, inclusive: bool) -> Request: ...
    def start_all_to_all(
        self, source: Array, target: Array, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Request: ...
    def start_gather(self, source: Array, target: Array | None, counts: Sequence[int], root: int) -> Request: ...
    def start_scatter(self, source: Array | None, target: Array, counts: Sequence[int], root: int) -> Request: ...
    def start_send(self, source: Array, destination: int, tag: int) -> Request: ...
    def start_recv(self, target: Array, source: int, tag: int) -> Request: ...

    def split(self, color: int | None, key: int) -> "Transport | None": ...
    def share(self, nbytes: int) -> Segment:
        """Collective: a segment with `nbytes` per rank; only where `shares`, and only with all ranks on one node."""

    def post(self) -> Post:
        """Collective, on the world's transport, once."""

    def close(self) -> None: ...
    def abort(self, code: int) -> NoReturn: ...


class Alone:
    """The transport of one rank: the communicator answers everything itself and asks only for these."""

    rank = 0
    size = 1
    name = "alone"
    shares = False
    threaded = True
    crowded = False
    say = None

    def __init__(self) -> None:
        self.hosts = [socket.gethostname()]
        self.nodes = [0]
        self.world_ranks = [0]

    def split(self, color: int | None, key: int) -> "Alone | None":
        """Itself again."""
        return None if color is None else Alone()

    def close(self) -> None:
        """Nothing is held."""

    def abort(self, code: int) -> NoReturn:
        """End the process at once with exit status `code`."""
        os._exit(code)
