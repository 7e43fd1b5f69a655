"""A server: it answers pulls with its range of the parameters, and updates the range from what is pushed.

    sessions    one generator per worker (and one for the lead's orders): receive a header, then what belongs to it, do
                it, answer. It yields a condition wherever it would have to wait; `serve` advances those whose has come.

    sync        pushes are kept until the lead says which of them make the update: APPLY version, mask
    async, ssp  each push is an update at once, with the optimizer of the configuration on the range
    local_sgd   what is pushed are parameters and optimizer state of the workers; the update is their mean

Sums are taken in the order of the workers, so a synchronous run is the same from run to run, bit for bit.
Invariant: what is sent does not change while it is under way, and nothing here waits inside the MPI library but the
collectives among servers: the gradient norm of a synchronous update, and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dtrain import optimizers
from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.collectives.connections import PeerLost
from dtrain.collectives.dtypes import OPERATIONS, reduce_rows
from dtrain.strategies.parameter_server.messages import (
    BODY,
    ORDER,
    REPLY,
    REQUEST,
    Header,
    Kind,
    Nap,
    receive_all,
    send_all,
)
from dtrain.strategies.parameter_server.shards import shards_of, values
from dtrain.trainer import Trainer

Condition = Callable[[], bool]
Session = Generator[Condition, None, None]


@dataclass(frozen=True)
class Push:
    """What a worker pushed: tally (steps, 3) of loss, targets and squares of the gradient; arrays; rows of tables."""

    header: Header
    tally: Array
    arrays: list[Array]
    rows: list[tuple[Array, Array]]


class Server:
    """One of the servers; `comm` are all ranks of the job, workers first. The trainer holds the range (`shards.Serve`).

    `save()` writes a checkpoint, a collective among the servers.
    """

    def __init__(self, comm: Communicator, trainer: Trainer, save: Callable[[], None] = lambda: None) -> None:
        self.comm, self.trainer, self.save = comm, trainer, save
        self.options = trainer.config.parameter_server
        self.servers = trainer.mesh.comm
        self.num_workers = comm.size - self.servers.size
        self.shards = shards_of(trainer, self.options.sparse)
        self.shard = self.shards[self.servers.rank]
        groups = trainer.flat.groups
        if self.options.mode == "local_sgd":
            self.pulled = self.pushed = values(trainer.optimizer)
        else:
            spans = [(i, slice(run.start - groups[i].owned.start, run.stop - groups[i].owned.start))
                     for i, run in self.shard.runs]  # fmt: skip
            self.pulled = [groups[i].data[where] for i, where in spans]
            self.pushed = [groups[i].grad[where] for i, where in spans]
        self.version = 0
        self.pushes: list[Push | None] = [None] * self.num_workers
        self.inbox = [[np.empty_like(array) for array in self.pushed] for _ in range(self.num_workers)]
        self.seen = [0] * self.num_workers
        """Pushes of each worker until now."""
        self.lost: set[int] = set()
        self.stopped = False
        self.shares_data = self.options.mode in ("sync", "local_sgd") and self.options.quorum == 1
        """Nothing is updated while anybody pulls: answers need no copy."""
        self._sending: list[Work] = []
        self._waiting: dict[int, tuple[Session, Condition]] = {}

    # The loop

    def serve(self) -> None:
        """Serve until the run is over."""
        for source in range(self.num_workers):
            self._begin(source, self.session(source))
        self.start()
        nap = Nap()
        while not (self.stopped and set(self._waiting) <= self.lost):
            moved = False
            for source, (session, ready) in list(self._waiting.items()):
                if ready():
                    moved = True
                    self._begin(source, session)
            self._sending = [work for work in self._sending if not work.done()]
            self.tick()
            if moved:
                nap.reset()
            else:
                nap()
        while self._sending and not self.lost:
            self._sending = [work for work in self._sending if not work.done()]
            nap()

    def _begin(self, source: int, session: Session) -> None:
        self._waiting.pop(source, None)
        try:
            for ready in session:
                if not ready():
                    self._waiting[source] = session, ready
                    return
        except PeerLost as lost:
            if lost.rank != source or source == self.num_workers:  # another server: nobody has its range
                raise
            self.lost.add(source)
            self.gone(source, lost)

    def start(self) -> None:
        """Listen to the lead."""
        self._begin(self.num_workers, self.orders())

    def tick(self) -> None:
        """Between two rounds."""

    def gone(self, worker: int, lost: PeerLost) -> None:
        """The process of a worker has ended."""

    # Messages

    def receive(self, arrays: Sequence[Array], source: int, tag: int) -> Session:
        """Receive into the arrays."""
        for work in receive_all(self.comm, arrays, source, tag):
            yield work.done
            work.wait()

    def send(self, arrays: Sequence[Array], destination: int, tag: int) -> None:
        """Send the arrays, which nobody changes from now on."""
        self._sending += send_all(self.comm, arrays, destination, tag)

    def session(self, worker: int) -> Session:
        """The life of a worker, as this server sees it."""
        buffer = Header(Kind.STOP).array()
        while True:
            yield from self.receive([buffer], worker, REQUEST)
            header = Header.of(buffer)
            if header.kind == Kind.STOP:
                return
            ended = yield from self.answer(worker, header)
            if ended:
                return

    def answer(self, worker: int, header: Header) -> Generator[Condition, None, bool]:
        """Do what the header asks for; whether that was the last of this worker."""
        if header.kind == Kind.PULL:
            yield lambda: self.version >= header.version or self.options.mode in ("async", "ssp")
            self.pulling(worker)
            self.send(self.pulled if self.shares_data else [array.copy() for array in self.pulled], worker, REPLY)
        elif header.kind == Kind.ROWS:
            ids = np.empty(header.length, np.int64)
            yield from self.receive([ids], worker, BODY)
            self.send([self.table(header.part)[ids]], worker, REPLY)
        elif header.kind == Kind.PUSH:
            yield from self.receive_push(worker, header)
        else:
            raise AssertionError(f"server {self.servers.rank}: {Kind(header.kind).name} from worker {worker}")
        return False

    def receive_push(self, worker: int, header: Header) -> Session:
        """Receive all that belongs to a push, and use it."""
        yield from self.receive(self.inbox[worker], worker, BODY)
        rows = []
        if self.shard.tables:
            counts = np.empty(len(self.shard.tables), np.int64)
            yield from self.receive([counts], worker, BODY)
            for i, count in enumerate(counts.tolist()):
                width, dtype = self.table(i).shape[1], self.table(i).dtype
                ids, values = np.empty(count, np.int64), np.empty((count, width), dtype)
                yield from self.receive([ids, values], worker, BODY)
                rows.append((ids, values))
        tally = np.empty((header.steps, 3))
        yield from self.receive([tally], worker, BODY)
        self.seen[worker] += 1
        self.take(worker, Push(header, tally, self.inbox[worker], rows))

    def table(self, index: int, gradient: bool = False) -> Array:
        """The rows of a sparse table that are here, or their gradients."""
        table = self.shard.tables[index]
        group = self.trainer.flat.groups[table.group]
        start = group.owned.start
        array = group.grad if gradient else group.data
        return array[table.where.start - start : table.where.stop - start].reshape(table.shape)

    # What the modes differ in

    def pulling(self, worker: int) -> None:
        """This worker gets the parameters as they are now."""

    def take(self, worker: int, push: Push) -> None:
        """Use a push: at once, or when the lead says so."""
        if self.options.mode in ("async", "ssp"):
            self.update([push], push.header.step)
        else:
            self.pushes[worker] = push

    def orders(self) -> Session:
        """What the lead says: in its order, each when what it needs has come."""
        lead, buffer, book = self.num_workers, Header(Kind.STOP).array(), np.empty((3, self.num_workers), np.int64)
        while True:
            yield from self.receive([buffer, book], lead, ORDER)
            header = Header.of(buffer)
            chosen, pushes, dead = book
            self.lost = set(np.flatnonzero(dead).tolist())
            if header.kind == Kind.APPLY:
                mask = np.flatnonzero(chosen).tolist()
                yield partial(self.has_all, mask, header.version)
                self.apply(mask, header.step, header.steps)
            elif header.kind == Kind.SAVE:
                yield partial(self.has_seen, pushes.tolist())
                self.trainer.step, self.trainer.consumed = header.step, header.length
                self.save()
            else:
                self.stopped = True
                return

    def has_all(self, workers: Sequence[int], version: int) -> bool:
        """Whether the pushes of these workers from this version are here."""
        pushes = [self.pushes[worker] for worker in workers]
        return all(push is not None and push.header.version == version for push in pushes)

    def has_seen(self, pushes: Sequence[int]) -> bool:
        """Whether at least so many pushes have come from each worker that is alive."""
        return all(self.seen[i] >= count for i, count in enumerate(pushes) if i not in self.lost)

    def apply(self, workers: Sequence[int], step: int, steps: int) -> tuple[Array, Array]:
        """Sync: the update of the range from the pushes of these workers. Collective among the servers."""
        pushes = [push for worker in workers if (push := self.pushes[worker]) is not None]
        for worker in workers:
            self.pushes[worker] = None
        return self.update(pushes, step, steps)

    def update(self, pushes: Sequence[Push], step: int, steps: int = 1) -> tuple[Array, Array]:
        """One update from these pushes; (tally (steps, 3) summed over them, norms of the gradients (steps,))."""
        trainer = self.trainer
        tally = np.sum([push.tally for push in pushes], axis=0)
        for i, array in enumerate(self.pushed):
            flat = [push.arrays[i].reshape(-1) for push in pushes]
            reduce_rows(OPERATIONS["sum"], flat, array.reshape(-1))
        self.version += 1
        if self.options.mode == "local_sgd":
            for array in self.pushed:
                array /= len(pushes)
            for part in trainer.optimizer.parts:
                part.publish()
            trainer.optimizer.steps += steps
            means = tally / len(pushes)
            return tally, np.array([self.norm(squares, count) for _, count, squares in means.tolist()])
        for i in range(len(self.shard.tables)):
            gradient = self.table(i, gradient=True)
            gradient[...] = 0
            for push in pushes:
                ids, rows = push.rows[i]
                gradient[ids] += rows
        squares = float(tally[0, 2])  # async: of the one worker's whole gradient
        if self.options.mode == "sync":
            squares = float(self.servers.all_reduce(np.array([optimizers.sum_squares(trainer.flat)]))[0])
        norm = self.norm(squares, float(tally[0, 1]))
        scale = trainer.expected_targets / (tally[0, 1] * trainer.loss_scale)
        scale *= optimizers.clip_factor(norm, trainer.config.optimizer.clip_norm)
        trainer.optimizer.step(trainer.learning_rate(step + 1), scale)
        return tally, np.array([norm])

    def norm(self, squares: float, count: float) -> float:
        """Of a gradient, from the squares of what was computed for `count` targets."""
        return math.sqrt(squares) * self.trainer.expected_targets / (count * self.trainer.loss_scale)
