"""What workers and servers say to one another: headers of a few numbers, and arrays behind some of them.

    worker                          server 0, the lead              other servers
    NEXT              ──────►       WORK step part version | EVALUATE part | STOP
    PULL version      ──────►       arrays                          (the same)
    ROWS count, ids   ──────►       rows                            (the same)
    PUSH step version ──────►       tally, arrays, rows             (the same)
    EVALUATED, FAILED ──────►       tally | text                    APPLY mask | SAVE | STOP  ◄── lead

They travel over MPI, or over sockets beside it (`collectives/sockets.py`), which survive the death of a worker.
Nobody waits inside the MPI library: all messages are started, asked after, and slept over for a fraction of a
millisecond, so that many ranks live on few cores; and every wait has an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from enum import IntEnum, auto
from typing import NamedTuple

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.collectives.waiting import hand_over

# Tags: requests, what belongs to them, answers, what belongs to them, orders of the lead to the other servers.
REQUEST, BODY, ANSWER, REPLY, ORDER = 7001, 7002, 7003, 7004, 7005

YIELD_SECONDS = 3e-4
NAPS = (100e-6, 1e-3)  # between two looks: at first, and after a tenth of a second without anything
EAGER = 0.1


class Kind(IntEnum):
    """What a header asks for or says."""

    NEXT = auto()
    PULL = auto()
    ROWS = auto()
    PUSH = auto()
    BEAT = auto()
    EVALUATED = auto()
    FAILED = auto()
    WORK = auto()
    EVALUATE = auto()
    STOP = auto()
    APPLY = auto()
    SAVE = auto()


class Header(NamedTuple):
    """A message of this length always comes first; as float64, which holds whole numbers to 2^53."""

    kind: int
    step: int = 0
    """The steps before it."""
    part: int = 0
    """Of the global batch (or of the validation set): index among the workers' shares."""
    steps: int = 1
    """How many steps in a row (local SGD)."""
    version: int = 0
    """Updates of the parameters so far."""
    updates: int = 0
    """Updates of the optimizer so far, also before a restart."""
    length: int = 0
    """Of what follows: ids, bytes of a text, pushes that must have come."""
    memory: int = 0
    """Peak bytes of the sender."""

    def array(self) -> Array:
        """As it travels."""
        return np.array(self, np.float64)

    @classmethod
    def of(cls, array: Array) -> Header:
        """As it came."""
        return cls(*map(int, array))


class Nap:
    """Between two looks: hand the core over, then sleep, longer when nothing has happened for a while."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def __call__(self) -> None:
        """Let others run."""
        waited = time.monotonic() - self.since
        if waited < YIELD_SECONDS:
            hand_over()
        else:
            time.sleep(NAPS[waited > EAGER])

    def reset(self) -> None:
        """Something happened."""
        self.since = time.monotonic()


def wait(works: Iterable[Work], limit: float, late: Callable[[], Exception]) -> None:
    """Return when all works are done; raise late() after `limit` seconds."""
    nap = Nap()
    for work in works:
        while not work.done():
            if time.monotonic() - nap.since > limit:
                raise late()
            nap()
        work.wait()


def send_all(comm: Communicator, arrays: Iterable[Array], destination: int, tag: int) -> list[Work]:
    """Start to send all of them; arrays without elements are left out on both sides."""
    return [comm.send_async(array, destination, tag) for array in arrays if array.size]


def receive_all(comm: Communicator, arrays: Iterable[Array], source: int, tag: int) -> list[Work]:
    """Start to receive into all of them."""
    return [comm.recv_async(array, source, tag) for array in arrays if array.size]
