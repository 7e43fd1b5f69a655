"""Seconds of one microbatch on each rank of a pipeline: all that the schedule and the data axis do not change.

    forward     FLOPs / speed + bytes / bandwidth + ops x overhead + attention beyond its FLOPs + collectives
    backward    twice the products and bytes, the same collectives; with recomputation a forward more

tp: a sum of the boundary's size per branch; on a grid broadcasts of panels for every product, twice that in the
backward (SUMMA). cp: work, activations and what goes through pipelines are 1/cp; ring: keys
and values go round (cp-1 messages of a block, backward twice that, hidden by the attention of a block where a network
carries them); ulysses: two all_to_alls each way. ep: two all_to_alls of the chosen rows each way per mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.launch.plan.layout import Job, Layout
from dtrain.launch.plan.stages import Stage
from dtrain.strategies.context.ulysses import copies

ROWS = 64  # of queries that attention takes at once
JOINS = 6  # passes over the results of two blocks of a ring that are joined, each of about two calls of NumPy


@dataclass(frozen=True)
class Work:
    """Seconds of a microbatch on each rank of the pipeline: all that the schedule and the data axis do not change."""

    stages: tuple[Stage, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    tensor: tuple[float, ...]
    """Of both together, what collectives of tp, cp and ep take."""
    transfer: float
    microbatches: int

    @property
    def slowest(self) -> float:
        """The seconds of the rank that has most to do."""
        return max(f + b for f, b in zip(self.forward, self.backward, strict=True))


def work(job: Job, layout: Layout, cut: tuple[Stage, ...]) -> Work:
    """The seconds of one microbatch of a layout."""
    machine, b = job.machine, layout.micro_batch
    threads = machine.threads()
    forward, backward, tensor = [], [], []
    for stage in cut:
        compute = b * (stage.products / machine.flops + stage.moved / machine.bandwidth) / threads
        compute += stage.blocks * attention(job, layout)
        overhead = stage.ops * machine.per_op
        there, back = _context(job, layout, stage)
        reduces = _products(job, layout, stage) + _exchanges(job, layout, stage)
        again = (compute + overhead + reduces + there) if layout.recompute else 0.0
        forward.append(compute + overhead + reduces + there)
        backwards = reduces * (2 if layout.tensor == "2d" else 1)  # of a product on a grid the gradients are two more
        backward.append(2 * compute + 2 * overhead + backwards + back + again)
        tensor.append(reduces * (1 + layout.recompute) + backwards + there * (1 + layout.recompute) + back)
    stride = job.ranks // layout.pp
    passed = b * job.profile.boundary / layout.cp / (layout.tp if layout.tensor == "2d" else 1)
    transfer = machine.message(stride, passed) if layout.pp > 1 else 0.0
    count = job.global_batch // layout.data // b
    return Work(cut, tuple(forward), tuple(backward), tuple(tensor), transfer, count)


def attention(job: Job, layout: Layout) -> float:
    """Seconds of the attention of one block and microbatch beyond its FLOPs, forward: many products of small matrices.

    The kernel takes 64 rows of queries at once, of all heads of a sample; a ring many blocks of queries and keys, whose
    results it joins: of the 2cp runs of tokens each rank has two, and leaves out what the mask hides.
    """
    machine, profile, cp = job.machine, job.profile, layout.cp
    if not profile.tokens:
        return 0.0
    rows, columns = layout.grid
    heads = layout.micro_batch / rows * profile.query_heads * -(-profile.kv_heads // columns) / profile.kv_heads
    scores = heads * profile.length**2 / cp * machine.per_score
    if cp == 1 or layout.context == "ulysses":
        return scores + heads / cp * -(-profile.length // ROWS) * machine.per_head
    pairs, runs = (2 * cp + 1, 2 * cp) if profile.causal else (cp, cp)
    turns = -(-profile.length // runs // ROWS)
    joined = layout.micro_batch * profile.boundary / layout.tp / runs * JOINS / machine.bandwidth
    return scores + pairs * (heads * turns * machine.per_head + joined + 2 * JOINS * machine.per_op)


def _products(job: Job, layout: Layout, stage: Stage) -> float:
    """Seconds of what the products of a microbatch exchange over tp in one direction.

    On a grid, of each product and panel: a broadcast along the row, one along the column, an addition to the result.
    """
    if layout.tensor == "1d":
        return stage.reduces * _sum(job, layout)
    machine, b, (rows, columns) = job.machine, layout.micro_batch, layout.grid
    panels = rows + columns - math.gcd(rows, columns)
    calls = max(1, stage.matrices * panels)
    fed, weights = b * stage.fed / rows / calls, stage.weights * job.profile.itemsize / columns / calls
    each = (
        machine.collective("broadcast", columns, 1, fed)[0] + machine.collective("broadcast", rows, columns, weights)[0]
    )
    added = 2 * panels * b * stage.made / layout.tp / machine.bandwidth
    norms = stage.norms * machine.collective("all_gather", columns, 1, 0.0)[0]
    return calls * each + added + norms


def _sum(job: Job, layout: Layout) -> float:
    """Seconds of the sum of a branch's output over tp. With `sequence` it is a reduce_scatter, the next branch begins
    with an all_gather, and tokens, which are no outer dim, are brought in order before the one and after the other."""
    machine, whole = job.machine, layout.micro_batch * job.profile.boundary / layout.cp
    if not layout.sequence:
        return machine.collective("all_reduce", layout.tp, 1, whole)[0]
    both = sum(machine.collective(kind, layout.tp, 1, whole)[0] for kind in ("reduce_scatter", "all_gather"))
    return both + 2 * whole / machine.bandwidth


def _context(job: Job, layout: Layout, stage: Stage) -> tuple[float, float]:
    """Seconds of what attention sends along cp, forward and backward, of one microbatch."""
    machine, cp, b = job.machine, layout.cp, layout.micro_batch
    if cp == 1:
        return 0.0, 0.0
    kv = b * job.profile.kv_bytes / cp / layout.tp
    if layout.context == "ulysses":
        q = b * job.profile.boundary / cp / layout.tp
        q_heads, kv_heads = job.profile.query_heads // layout.tp, job.profile.kv_heads // layout.tp
        kind = "exchange" if copies(q_heads, kv_heads, cp) * kv_heads % cp else "all_to_all"
        seconds = sum(machine.collective(kind, cp, layout.tp, each)[0] for each in (q + kv, q))
        seconds += (3 * (q + kv) + 2 * q) / machine.bandwidth  # heads in the order of ranks; blocks taken apart, joined
        return stage.blocks * seconds, stage.blocks * seconds
    one = machine.message(layout.tp, kv)
    _, inside = machine.level(layout.tp * (cp - 1) + 1)
    # The attention of one block of keys, of all the work of a block of the model at least a tenth.
    meanwhile = 0.0 if inside else 0.1 * b * stage.products / max(1, stage.blocks) / machine.flops / cp
    there = (cp - 1) * (max(0.0, one - meanwhile) + 3 * machine.per_op)
    back = (cp - 1) * (max(0.0, 2 * one - 2 * meanwhile) + 6 * machine.per_op)
    return stage.blocks * there, stage.blocks * back


def _exchanges(job: Job, layout: Layout, stage: Stage) -> float:
    """Seconds in which rows go to their experts and come back, in one direction of a microbatch."""
    if layout.ep == 1 or not stage.mixtures:
        return 0.0
    stride = layout.tp * layout.cp
    rows = layout.micro_batch * stage.rows / stage.mixtures / layout.cp
    counts = job.machine.collective("all_gather", layout.ep, stride, 8.0 * job.profile.experts * layout.ep)[0]
    return stage.mixtures * (2 * job.machine.collective("exchange", layout.ep, stride, rows)[0] + counts)
