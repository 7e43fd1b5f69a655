"""`dtrain run` with parameter servers: the one place where ranks part into workers and servers.

    ranks 0 .. workers - 1     compute; they write and tell nothing
    the other ranks            serve; the first of them leads: it tells, and writes the folder of the run as rank 0 does
                               elsewhere; all servers write their range to a checkpoint

A worker that fails in a mode that can go on without it tells the lead why and waits for the end. Where one has fallen
silent or is gone, the others end the job when they are done, as MPI's own end would wait for it. A process that is
killed takes the job with it, unless `transport: sockets`: then nobody calls MPI any more after the start, and a worker
has somebody who stands in for it (`stand_in.py`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain import __version__, kernels
from dtrain.collectives import Communicator, sockets, world
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch import assembly, environment, failures, pictures, stand_in
from dtrain.launch.configuration import for_ranks
from dtrain.launch.progress import Progress
from dtrain.launch.run import task
from dtrain.launch.run_folder import RunFolder
from dtrain.mesh import Mesh
from dtrain.strategies.parameter_server import Lead, Serve, Server, ServerLost, Worker, needs_whole
from dtrain.trainer import StepRecord, Trainer

ENDING = 2.0  # seconds that the survivors have to leave before the job is ended


def run_served(config: Config, source: Path, comm: Communicator | None = None) -> None:
    """Train on workers and servers. Collective over `comm`, all ranks of the job."""
    rank = None
    if comm is None:
        if config.parameter_server.transport == "sockets" and environment.job().size > 1:
            rank = stand_in.begin()
        comm = world()
        environment.check_world(comm.size)
    config = for_ranks(config, comm.size)
    data, model = assembly.parts(config, comm)
    if config.parameter_server.transport == "sockets":
        comm = sockets.connect(comm)
        if rank is not None and comm.rank < comm.size - config.parameter_server.servers:
            rank.replaceable()
    first_server = comm.size - config.parameter_server.servers
    mine = comm.split(int(comm.rank >= first_server), name="workers" if comm.rank < first_server else "servers")
    assert mine is not None
    if comm.rank < first_server:
        lost = work(Worker(comm, config, data, model))
    else:
        trainer = Trainer(config, Mesh(mine, dp=-1), data, model, [Serve(needs_whole(config.optimizer.kind))])
        lost = serve(comm, trainer, source)
    if lost:
        time.sleep(ENDING if comm.rank == first_server else 2 * ENDING)
        failures.end_without_the_dead(0)


def work(worker: Worker) -> bool:
    """Compute until the end; whether a rank has died meanwhile."""
    options = worker.options
    try:
        return worker.work()
    except ServerLost:
        time.sleep(ENDING)  # a server that has ended the job has told why; only else this is news
        raise
    except UserError:
        raise
    except Exception as error:
        if options.mode in ("sync", "local_sgd") and options.quorum == 1:
            raise  # nobody could go on: this traceback says more than the lead could
        traceback.print_exc()
        return worker.fail(error)


def serve(comm: Communicator, trainer: Trainer, source: Path) -> bool:
    """Serve until the end, and write about it; whether a rank has died meanwhile."""
    config, servers = trainer.config, trainer.mesh.comm
    folder = ServedFolder(Path(config.output) / config.name, trainer)
    resumed = folder.open(source)
    comm.report_to(folder.path)
    with Progress(config, trainer.total_steps, trainer.step, on=servers.rank == 0) as progress:
        if servers.rank > 0:
            server = Server(comm, trainer, folder.save)
            server.serve()
            if not folder.finished:
                folder.speaker()
                folder.measure()
            return bool(server.lost)
        started, first_step = time.perf_counter(), 0.0

        def record(step: StepRecord) -> None:
            nonlocal first_step
            first_step = first_step or time.time()
            folder.record(step)
            progress.update(step)

        lead = Lead(comm, trainer, folder.save, record, progress.note)
        folder.lead = lead
        for line in [*described(lead), *resumed]:
            progress.note(line)
        lead.serve()
        if not folder.finished:
            folder.more = {"parameter_server": lead.summary()}
            speaker = folder.speaker()
            folder.measure()
            for line in folder.close(time.perf_counter() - started, first_step, None, None, speaker):
                progress.note(line)
        return bool(lead.lost)


def described(lead: Lead) -> Iterator[str]:
    """What to know before the first step: machine, data, model, and who does what."""
    options, trainer, hosts = lead.options, lead.trainer, lead.comm.hosts
    yield (
        f"dtrain {__version__}  {len(hosts)} ranks on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}, "
        f"{environment.cores()} cores each, kernels: {kernels.describe()}"
    )
    yield from task(trainer)
    how = {
        "sync": f"an update from {lead.ledger.quorum} of {lead.num_workers} workers",
        "async": "an update per gradient",
        "ssp": f"an update per gradient, no worker more than {options.staleness} ahead of the slowest",
        "local_sgd": f"averages every {options.period} steps",
    }[options.mode]
    yield f"server {options.mode}: {lead.num_workers} workers, {lead.servers.size} servers, {how}"
    elements = [shard.ranges for shard in lead.shards]
    for server, ranges in enumerate(elements):
        told = ", ".join(f"{part.start}..{part.stop}" for part in ranges)
        nbytes = sum(
            (part.stop - part.start) * group.dtype.itemsize
            for part, group in zip(ranges, trainer.flat.groups, strict=True)
        )
        yield f"       server {server} on rank {lead.num_workers + server}: elements {told}, {nbytes:,} bytes"


class ServedFolder(RunFolder):
    """The folder of a run that servers write. Only the lead records: the largest memory is what it was told."""

    lead: Lead | None = None

    def _largest(self, number: int) -> int:
        told = [] if self.lead is None else [worker.memory for worker in self.lead.ledger.workers]
        return max(number, *told)

    def measure(self) -> None:
        """As of any run; workers come before servers and told theirs with their gradients."""
        super().measure()
        if self.lead is not None:
            self.peaks = [worker.memory for worker in self.lead.ledger.workers] + self.peaks

    def close(self, *arguments: Any) -> Iterator[str]:
        """As of any run, with what was measured about staleness."""
        yield from super().close(*arguments)
        if self.lead is None:
            return
        found = self.lead.summary()
        counts = {int(key): int(count) for key, count in found["staleness"].items()}  # type: ignore[attr-defined]
        title = f"{self.trainer.config.name}: updates between pull and push of a gradient"
        self._write_text("staleness.svg", pictures.histogram(counts, title, "staleness, updates", "gradients"))
        yield from told(found, counts)
        yield f"staleness: {self.path / 'staleness.svg'}"


def told(found: dict[str, Any], counts: dict[int, int]) -> Iterator[str]:
    """For the log: who computed how much, and how stale it was."""
    dropped = found["dropped_by_worker"]
    for worker, gradients in enumerate(found["gradients_by_worker"]):
        more = f", {dropped[worker]} dropped" if dropped[worker] else ""
        lost = f"; lost: {found['lost'][str(worker)]}" if str(worker) in found["lost"] else ""
        yield f"worker {worker}: {gradients} gradients used{more}{lost}"
    most = max(counts.values(), default=1)
    for staleness, count in sorted(counts.items()):
        yield f"staleness {staleness:>3} {count:>7}  {'█' * max(1, round(40 * count / most))}"
