"""`dtrain run`: train as the configuration says, tell about it, and leave a folder behind (`run_folder.py`).

All decisions (resume, stop) are made from what all ranks see alike, or by rank 0 for all; rank 0 tells.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain import __version__, kernels
from dtrain.collectives import Communicator, world
from dtrain.config import Config, idle
from dtrain.launch import assembly, configuration, environment, experts, memory, timelines
from dtrain.launch.progress import Progress
from dtrain.launch.run_folder import RunFolder
from dtrain.launch.trace import Trace
from dtrain.launch.traffic import Traffic, table
from dtrain.trainer import Trainer


def run(config: Config, source: Path, comm: Communicator | None = None) -> None:
    """Train `config` (read from `source`) to its last step on all ranks of the job, or of `comm`. Collective."""
    if config.parameter_server.servers:
        from dtrain.launch.parameter_server import run_served

        return run_served(config, source, comm)
    if comm is None:
        comm = world()
        environment.check_world(comm.size)
    config, why = assembly.planned(config, comm)
    trainer = assembly.assemble(config, comm)
    folder = RunFolder(Path(config.output) / config.name, trainer)
    resumed = folder.open(source)
    comm.report_to(folder.path)
    with Progress(config, trainer.total_steps, trainer.step, on=comm.rank == 0) as progress:
        plan = [f"plan   {line}" for line in why]
        for line in [*header(trainer), *plan, *memory.lines(folder.memory), *resumed]:
            progress.note(line)
        if folder.finished:
            return
        started, first_step = time.perf_counter(), None
        traffic, first, told = Traffic(trainer.mesh), trainer.step, False
        trace = Trace(trainer, config.log.trace)
        for record in trace.watch(trainer.run()):
            first_step = first_step or time.time()
            folder.record(record)
            progress.update(record)
            if record.details and progress.tells(record.step):
                progress.note(experts.line(record.details))
            if not told and progress.tells(record.step):
                told = True
                for line in table(traffic.rows(record.step - first), "communication per step, until now"):
                    progress.note(line)
            every = config.checkpoint.every
            if every and (record.step % every == 0 or record.step == trainer.total_steps):
                folder.save()
        collectives = traffic.rows(trainer.step - first)
        timeline, speaker = timelines.measured(trainer), folder.speaker()
        folder.measure()
        if trainer.step > first + 1:
            for line in table(collectives, f"communication per step, mean of {trainer.step - first} steps"):
                progress.note(line)
        for line in folder.trace(trace):
            progress.note(line)
        for line in folder.close(time.perf_counter() - started, first_step, collectives, timeline, speaker):
            progress.note(line)


def header(trainer: Trainer) -> Iterator[str]:
    """What to know before the first step: machine, mesh, data, model."""
    config, mesh = trainer.config, trainer.mesh
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "?")
    yield (
        f"dtrain {__version__}  {mesh.comm.size} rank{'s' * (mesh.comm.size > 1)} on "
        f"{len(set(mesh.comm.hosts))} host{'s' * (len(set(mesh.comm.hosts)) > 1)}, {environment.cores()} cores each, "
        f"{threads} BLAS thread{'s' * (threads != '1')} per rank, kernels: {kernels.describe()}"
    )
    yield from mesh.table()
    if mesh.comm.size > 1:
        yield f"auto   {described(mesh.comm)}"
    yield from task(trainer)
    for strategy in trainer.strategies:
        yield from (f"{strategy.axis:<6} {note}" for note in strategy.notes())
    yield from (f"note   {line}" for line in idle(config))


def task(trainer: Trainer) -> Iterator[str]:
    """What was asked for: the configuration with the layout it resolved to; what is to be learned, and by what."""
    config = trainer.config
    yield f"config as resolved; every key: {Path(config.output) / config.name / 'config.yaml'}"
    yield from (f"       {line}" for line in configuration.brief(config))
    yield f"data   {trainer.data.description}"
    yield f"       unigram entropy {trainer.data.entropy:.4f} nats: a model that learns falls below this loss"
    yield (
        f"model  {config.model.kind}, {trainer.num_parameters:,} parameters, {config.train.dtype}; "
        f"{config.optimizer.kind}, global batch {config.train.global_batch}, {trainer.total_steps} steps"
    )


def described(comm: Communicator) -> str:
    """By what the algorithms of the collectives are chosen."""
    if comm.tuning is not None:
        return comm.tuning.table.describe()
    return "algorithms of the collectives by the built-in rule; `dtrain bench tune` measures this machine"
