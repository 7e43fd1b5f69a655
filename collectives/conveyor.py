"""Collectives over several nodes under way: a queue of works, each cut into portions that overlap.

    work 1   portion 0  enter │ meet │ ~~ network ~~ │ write │ leave
             portion 1          enter │ meet │        ~~ network ~~ │ write │ leave
             portion 2                  enter │ meet │               ~~ network ~~ ...
    work 2   portion 0                          enter ...

A portion is one collective of the node: it has a number, a record, ARRIVED and REDUCED (`node.py`). `enter` copies data
into the staging (or nothing, where it lies in the window already), `exchange` is the work of this rank between both
flags, and `leave` copies results out. The steps are generators that yield where they would have to wait, so that the
wire carries one portion while the node works on its neighbours. Invariants:

- All ranks number portions in one order: a work begins when the one before it has entered all its portions.
- REDUCED is published in the order of the numbers, and portions leave in that order.
- A slot of the staging is taken again when every peer has left the portion that was there: at most DEPTH portions are
  under way, there are DEPTH + 1 slots, and who came to the last portion has left the one DEPTH before it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np

from dtrain.collectives.node import Node
from dtrain.collectives.progress import Progress
from dtrain.collectives.records import Record
from dtrain.collectives.waiting import NAPS, YIELD_SECONDS, CollectiveTimeout, hand_over

DEPTH = 4
SLOTS = DEPTH + 1
BEGUN = 16  # works begun and not finished; with their portions far below the ring of records

T = TypeVar("T")
Steps = Generator[None, None, T]


class Portion:
    """What one rank does in a numbered part of a collective; all of it but `exchange` returns at once."""

    def __init__(self, record: Record, staged: bool = True) -> None:
        """`staged`: it takes a slot of the staging, which the conveyor gives it."""
        self.record = record
        self.staged = staged
        self.slot = 0
        self.sequence = 0  # the same on all ranks of all nodes; part of the tags

    def enter(self) -> None:
        """Bring my data."""

    def exchange(self) -> Steps[None]:
        """Do my part; the data of my node is there."""
        raise NotImplementedError

    def leave(self) -> None:
        """Fetch my results; all ranks of my node have done their part."""


class HierarchyWork:
    """A collective over several nodes under way."""

    def __init__(self, conveyor: "Conveyor", what: str, portions: Iterable[Portion]) -> None:
        self.what = what
        self.begun = False
        self.finished = False
        self._conveyor = conveyor
        self._steps = self._run(portions)

    def test(self) -> bool:
        """Has it finished? Helps it along, never waits."""
        self._conveyor.progress()
        return self.finished

    def wait(self) -> None:
        """Return when it has finished."""
        self._conveyor.wait(self)

    def advance(self) -> None:
        """As far as it goes without waiting."""
        if next(self._steps, self) is self:
            self.begun = self.finished = True

    def _run(self, portions: Iterable[Portion]) -> Steps[None]:
        running: list[Steps[None]] = []
        for portion in portions:
            while portion.staged and not self._conveyor.has_slot():
                yield from _advance(running)
            number = self._conveyor.begin(portion)
            running.append(self._conveyor.steps(portion, number))
            next(running[-1])  # never ends at once: it yields when the data is published
        self.begun = True
        while running:
            yield from _advance(running)


def _advance(running: list[Steps[None]]) -> Steps[None]:
    """One look at each, and a pause; those that end leave the list."""
    for steps in list(running):
        if next(steps, steps) is steps:
            running.remove(steps)
    yield


def pipeline(tasks: Iterable[Steps[None]], depth: int) -> Steps[None]:
    """Run the tasks, at most `depth` at a time, begun in their order."""
    waiting = iter(tasks)
    running: list[Steps[None]] = []
    more = True
    while True:
        while more and len(running) < depth:
            task = next(waiting, None)
            if task is None:
                more = False
            elif next(task, task) is not task:
                running.append(task)
        if not running:
            return
        yield from _advance(running)


def both(*tasks: Steps[None]) -> Steps[None]:
    """Run the tasks all at once."""
    return pipeline(tasks, len(tasks))


class Conveyor:
    """The works of one communicator, in the order of their start. One step at a time, whoever asks for it."""

    def __init__(self, node: Node, together: Progress, timeout: float, name: str) -> None:
        """`together` is helped along in every wait; `timeout` in seconds without any step forward."""
        self._node = node
        self._together = together
        self._timeout = timeout
        self._name = name
        self._works: deque[HierarchyWork] = deque()
        self._turn = threading.Lock()
        self._moves = 0  # grows with every wait that ended
        self._sequence = 0
        self._entered = 0  # portions that took a slot, ever
        self._left = 0
        self._last = 0  # the number of the last portion that took a slot
        self._open: deque[int] = deque()  # numbers whose part of this rank is not done
        self._closed: set[int] = set()
        self._awaited = ""  # what the first step that waits waits for
        together.queues.append(self)

    def close(self) -> None:
        """Take part no more."""
        self._together.queues.remove(self)

    def start(self, what: str, portions: Iterable[Portion]) -> HierarchyWork:
        """Begin a collective."""
        work = HierarchyWork(self, what, portions)
        self._works.append(work)
        self.progress()
        return work

    def has_pending(self) -> bool:
        """Is something under way?"""
        return bool(self._works)

    def progress(self) -> None:
        """Everything as far as it goes; never waits."""
        if not self._works or not self._turn.acquire(blocking=False):
            return  # from within a step, or another thread is at it
        self._awaited = ""
        try:
            with np.errstate(all="ignore"):  # a sum beyond the largest number is infinity, as in MPI
                for position, work in enumerate(list(self._works)):
                    if position >= BEGUN:
                        break
                    try:
                        work.advance()
                    except BaseException:
                        self._works.remove(work)  # what fails is not tried again
                        raise
                    if not work.begun:
                        break
            while self._works and self._works[0].finished:
                self._works.popleft()
        finally:
            self._turn.release()

    def wait(self, work: HierarchyWork) -> None:
        """Return when a work has finished; meanwhile everything else goes on."""
        moves, since = self._moves, time.monotonic()
        naps = 0
        while not work.finished:
            self._together.poll()
            if moves != self._moves:
                moves, since, naps = self._moves, time.monotonic(), 0
                continue
            idle = time.monotonic() - since
            if idle > self._timeout:
                raise self._late(work, idle)
            if idle < YIELD_SECONDS:
                hand_over()
            else:
                time.sleep(NAPS[naps > 100])
                naps += 1

    def drain(self) -> None:
        """Return when nothing is under way: before what the MPI library does alone."""
        while self._works:
            self.wait(self._works[-1])

    # For the steps

    def until(self, ready: Callable[[], bool], what: str) -> Steps[None]:
        """Yield until something is so; `what`, for the report of who waits too long."""
        while not ready():
            self._awaited = self._awaited or what
            yield
        self._moves += 1

    def has_slot(self) -> bool:
        """May a portion take the next slot of the staging?"""
        return self._entered - self._left < DEPTH and self._node.have_arrived(self._last)

    def begin(self, portion: Portion) -> int:
        """Number a portion; it may bring its data."""
        portion.sequence = self._sequence
        self._sequence += 1
        number = self._node.begin_record(portion.record)
        self._open.append(number)
        if portion.staged:
            portion.slot = self._entered % SLOTS
            self._entered += 1
            self._last = number
        return number

    def steps(self, portion: Portion, number: int) -> Steps[None]:
        """A portion from its entry to its end."""
        node = self._node
        order = self._entered
        portion.enter()
        node.arrive(number)
        yield
        yield from self.until(lambda: node.have_arrived(number), "the other ranks of its node")
        node.await_arrived(number)  # at once; compares the records
        yield from portion.exchange()
        self._closed.add(number)
        while self._open and self._open[0] in self._closed:
            first = self._open.popleft()
            self._closed.remove(first)
            node.reduced(first)
        yield from self.until(lambda: node.have_reduced(number), "the other ranks of its node")
        if portion.staged:
            yield from self.until(lambda: self._left == order - 1, "an earlier portion")
            portion.leave()
            self._left += 1

    def _late(self, work: HierarchyWork, waited: float) -> CollectiveTimeout:
        return CollectiveTimeout(
            f"{self._name} waited {waited:.0f} s for {self._awaited} in {work.what}\n"
            "the time limit is DTRAIN_TIMEOUT seconds (0: none)"
        )
