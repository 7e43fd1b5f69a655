"""The book of the lead server: who works on what, who may begin, who is late or dead. It communicates nothing.

A *work* is one worker's share of the samples of a step (local SGD: of several steps in a row).

    sync, local_sgd   work (step v, own part) for each worker at each version v; the update when the quorum has pushed
    async, ssp        works in the order of (step, part) to whoever asks first; an update per push
    ssp               but nobody begins who is more than `staleness` pushes ahead of the slowest

A step at which validation or a checkpoint is due is a *fence*: nothing beyond it is handed out before all of it has
been applied, then the parts of the validation go to whoever asks. What a dead worker had is handed out again.

Invariant: without deaths and late gradients, the updates until a fence use each sample of its steps exactly once.
References: Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NeurIPS 2013;
Chen et al., "Revisiting distributed synchronous SGD" (backup workers), arXiv:1604.00981.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dtrain.config import ParameterServerConfig


class WorkersLost(RuntimeError):
    """Too few workers are left to go on."""


@dataclass(frozen=True)
class Assignment:
    """What a worker does next: part `part` of the samples of steps step .. step + steps (from 0)."""

    step: int
    part: int
    steps: int = 1
    validates: bool = False


@dataclass
class Worker:
    """What the lead knows of one worker."""

    holds: Assignment | None = None
    asked: int = -1
    """Sync: the version for which it got its last work."""
    clock: int = 0
    """Pushes, for SSP; moved up when it comes back from the dead."""
    pushes: int = 0
    applied: int = 0
    dropped: int = 0
    heard: float = 0.0
    dead: str = ""
    """Why; empty: alive."""
    memory: int = 0


@dataclass
class Ledger:
    """The state of a run between its fences."""

    options: ParameterServerConfig
    num_workers: int
    total_steps: int
    fence: Callable[[int], int]
    """The first fence after a step, at most total_steps."""
    step: int = 0
    """Steps of which all updates are applied (async: updates / workers)."""
    version: int = 0
    """Updates since the start."""
    staleness: Counter[int] = field(default_factory=Counter)
    """How many updates came between pull and push -> how often."""

    def __post_init__(self) -> None:
        """Begin at `step`."""
        self.workers = [Worker() for _ in range(self.num_workers)]
        self.synchronous = self.options.mode in ("sync", "local_sgd")
        self.next_part = self.step * self.num_workers  # of async: number of the next work
        self.again: list[int] = []  # works of the dead, a heap
        self.applied = 0  # async: works applied since the last fence
        self.limit = self.fence(self.step)
        self.begun = self.step  # the step after the last fence
        self.validating: list[int] | None = None  # parts still to be handed out
        self.evaluating = 0  # parts handed out, not yet back

    # Work

    @property
    def quorum(self) -> int:
        """Pushes that make an update in the synchronous modes."""
        return math.ceil(self.options.quorum * self.num_workers - 1e-9)

    @property
    def alive(self) -> list[int]:
        """The workers that are not known to be dead."""
        return [index for index, worker in enumerate(self.workers) if not worker.dead]

    @property
    def at_fence(self) -> bool:
        """Everything until the fence is applied."""
        return self.step >= self.limit

    def assign(self, index: int) -> Assignment | None:
        """What this worker does next; None: it has to wait."""
        worker = self.workers[index]
        if self.validating is not None:
            if not self.validating:
                return None
            worker.holds = Assignment(self.step, self.validating.pop(0), validates=True)
            self.evaluating += 1
        elif self.at_fence:
            return None
        elif self.synchronous:
            if worker.asked >= self.version:
                return None
            worker.asked = self.version
            steps = min(self.options.period if self.options.mode == "local_sgd" else 1, self.limit - self.step)
            worker.holds = Assignment(self.step, index, steps)
        else:
            number = self._next_number(index)
            if number is None:
                return None
            worker.holds = Assignment(*divmod(number, self.num_workers))
        return worker.holds

    def _next_number(self, index: int) -> int | None:
        ahead = self.workers[index].clock - min(self.workers[other].clock for other in {*self.alive, index})
        if self.options.mode == "ssp" and ahead > self.options.staleness:
            return None
        if self.again:
            return heapq.heappop(self.again)
        if self.next_part >= self.limit * self.num_workers:
            return None
        self.next_part += 1
        return self.next_part - 1

    # What came

    def hear(self, index: int, now: float, memory: int = 0) -> bool:
        """A sign of life; True if it was thought dead."""
        worker = self.workers[index]
        worker.heard, worker.memory = now, max(worker.memory, memory)
        if not worker.dead:
            return False
        worker.dead = ""
        worker.clock = max(
            worker.clock, min((self.workers[other].clock for other in self.alive if other != index), default=0)
        )
        return True

    def pushed(self, index: int, version: int) -> bool:
        """A worker pushed what it computed from `version`; whether it is to be used."""
        worker = self.workers[index]
        held, worker.holds = worker.holds, None
        worker.pushes += 1
        worker.clock += 1
        if self.synchronous and (held is None or version < self.version):  # the others went on without it
            worker.dropped += 1
            return False
        worker.applied += 1
        if not self.synchronous:
            self.staleness[self.version - version] += 1
            self.version += 1
            self.applied += held is not None  # else its work was given to another one: used, but no progress
            self.step = self.begun + self.applied // self.num_workers
        return True

    def updated(self, steps: int, pushes: int) -> None:
        """Sync: an update from so many pushes brought the run so many steps on."""
        self.staleness[0] += pushes
        self.version += 1
        self.step += steps

    def evaluated(self, index: int) -> bool:
        """A worker brought back its part of the validation; whether it is to be used."""
        held, self.workers[index].holds = self.workers[index].holds, None
        if held is None or not held.validates:
            return False
        self.evaluating -= 1
        return True

    # Fences

    def validate(self) -> None:
        """At a fence: hand out the validation set, a part per worker."""
        self.validating, self.evaluating = list(range(self.num_workers)), 0

    @property
    def validated(self) -> bool:
        """All parts of the validation are back."""
        return self.validating == [] and self.evaluating == 0

    def go_on(self) -> None:
        """Beyond the fence."""
        self.validating = None
        self.begun, self.applied = self.step, 0
        self.limit = self.fence(self.step)

    # Deaths

    def silent(self, now: float, limit: float) -> list[int]:
        """The workers that hold work and have said nothing for longer than the limit (seconds)."""
        return [index for index in self.alive if self.workers[index].holds and now - self.workers[index].heard > limit]

    def lose(self, index: int, reason: str) -> None:
        """This worker is dead; WorkersLost when the rest cannot go on."""
        worker = self.workers[index]
        worker.dead = reason
        held, worker.holds = worker.holds, None
        if held is not None and held.validates and self.validating is not None:
            self.validating.append(held.part)
            self.evaluating -= 1
        elif held is not None and not self.synchronous:
            heapq.heappush(self.again, held.step * self.num_workers + held.part)
        needed = self.quorum if self.synchronous else 1
        if len(self.alive) < needed:
            raise WorkersLost(
                f"worker {index} of {self.num_workers}: {reason}. {self.options.mode} needs {needed} of "
                f"{self.num_workers} workers, {len(self.alive)} are left; the newest checkpoint is where to go on "
                "(mode: async or ssp, or a smaller quorum, would have gone on)"
            )
