"""The first server, which also leads: it hands out the work, keeps the book, tells the story of the run.

    NEXT ──► WORK (a share of the samples of a step) │ EVALUATE (a share of the validation set) │ STOP

All decisions are here and in its `Ledger`: who begins, which gradients make a synchronous update, when the run stands
still for validation and a checkpoint, who is dead. The other servers follow by orders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.connections import PeerLost
from dtrain.strategies.parameter_server.ledger import Ledger
from dtrain.strategies.parameter_server.messages import ANSWER, BODY, ORDER, Header, Kind
from dtrain.strategies.parameter_server.server import Condition, Push, Server
from dtrain.trainer import StepRecord, Trainer


class Lead(Server):
    """Server 0. `record(StepRecord)` is called for each step, `note(text)` with what the user should know."""

    def __init__(
        self,
        comm: Communicator,
        trainer: Trainer,
        save: Callable[[], None] = lambda: None,
        record: Callable[[StepRecord], None] = lambda record: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(comm, trainer, save)
        self.record, self.note = record, note
        self.ledger = Ledger(self.options, self.num_workers, trainer.total_steps, self.fence, trainer.step)
        self.over = trainer.step >= trainer.total_steps
        self.pulled_at = [0] * self.num_workers
        self.evaluations: dict[int, Array] = {}
        self.tallies: list[tuple[Array, Array]] = []
        self.held: StepRecord | None = None
        """The record of the last step before a fence, until its validation is known."""
        self.since = time.perf_counter()

    def fence(self, step: int) -> int:
        """The first step after this one at which all must have come."""
        config = self.trainer.config
        every = [config.checkpoint.every]
        if self.trainer.data.validation is not None:
            every.append(config.train.validate.every)
        return min([self.trainer.total_steps, *[(step // each + 1) * each for each in every if each]])

    def start(self) -> None:
        """Nobody is late yet."""
        for worker in self.ledger.workers:
            worker.heard = time.monotonic()

    # Requests

    def answer(self, worker: int, header: Header) -> Generator[Condition, None, bool]:
        """Also what only the lead is asked."""
        if self.ledger.hear(worker, time.monotonic(), header.memory):
            self.note(f"worker {worker} is back")
            self.lost.discard(worker)
        if header.kind == Kind.NEXT:
            yield lambda: self.over or self.assign(worker)
            if not self.over:
                return False
            self.send([Header(Kind.STOP, length=bool(self.lost)).array()], worker, ANSWER)
            return True
        if header.kind == Kind.EVALUATED:
            tally = np.empty((1, 3))
            yield from self.receive([tally], worker, BODY)
            if self.ledger.evaluated(worker):
                self.evaluations[header.part] = tally
        elif header.kind == Kind.FAILED:
            text = np.empty(header.length, np.uint8)
            yield from self.receive([text], worker, BODY)
            self.lose(worker, bytes(text).decode(errors="replace"))
            yield lambda: self.over
            self.send([Header(Kind.STOP, length=bool(self.lost)).array()], worker, ANSWER)
            return True
        elif header.kind != Kind.BEAT:
            return (yield from super().answer(worker, header))
        return False

    def assign(self, worker: int) -> bool:
        """Send the worker its next work, if there is any for it now."""
        work = self.ledger.assign(worker)
        if work is None:
            return False
        self.ledger.workers[worker].heard = time.monotonic()
        kind, updates = (Kind.EVALUATE if work.validates else Kind.WORK), self.trainer.optimizer.steps
        header = Header(kind, work.step, work.part, work.steps, self.version, updates)
        self.send([header.array()], worker, ANSWER)
        return True

    def pulling(self, worker: int) -> None:
        """Staleness counts from here."""
        self.pulled_at[worker] = self.version

    def take(self, worker: int, push: Push) -> None:
        """An update at once, or one more towards the quorum, or nothing."""
        asynchronous = not self.ledger.synchronous
        used = self.ledger.pushed(worker, self.pulled_at[worker] if asynchronous else push.header.version)
        if not used:
            self.note(f"a gradient of worker {worker} came too late for step {push.header.step + 1}: dropped")
        elif asynchronous:
            self.tallies.append(self.update([push], push.header.step))
            if self.ledger.step > self.trainer.step:
                self.tell(1)
        else:
            self.pushes[worker] = push

    def gone(self, worker: int, lost: PeerLost) -> None:
        """At once, without a time limit; one that has told why it failed is lost already."""
        if not self.ledger.workers[worker].dead and not self.over:
            self.lose(worker, str(lost).partition(": ")[2])

    # The course of the run

    def tick(self) -> None:
        """Whatever is due."""
        if self.stopped:
            return
        for worker in self.ledger.silent(time.monotonic(), self.options.timeout):
            self.lost.add(worker)
            self.lose(worker, f"no sign of life for {self.options.timeout:g} s")
        arrived = [worker for worker, push in enumerate(self.pushes) if push is not None]
        if self.ledger.synchronous and arrived and len(arrived) >= self.ledger.quorum:
            self.synchronous_update(arrived)
        if self.over:
            self.order(Kind.STOP)
            self.stopped = True
        elif self.ledger.at_fence:
            self.at_fence()

    def synchronous_update(self, workers: Sequence[int]) -> None:
        """The update from all that has come, on all servers."""
        first = self.pushes[workers[0]]
        assert first is not None
        step, steps = first.header.step, first.header.steps
        self.order(Kind.APPLY, workers, step, steps, self.version)
        self.tallies.append(self.apply(workers, step, steps))
        self.ledger.updated(steps, len(workers))
        self.tell(steps)

    def order(self, kind: Kind, chosen: Sequence[int] = (), step: int = 0, steps: int = 1, version: int = 0) -> None:
        """To the other servers."""
        book = np.zeros((3, self.num_workers), np.int64)
        book[0, list(chosen)] = 1
        book[1] = self.seen
        book[2, list(self.lost)] = 1
        header = Header(kind, step, 0, steps, version, length=self.trainer.consumed).array()
        for server in range(1, self.servers.size):
            self.send([header, book], self.num_workers + server, ORDER)

    def tell(self, steps: int) -> None:
        """A record for each step that is done now; the last before a fence waits for its validation."""
        trainer, now = self.trainer, time.perf_counter()
        tallies = np.sum([tally for tally, _ in self.tallies], axis=0)
        norms = np.sqrt(np.mean([norms**2 for _, norms in self.tallies], axis=0))
        self.tallies.clear()
        for (loss, count, _), norm in zip(tallies.tolist(), norms.tolist(), strict=True):
            trainer.refuse_divergence(loss)
            trainer.step += 1
            trainer.consumed += trainer.config.train.global_batch
            mean, rate = loss / count, trainer.learning_rate(trainer.step)
            record = StepRecord(trainer.step, mean, norm, rate, (now - self.since) / steps, int(count), None)
            if trainer.step == self.ledger.limit and trainer.validates:
                self.held = record
            else:
                self.record(record)
        self.since = now

    def at_fence(self) -> None:
        """Validation first, then the checkpoint, then on."""
        trainer, every = self.trainer, self.trainer.config.checkpoint.every
        if trainer.validates:
            if self.ledger.validating is None:
                self.ledger.validate()
            if not self.ledger.validated:
                return
            loss, count, _ = np.sum([self.evaluations[part] for part in sorted(self.evaluations)], axis=0)[0]
            self.evaluations.clear()
            if self.held is not None:
                self.record(replace(self.held, validation_loss=float(loss / count)))
                self.held = None
        if every and (trainer.step % every == 0 or trainer.step == trainer.total_steps):
            self.order(Kind.SAVE, step=trainer.step)
            self.save()
        self.since = time.perf_counter()
        self.over = trainer.step >= trainer.total_steps
        if not self.over:
            self.ledger.go_on()

    def lose(self, worker: int, reason: str) -> None:
        """A worker is dead: go on without it, or end the run."""
        self.ledger.lose(worker, reason)
        rest = len(self.ledger.alive)
        self.note(f"worker {worker} (rank {worker} on {self.comm.hosts[worker]}) is lost: {reason}; {rest} go on")

    def summary(self) -> dict[str, object]:
        """What came out, for summary.json."""
        book = self.ledger
        return {
            "mode": self.options.mode,
            "servers": self.servers.size,
            "workers": self.num_workers,
            "updates": book.version,
            "staleness": {str(key): book.staleness[key] for key in sorted(book.staleness)},
            "gradients_by_worker": [worker.applied for worker in book.workers],
            "dropped_by_worker": [worker.dropped for worker in book.workers],
            "lost": {str(index): worker.dead for index, worker in enumerate(book.workers) if worker.dead},
            "server_bytes": [sum(array.nbytes for array in self.pulled)],
        }
