"""A worker: it computes gradients of the samples that the lead gives it; the update is done where the parameters are.

    NEXT ─► pull ─► forward, backward (a Trainer's, on one process) ─► push ─► NEXT ─► …

The optimizer of its trainer is a `RemoteOptimizer`: it has no state, its `step` pushes. In mode local_sgd it is an
ordinary one per server range, and what is pushed every few steps is what it has changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dtrain import optimizers
from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work, single
from dtrain.collectives.connections import PeerLost
from dtrain.collectives.waiting import timeout_seconds
from dtrain.config import Config
from dtrain.data import Data, share
from dtrain.errors import UserError
from dtrain.flat import FlatBuffers
from dtrain.kernels.memory import peak_memory
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.optimizers import Optimizer
from dtrain.strategies.parameter_server.messages import (
    ANSWER,
    BODY,
    REPLY,
    REQUEST,
    Header,
    Kind,
    receive_all,
    send_all,
    wait,
)
from dtrain.strategies.parameter_server.rows import Rows, check_sparse
from dtrain.strategies.parameter_server.shards import shards_of, values
from dtrain.strategy import Microbatch
from dtrain.tape import no_grad
from dtrain.trainer import Trainer


class ServerLost(RuntimeError):
    """A server does not answer."""


class RemoteOptimizer(Optimizer):
    """Of a worker: nothing here has state."""

    def __init__(self, flat: FlatBuffers) -> None:
        self.flat, self.steps = flat, 0
        self.parts = []


class Worker(Trainer):
    """Worker `comm.rank`; `comm` are all ranks of the job, workers first."""

    def __init__(self, comm: Communicator, config: Config, data: Data, model: Model) -> None:
        super().__init__(config, Mesh(single()), data, model, optimizer=lambda _, flat: RemoteOptimizer(flat))
        self.comm, self.options = comm, config.parameter_server
        self.num_workers = comm.size - self.options.servers
        self.shards = shards_of(self, self.options.sparse)
        self.part, self.parts = comm.rank, self.num_workers
        slow = self.options.slow
        self.slow = slow[comm.rank] if comm.rank < len(slow) else 1.0
        self.limit = max(timeout_seconds(), 5 * self.options.timeout)
        self.told = time.monotonic()
        self.local: list[Optimizer] = []
        groups = self.flat.groups
        if self.options.mode == "local_sgd":
            self.local = [optimizers.build(config.optimizer, self.flat, shard.ranges) for shard in self.shards]
            self.pulled = self.pushed = [values(optimizer) for optimizer in self.local]
        else:
            self.pulled = [[groups[i].data[run] for i, run in shard.runs] for shard in self.shards]
            self.pushed = [[groups[i].grad[run] for i, run in shard.runs] for shard in self.shards]
        modules = model.named_modules()
        tables = {name: check_sparse(model, modules, name) for name in self.options.sparse}
        self.rows = {f"{name}.weight": Rows(table, self.pull_rows) for name, table in tables.items()}

    # The loop

    def work(self) -> bool:
        """Work until the lead says that the run is over; whether some rank has died meanwhile."""
        while True:
            header = self.next()
            if header.kind == Kind.STOP:
                self.farewell()
                return bool(header.length)
            if header.kind == Kind.EVALUATE:
                self.evaluate_part(header)
            else:
                self.compute(header)

    def compute(self, header: Header) -> None:
        """Pull, the steps of this work, push."""
        self.pull(header)
        self.part = header.part
        tally = np.zeros((header.steps, 3))
        for i in range(header.steps):
            self.step = header.step + i
            self.consumed = self.step * self.config.train.global_batch
            self.flat.zero_grad()
            began = time.thread_time()
            loss, count = self.execute(list(self.microbatches()))
            tally[i] = loss, count, optimizers.sum_squares(self.flat)
            self.dawdle(time.thread_time() - began)
            self.local_step(*tally[i])
        self.push(header, tally)

    def local_step(self, loss: float, count: float, squares: float) -> None:
        """Local SGD: update the worker's own copy."""
        scale = self.expected_targets / (count * self.loss_scale)
        scale *= optimizers.clip_factor(squares**0.5 * scale, self.config.optimizer.clip_norm)
        for optimizer in self.local:
            optimizer.step(self.learning_rate(self.step + 1), scale)

    def execute(self, microbatches: list[Microbatch]) -> tuple[float, float]:
        """As Trainer.execute, with a sign of life after each microbatch."""
        loss = count = 0.0
        for microbatch in microbatches:
            more = super().execute([microbatch])
            loss, count = loss + more[0], count + more[1]
            self.beat()
        return loss, count

    def evaluate_part(self, header: Header) -> None:
        """A share of the validation set."""
        dataset = self.data.validation
        assert dataset is not None
        self.pull(header)
        total = min(len(dataset), self.config.train.validate.batches * self.config.train.global_batch)
        start, count = share(0, total, header.part, self.num_workers)
        portions = self._portions(dataset, start, np.arange(start, start + count), self.config.seed + 1)
        tally = np.zeros((1, 3))
        with no_grad():
            for portion in portions:
                tally[0, :2] += self.evaluate([portion])
                self.beat()
        self.model.after_validation(self.mesh)  # of this part alone: forgotten
        self.request(self.lead, header._replace(kind=Kind.EVALUATED), [tally])

    def dawdle(self, seconds: float) -> None:
        """Take `slow` times as long as these seconds of computing."""
        end = time.monotonic() + (self.slow - 1) * seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self.options.timeout / 4))
            self.beat()

    def _data_rank(self) -> tuple[int, int]:
        return self.part, self.parts

    # Messages

    @property
    def lead(self) -> int:
        """The rank of the first server."""
        return self.num_workers

    def next(self) -> Header:
        """Ask the lead what to do."""
        answer = Header(Kind.NEXT).array()
        works = [self.comm.recv_async(answer, self.lead, ANSWER)]
        self.request(self.lead, Header(Kind.NEXT, memory=peak_memory()))
        self.wait(works, self.lead)
        return Header.of(answer)

    def pull(self, header: Header) -> None:
        """Get the parameters, of at least the version of the header; rows come when they are needed."""
        for rows in self.rows.values():
            rows.ids = rows.ids[:0]
        works = []
        for server, arrays in enumerate(self.pulled):
            works.append((server, receive_all(self.comm, arrays, self.lead + server, REPLY)))
        for server, _ in works:
            self.request(self.lead + server, header._replace(kind=Kind.PULL))
        for server, each in works:
            self.wait(each, self.lead + server)
        for optimizer in self.local:
            optimizer.steps = header.updates
            for part in optimizer.parts:
                part.publish()
        self.flat.changed()

    def pull_rows(self, name: str, ids: Array) -> None:
        """Get these rows of a table, from the servers that have them."""
        works, found = [], []
        for server, shard in enumerate(self.shards):
            for index, table in enumerate(shard.tables):
                here = ids[(ids >= table.first) & (ids < table.last)] - table.first
                if table.name == name and here.size:
                    rows = np.empty((here.size, table.shape[1]), self.flat.groups[table.group].dtype)
                    works.append((server, receive_all(self.comm, [rows], self.lead + server, REPLY)))
                    self.request(self.lead + server, Header(Kind.ROWS, part=index, length=here.size), [here])
                    found.append((here + table.first, rows))
        for server, each in works:
            self.wait(each, self.lead + server)
        for where, rows in found:
            self.flat.parameters[name].data[where] = rows

    def push(self, header: Header, tally: Array) -> None:
        """Send what was computed to all servers."""
        self.flat.fill_missing()
        for name, rows in self.rows.items():
            if not rows.ids.size:
                raise UserError(
                    f"parameter_server.sparse: {name.removesuffix('.weight')}; no row of it was looked up in this "
                    "step: it is used otherwise than as an embedding. Leave it out"
                )
        sending: list[tuple[int, list[Work]]] = []
        for server, (shard, arrays) in enumerate(zip(self.shards, self.pushed, strict=True)):
            body = list(arrays)
            picked = []
            for table in shard.tables:
                ids = self.rows[table.name].ids
                ids = ids[(ids >= table.first) & (ids < table.last)]
                picked += [ids - table.first, self.flat.parameters[table.name].buffer[ids]]  # type: ignore[index]
            if shard.tables:
                body += [np.array([each.size for each in picked[::2]], np.int64), *picked]
            sending.append((server, self.start_request(self.lead + server, header._replace(kind=Kind.PUSH), body)))
        for server, works in reversed(sending):
            self.wait(works, self.lead + server)
            # The end of a push. The lead's comes last: what the lead has counted, all servers have.
            self.wait(send_all(self.comm, [tally], self.lead + server, BODY), self.lead + server)
        self.told = time.monotonic()

    def beat(self) -> None:
        """A sign of life, now and then."""
        if time.monotonic() - self.told > self.options.timeout / 4:
            self.request(self.lead, Header(Kind.BEAT, memory=peak_memory()))

    def fail(self, error: BaseException) -> bool:
        """Tell the lead that this worker cannot go on, and wait for the end of the run; as `work`."""
        text = f"{type(error).__name__}: {error}".encode(errors="replace")[:2000]
        answer = Header(Kind.STOP).array()
        works = [self.comm.recv_async(answer, self.lead, ANSWER)]
        self.request(self.lead, Header(Kind.FAILED, length=len(text)), [np.frombuffer(text, np.uint8)])
        self.wait(works, self.lead, float("inf"))
        self.farewell()
        return bool(Header.of(answer).length)

    def farewell(self) -> None:
        """The other servers need not listen to this worker any more."""
        for server in range(1, len(self.shards)):
            self.request(self.lead + server, Header(Kind.STOP))

    def request(self, server: int, header: Header, body: Sequence[Array] = ()) -> None:
        """Send a request and what belongs to it."""
        self.wait(self.start_request(server, header, body), server)
        self.told = time.monotonic()

    def start_request(self, server: int, header: Header, body: Sequence[Array]) -> list[Work]:
        """The same, started."""
        return [*send_all(self.comm, [header.array()], server, REQUEST), *send_all(self.comm, body, server, BODY)]

    def wait(self, works: Sequence[Work], server: int, limit: float | None = None) -> None:
        """Until the works with this server are done."""
        limit = self.limit if limit is None else limit
        who = f"worker {self.comm.rank}: rank {server}, a parameter server on {self.comm.hosts[server]}"
        try:
            wait(works, limit, lambda: ServerLost(f"{who}, does not answer for {limit:.0f} s"))
        except PeerLost as lost:
            raise ServerLost(f"{who}, is gone: {str(lost).partition(': ')[2]}") from None
