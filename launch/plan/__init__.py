"""Auto-mesh: degrees, schedule, microbatches, recomputation for a number of ranks and a memory limit, and why.

profile.py      what a sample costs in each part of the model       search.py   the cheapest legal layouts
machine.py      what the machine does in a second (speeds.py)       report.py   the table and the reasons
stages.py       what a rank of a layout has of the model            compare.py  the best beside what they really take
microbatch.py   seconds of a microbatch on each rank                layers/     layer by layer instead: --layers
costs.py        time and memory of a step of one layout (pace.py: of its pipeline)

`parallel: auto` in a configuration takes the first row of what `dtrain plan` prints.
"""

from __future__ import annotations

from pathlib import Path

from dtrain.arrays import named_dtype
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch import environment
from dtrain.launch.plan import report
from dtrain.launch.plan.costs import Cost
from dtrain.launch.plan.layout import Job
from dtrain.launch.plan.machine import Machine
from dtrain.launch.plan.profile import profile
from dtrain.launch.plan.search import applied, cheapest
from dtrain.launch.plan.speeds import Speeds, measured

EVERY = 1 << 20  # meshes
MODELS = ("gpt", "moe_gpt", "bert", "mlp")


def plan(
    config: Config,
    ranks: int,
    memory: float | None,
    per_node: int | None,
    cores: int | None,
    speed: float | None,
    cluster: Path | None,
    explain: bool,
    count: int,
    layers: bool = False,
    runs: int = 0,
) -> None:
    """Print the best layouts of `config`. memory: bytes per rank; speed: FLOP/s of a core, None: measured here.

    layers: those of every layer, instead of the degrees of all together. runs: how many are run, to compare.
    """
    where = machine(config, ranks, memory, per_node, cores, speed, cluster)
    if layers:
        from dtrain.launch.plan.layers import plan_layers

        plan_layers(config, ranks, where, explain)
        return
    job = make_job(config, ranks, where)
    best, smallest, costed = cheapest(job, config, max(count, EVERY if runs else 0))
    print(f"{config.name}: {config.model.kind}, {job.profile.parameters:,.0f} parameters, global batch "
          f"{job.global_batch}, {ranks} ranks")  # fmt: skip
    print(f"{report.assumed(job.machine)}\n")
    if not best:
        raise UserError(nothing_fits(job, smallest))
    print("\n".join(report.table(best[:count])))
    if explain:
        print("\n" + "\n".join(report.parts(best[:count])))
    print("\n" + "\n".join(report.reasons(job, best[0])))
    print(f"\n{as_overrides(best[0])}\n{costed} layouts costed")
    if runs:
        from dtrain.launch.plan.compare import compare

        print()
        compare(config, best, ranks, runs)


def chosen(config: Config, ranks: int, per_node: int) -> tuple[Config, list[str]]:
    """The configuration with the best layout written in, and what to tell about it. Deterministic but for the speed of
    this machine: one rank decides for all."""
    memory = None if config.parallel.memory_gb is None else config.parallel.memory_gb * 2**30
    job = make_job(config, ranks, machine(config, ranks, memory, per_node, None, None, None))
    best, smallest, _ = cheapest(job, config, 1)
    if not best:
        raise UserError(nothing_fits(job, smallest))
    told = [*report.table(best), *report.reasons(job, best[0])]
    return applied(config, best[0].layout), told


def make_job(config: Config, ranks: int, where: Machine) -> Job:
    """What is to be planned."""
    from dtrain.data import data_of

    if config.model.kind not in MODELS:
        raise UserError(
            f"model.kind: {config.model.kind}; a plan can be made for {', '.join(MODELS)}. A recommender is "
            "data-parallel (parallel.dp), its tables cut by parallel.embedding: `dtrain plan --layers` shows what its "
            "ops ask for"
        )
    return Job(profile(config, data_of(config)), where, ranks, config.train.global_batch, config.optimizer.kind)


def machine(
    config: Config,
    ranks: int,
    memory: float | None,
    per_node: int | None,
    cores: int | None,
    speed: float | None,
    cluster: Path | None,
) -> Machine:
    """What is known of the machine; None: this machine, all ranks on it."""
    dtype = named_dtype(config.train.dtype)
    known: Speeds | Machine
    try:
        known = measured(dtype.name if dtype.itemsize >= 4 else "float32")  # BLAS has no halves
    except UserError:
        if speed is None:
            raise
        known = Machine()  # of a core of another machine, scaled to the speed that was given
    described = None
    if cluster is not None:
        from dtrain.launch.show_collective import read_cluster

        described = read_cluster(cluster, "--cluster")
        per_node = per_node or described.levels[0].ranks or None
    here = cores is None and speed is None and cluster is None
    faster = 1.0 if speed is None else speed / known.flops  # a faster core is so in everything
    return Machine(
        cluster=described,
        flops=known.flops * faster,
        bandwidth=known.bandwidth * faster,
        per_op=known.per_op / faster,
        per_head=known.per_head / faster,
        per_score=known.per_score / faster,
        together=known.together if here else 1.0,
        cores=cores or (environment.cores() if here else per_node or ranks),
        per_node=min(ranks, per_node or ranks),
        memory=float("inf") if memory is None else memory,
        measured=speed is None,
    )


def nothing_fits(job: Job, smallest: Cost | None) -> str:
    """The message when there is no layout."""
    if smallest is None:
        return (
            f"train.global_batch: {job.global_batch}; no layout of {job.ranks} ranks can share it out: "
            f"allowed are multiples of {job.ranks}, or fewer ranks"
        )
    return (
        f"memory: {report.size(job.machine.memory)} per rank; nothing fits. The least is "
        f"{report.size(smallest.memory)}, with {report.mesh(smallest.layout)}: allow more, or start more ranks"
    )


def as_overrides(best: Cost) -> str:
    """The choice as arguments of `dtrain run`."""
    layout = best.layout
    parts = [f"parallel.{axis}={getattr(layout, axis)}" for axis in ("dp", "ep", "cp", "tp", "pp")]
    parts += [f"parallel.context={layout.context}"] * (layout.cp > 1)
    parts += [f"parallel.data_parallel={layout.data_parallel}"] * (layout.data * layout.cp > 1)
    parts += ["parallel.sequence=true"] * layout.sequence + ["parallel.tensor=2d"] * (layout.tensor == "2d")
    parts += [f"pipeline.schedule={layout.schedule}"] * (layout.pp > 1)
    parts += [f"train.micro_batch={layout.micro_batch}", f"train.recompute={str(layout.recompute).lower()}"]
    return " ".join(parts)
