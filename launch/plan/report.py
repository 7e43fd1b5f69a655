"""What a plan says: the best meshes in a table, their time and memory in parts, and why this one, in a few sentences.

The guide is that of the field: a model that fits is trained data-parallel; state that does not fit is sharded (ZeRO);
layers that are too large are cut inside a node (tensor parallelism); a deep model is cut into stages (pipeline).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dtrain.graph import short
from dtrain.launch.plan.amounts import total
from dtrain.launch.plan.costs import Cost, cost
from dtrain.launch.plan.layout import Job, Layout
from dtrain.launch.plan.machine import Machine
from dtrain.launch.plan.microbatch import work
from dtrain.launch.plan.stages import Stage, stages

TIMES = ("compute", "tensor", "bubble", "data", "update")
BYTES = ("parameters", "gradients", "optimizer", "activations", "work")


def table(found: Sequence[Cost]) -> Iterator[str]:
    """A row per mesh."""
    yield (
        f"{'dp':>4}{'ep':>4}{'cp':>4}{'tp':>4}{'pp':>4}  "
        f"{'data':<6}{'schedule':<12}{'micro':>6}{'count':>6}  {'options':<18}"
        f"{'step':>10}{'memory':>9}"
    )
    for each in found:
        layout = each.layout
        options = " ".join(layout.options) or "-"
        schedule = layout.schedule if layout.pp > 1 else "-"
        kind = layout.data_parallel if layout.data * layout.cp > 1 else "-"
        yield (
            f"{layout.dp:>4}{layout.ep:>4}{layout.cp:>4}{layout.tp:>4}{layout.pp:>4}  "
            f"{kind:<6}{schedule:<12}{layout.micro_batch:>6}"
            f"{each.microbatches:>6}  {options:<18}{seconds(each.seconds):>10}{short(int(each.memory), 1024) + 'B':>9}"
        )


def parts(found: Sequence[Cost]) -> Iterator[str]:
    """Of each row, where its time and its memory go."""
    yield "time of a step:      " + "".join(f"{name:>13}" for name in TIMES)
    for each in found:
        yield f"  {mesh(each.layout):<19}" + "".join(f"{seconds(getattr(each, name)):>13}" for name in TIMES)
    yield "memory of a rank:    " + "".join(f"{name:>13}" for name in BYTES)
    for each in found:
        row = (f"{short(int(getattr(each, name)), 1024) + 'B':>13}" for name in BYTES)
        yield f"  {mesh(each.layout):<19}" + "".join(row)
    yield (
        "tensor: collectives of tp, cp, ep; bubble: waiting for other stages, messages, shared cores; data: gradients "
        "and parameters along dp.\nactivations: of the microbatches in flight; work: what a backward has at once. "
        "Besides these every rank has the program itself, 100 MiB."
    )


def reasons(job: Job, chosen: Cost) -> Iterator[str]:
    """Why this layout, from one rung of the guide to the next."""
    limit, layout, profile = job.machine.memory, chosen.layout, job.profile
    if limit == float("inf"):
        yield "No memory limit is given (--memory): only time counts."
    alone = [candidate for candidate in _data_parallel(job) if candidate is not None]
    ddp = min((c for c in alone if c.layout.data_parallel == "ddp"), key=lambda c: c.memory, default=None)
    zero = min((c for c in alone if c.layout.data_parallel != "ddp"), key=lambda c: c.memory, default=None)
    state = total_state(job)
    if ddp is None:
        yield (
            f"The global batch {job.global_batch} cannot be shared out over {job.ranks} ranks: data parallelism alone "
            "is not possible."
        )
    elif ddp.memory <= limit:
        yield (
            f"It fits: parameters, gradients and optimizer ({size(state)}) and the activations of a microbatch are "
            f"{size(ddp.memory)} on a rank, so plain data parallelism can be used."
        )
    elif zero is not None and zero.memory <= limit:
        yield (
            f"It does not fit on every rank ({size(ddp.memory)} at least, allowed {size(limit)}): the state must be "
            f"sharded, and {zero.layout.data_parallel} does ({size(zero.memory)})."
        )
    else:
        least = ddp if zero is None else min(ddp, zero, key=lambda c: c.memory)
        yield (
            f"Data parallelism alone does not fit ({size(least.memory)} at least, allowed {size(limit)}), even with "
            "ZeRO: the model must be cut."
        )
    if layout.data * layout.cp > 1:
        why = {
            "ddp": "every rank keeps the whole state of its part",
            "zero1": "the optimizer's state is sharded, for no more bytes sent than ddp",
            "zero2": "gradients are sharded too",
            "zero3": "parameters are sharded too, at 3/2 of ddp's bytes",
        }[layout.data_parallel]
        names = [f"{axis}={getattr(layout, axis)}" for axis in ("dp", "ep", "cp") if getattr(layout, axis) > 1]
        yield f"{' '.join(names)} with {layout.data_parallel}: {why}."
    if layout.tensor == "2d":
        rows, columns = layout.grid
        yield (
            f"tp={layout.tp} as a grid of {rows} x {columns} (tensor: 2d, SUMMA): every matrix and every activation is "
            f"1/{layout.tp}, for broadcasts of panels in each product."
        )
    elif layout.tp > 1:
        node = "inside a node" if layout.tp <= job.machine.per_node else "ACROSS nodes, which is slow"
        largest = max(total(block.parameters) for block in profile.blocks) * profile.itemsize
        yield (
            f"tp={layout.tp}: layers ({size(largest)} of parameters each) and their activations are cut, {node}, for "
            f"{profile.tensor_reduces} all_reduces per block and direction."
        )
    if layout.pp > 1:
        depth = len(profile.blocks)
        yield (
            f"pp={layout.pp}: {depth} blocks are deep enough for {layout.pp} stages; a stage sends only activations. "
            f"{layout.schedule} with {chosen.microbatches} microbatches has {chosen.in_flight} in flight."
        )
    if layout.cp > 1:
        how = {
            "ring": "keys and values go round the ranks",
            "ulysses": "two all_to_alls per attention give each rank all tokens of some heads",
        }
        yield (
            f"cp={layout.cp}: the tokens of a sample are cut, and the activations of a microbatch with them; "
            f"{layout.context}: {how[layout.context]}."
        )
    if layout.ep > 1:
        experts = sum(block.parameters.experts for block in profile.blocks) * profile.itemsize
        yield (
            f"ep={layout.ep}: each rank has {profile.experts // layout.ep} or one more of {profile.experts} experts "
            f"({size(experts)} in all) and sends rows to them; their gradients are summed over dp alone."
        )
    if layout.recompute:
        yield "recompute: activations of a block are computed again in the backward, one forward more for the memory."
    if layout == Layout(job.ranks, micro_batch=layout.micro_batch):
        yield "Nothing else is faster: cutting the model would add messages or waiting and save nothing that is short."


def total_state(job: Job) -> float:
    """Bytes of parameters, gradients and optimizer of the whole model."""
    profile = job.profile
    only = cost(job, Layout(), work(job, Layout(), stages(profile, Layout())))
    assert only is not None
    return only.parameters + only.gradients + only.optimizer


def _data_parallel(job: Job) -> Iterator[Cost | None]:
    """Data parallelism alone, with the smallest microbatch."""
    if job.global_batch % job.ranks:
        return
    plain = Layout(job.ranks)
    cut: tuple[Stage, ...] = stages(job.profile, plain)
    for kind in ("ddp", "zero1", "zero2", "zero3"):
        for recompute in (False, True):
            layout = replace(plain, data_parallel=kind, recompute=recompute)
            yield cost(job, layout, work(job, layout, cut))


def assumed(machine: Machine) -> str:
    """The machine in a line."""
    how = "measured" if machine.measured else "given"
    levels = "; ".join(
        f"{level.name}: {level.alpha * 1e6:g} µs + {level.beta * 1e9:g} ns/B" for level in machine.levels()
    )
    limit = "" if machine.memory == float("inf") else f", {size(machine.memory)} per rank"
    return (
        f"{machine.cores} cores and {machine.per_node} ranks per node{limit}; a core: "
        f"{machine.flops / 1e9:.3g} GFLOP/s ({how}); {levels}"
    )


def mesh(layout: Layout) -> str:
    """The degrees."""
    sizes = {axis: getattr(layout, axis) for axis in ("dp", "ep", "cp", "tp", "pp")}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1 or axis == "dp")


def size(nbytes: float) -> str:
    """In binary units."""
    return short(int(nbytes), 1024) + "B"


def seconds(value: float) -> str:
    """With a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    return ""
