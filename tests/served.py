"""Tiny runs with parameter servers on the ranks of a communicator, workers first."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.collectives import Communicator, sockets
from dtrain.collectives.threads import RankLost
from dtrain.config import Config
from dtrain.data import Data
from dtrain.launch import assembly
from dtrain.launch.configuration import for_ranks
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.strategies.parameter_server import Lead, Serve, Server, Worker, needs_whole
from dtrain.strategies.parameter_server.worker import ServerLost
from dtrain.trainer import StepRecord, Trainer
from tests import training

BASE: dict[str, Any] = {
    "model": {"kind": "gpt", "layers": 1, "dim": 16, "heads": 2, "sequence": 8},
    "train": {"steps": 3, "global_batch": 12, "micro_batch": 2, "validate": {"every": 2, "batches": 2}},
}
"""A small model, three steps."""


class Gate:
    """Holds a worker in its first step until it is opened."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def hold(self, worker: Any) -> None:
        """Before the run, on the worker that is to be held."""
        compute = worker.execute

        def held(microbatches: Any) -> Any:
            self.reached.set()
            assert self.open.wait(50)
            return compute(microbatches)

        worker.execute = held


class Killed(BaseException):
    """What a worker raises to end as a killed process does: its sockets are closed, and that is all."""


@dataclass
class Served:
    """What a rank has when the run is over; `records` and `lead` on the first server."""

    server: Server | None = None
    worker: Worker | None = None
    records: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    """Flat pieces of the parameters that a server has: name -> (start, values)."""
    sent: int = 0
    received: int = 0

    @property
    def lead(self) -> Lead:
        assert isinstance(self.server, Lead)
        return self.server


def serve(
    comm: Communicator,
    prepare: Callable[[Worker], None] = lambda worker: None,
    folder: Path | None = None,
    resume: Path | None = None,
    records: list[StepRecord] | None = None,
    watch: Callable[[Lead], None] = lambda lead: None,
    tells: bool = False,
    **sections: Any,
) -> Served:
    """Run to the end. `prepare` may change a worker before it begins, `watch` the lead; `folder`: for checkpoints;
    `records`: the list to fill; `tells`: a worker that fails tells the lead, as in a run of the command line."""
    config = for_ranks(training.config(**sections), comm.size)
    data, model = assembly.parts(config, comm)
    if config.parameter_server.transport == "sockets":
        comm = sockets.connect(comm)
    try:
        return _serve(comm, config, data, model, prepare, folder, resume, records, watch, tells)
    except ServerLost as lost:  # never the first failure: that of the server may be noted a moment later
        raise RankLost(str(lost)) from lost
    finally:  # so that the others notice when this rank has failed
        if comm.transport.name == "sockets":
            comm.transport.close()


def _serve(
    comm: Communicator,
    config: Config,
    data: Data,
    model: Model,
    prepare: Callable[[Worker], None],
    folder: Path | None,
    resume: Path | None,
    records: list[StepRecord] | None,
    watch: Callable[[Lead], None],
    tells: bool,
) -> Served:
    servers = config.parameter_server.servers
    mine = comm.split(int(comm.rank >= comm.size - servers))
    assert mine is not None
    done = Served(records=[] if records is None else records)
    if comm.rank < comm.size - servers:
        done.worker = worker = Worker(comm, config, data, model)
        prepare(worker)
        comm.counters.reset()
        try:
            worker.work()
        except MemoryError as error:
            if not tells:
                raise
            worker.fail(error)
        except Killed:
            return done
    else:
        trainer = Trainer(config, Mesh(mine, dp=-1), data, model, [Serve(needs_whole(config.optimizer.kind))])
        if resume is not None:
            trainer.load(resume)
        save = (lambda: None) if folder is None else (lambda: (trainer.save(folder), None)[1])
        if mine.rank == 0:
            done.server = Lead(comm, trainer, save, done.records.append, done.notes.append)
            watch(done.server)
        else:
            done.server = Server(comm, trainer, save)
        comm.counters.reset()
        done.server.serve()
        for group in trainer.flat.groups:
            for piece in group.pieces(group.owned):
                done.parameters[piece.name] = piece.inside.start, group.data[piece.where].copy()
    volume = comm.counters.volume()
    done.sent, done.received = volume.sent, volume.received
    return done


def whole(results: list[Served], like: dict[str, Any]) -> dict[str, Any]:
    """The parameters, put together from all servers, in the shapes of `like`."""
    found = {name: np.full(values.size, np.nan, values.dtype) for name, values in like.items()}
    for result in results:
        for name, (start, values) in result.parameters.items():
            found[name][start : start + values.size] = values
    return {name: values.reshape(like[name].shape) for name, values in found.items()}
