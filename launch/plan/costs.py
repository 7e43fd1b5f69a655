"""Time of a step and memory of a rank for one layout: sums that can be checked by hand.

    forward of a microbatch   FLOPs / speed + bytes / bandwidth + ops x overhead + collectives of tp
    backward                  twice the products and bytes, the same collectives; with recomputation a forward more
    pipeline                  the schedule's timeline at the pace of the slowest stage; ranks that wait leave their
                              cores to others, and no node does more at once than it has cores
    step                      pipeline + gradients and parameters of the data axis + update

    memory                    parameters + gradients + optimizer + activations in flight + work + the program

Bytes of the data axis (Ψ of a rank's stage): ddp, zero1, zero2 2Ψ, zero3 3Ψ, stage 2 and 3 with every microbatch where
there is no pipeline. Inside a node ZeRO's parameters are shared: nothing is gathered, and Ψ of parameters is 1/dp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from dtrain.launch.plan.machine import PROGRAM, Machine
from dtrain.launch.plan.profile import Amount, Part, Profile, total
from dtrain.strategies.pipeline.cut import balanced
from dtrain.strategies.pipeline.schedules import SCHEDULES, Program, ScheduleError, programs
from dtrain.strategies.pipeline.timeline import Timeline, peak_in_flight

WORKING = 3.0  # arrays of the largest output that a backward has at once beside what was kept
STATES = {"sgd": 1.0, "adam": 2.0, "adamw": 2.0, "lamb": 2.0, "adafactor": 0.1}  # numbers per parameter
PASSES = 0.2  # time of an update per byte of parameter, gradient and state, in that of an elementwise op: measured


@dataclass(frozen=True)
class Layout:
    """What is chosen."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    data_parallel: str = "ddp"
    sequence: bool = False
    schedule: str = "1f1b"
    micro_batch: int = 1
    recompute: bool = False

    @property
    def chunks(self) -> int:
        """Stages per rank."""
        return SCHEDULES[self.schedule].chunks if self.pp > 1 else 1


@dataclass(frozen=True)
class Job:
    """What is to be done, on what."""

    profile: Profile
    machine: Machine
    ranks: int
    global_batch: int
    optimizer: str


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by what they are for, bytes of the fullest rank by what they hold."""

    layout: Layout
    compute: float
    tensor: float
    bubble: float
    data: float
    update: float
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    work: float
    microbatches: int
    in_flight: int

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return self.compute + self.tensor + self.bubble + self.data + self.update

    @property
    def memory(self) -> float:
        """Bytes of the fullest rank, all together."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.work + PROGRAM


@dataclass(frozen=True)
class Stage:
    """What one rank of the pipeline does with one microbatch, and holds of it."""

    products: float  # FLOPs
    moved: float
    ops: float
    parameters: float  # elements
    largest_unit: float  # elements of the largest block
    ends: float  # elements of the model's two ends
    saved: float  # bytes kept for the backward, all of it
    inputs: float  # bytes of what goes into its blocks: all that recomputation keeps of them
    edges: float  # bytes that the model's two ends keep
    inside: float  # the largest block, while it is computed again
    largest: float  # bytes of the largest output
    reduces: int  # all_reduces of the boundary's size in a forward


@dataclass(frozen=True)
class Work:
    """Seconds of a microbatch on each rank of the pipeline: all that the schedule and the data axis do not change."""

    stages: tuple[Stage, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    tensor: tuple[float, ...]
    """Of both together, what collectives of the tensor axis take."""
    transfer: float
    microbatches: int

    @property
    def slowest(self) -> float:
        """The seconds of the rank that has most to do."""
        return max(f + b for f, b in zip(self.forward, self.backward, strict=True))


def stages(profile: Profile, layout: Layout) -> tuple[Stage, ...]:
    """What each rank of the pipeline has, cut as the pipeline does it."""
    pp, tp, sequence, number = layout.pp, layout.tp, layout.sequence, layout.pp * layout.chunks

    def here(amount: Amount) -> float:
        return amount.on_rank(tp, sequence, profile.kv_heads)

    weights = [total(block.parameters) for block in profile.blocks]
    weights[-1] += profile.exit.parameters.units
    sizes = _sizes(tuple(weights), number)
    ends = list(accumulate(sizes))
    boundary = profile.boundary / (tp if sequence else 1)
    turns = layout.schedule == "zb_v"  # stages go down the ranks and up again
    ranks = [min(s, number - 1 - s) if turns else s % pp for s in range(number)]
    found = []
    for rank in range(pp):
        mine = [s for s in range(number) if ranks[s] == rank]
        blocks: list[Part] = [b for s in mine for b in profile.blocks[ends[s] - sizes[s] : ends[s]]]
        first, last = 0 in mine, number - 1 in mine
        edges = [profile.entrance] * first + [profile.exit] * last
        parts = [*blocks, *edges]
        tied = profile.tied / tp if first and last else 0.0
        found.append(
            Stage(
                products=sum(here(part.flops) for part in parts),
                moved=sum(here(part.moved) for part in parts),
                ops=sum(here(part.ops) for part in parts),
                parameters=sum(here(part.parameters) for part in parts) - tied,
                largest_unit=max(here(block.parameters) for block in blocks) if blocks else 0.0,
                ends=sum(here(part.parameters) for part in edges) - tied,
                saved=sum(here(part.saved) for part in parts),
                inputs=len(blocks) * boundary,
                edges=sum(here(part.saved) for part in edges),
                inside=max((here(block.saved) for block in blocks), default=0.0),
                largest=max(here(part.largest) for part in parts),
                reduces=profile.tensor_reduces * len(blocks) + first + last,
            )
        )
    return tuple(found)


def work(job: Job, layout: Layout, cut: tuple[Stage, ...]) -> Work:
    """The seconds of one microbatch of a layout."""
    machine, b = job.machine, layout.micro_batch
    threads = machine.threads()
    forward, backward, tensor = [], [], []
    for stage in cut:
        compute = b * (stage.products / machine.flops + stage.moved / machine.bandwidth) / threads
        overhead = stage.ops * machine.per_op
        reduce, _ = machine.collective("all_reduce", layout.tp, 1, b * job.profile.boundary)
        reduces = stage.reduces * reduce
        again = (compute + overhead + reduces) if layout.recompute else 0.0
        forward.append(compute + overhead + reduces)
        backward.append(2 * compute + 2 * overhead + reduces + again)
        tensor.append((2 + layout.recompute) * reduces)
    stride = job.ranks // layout.pp
    transfer = machine.message(stride, b * job.profile.boundary) if layout.pp > 1 else 0.0
    count = job.global_batch // layout.dp // b
    return Work(cut, tuple(forward), tuple(backward), tuple(tensor), transfer, count)


def bound(job: Job, layout: Layout, known: Work) -> float:
    """Seconds that no schedule and no data-parallel strategy can be below, for the same degrees and microbatch."""
    fill = (layout.pp - 1) * max(known.forward) / layout.chunks  # until the last rank has its first microbatch
    least = known.microbatches * known.slowest + fill
    busy = known.microbatches * sum(f + b for f, b in zip(known.forward, known.backward, strict=True))
    return max(least, _crowded(job, layout, busy))


def cost(job: Job, layout: Layout, known: Work) -> Cost | None:
    """All of it; None where the schedule cannot run with these numbers."""
    machine, profile, m = job.machine, job.profile, known.microbatches
    busy = [m * (f + b) for f, b in zip(known.forward, known.backward, strict=True)]
    if layout.pp > 1:
        f, b = (max(each) / layout.chunks for each in (known.forward, known.backward))
        try:
            shape = pace(layout.schedule, layout.pp, m, round(2 * b / f) / 2, round(known.transfer / f, 1))
        except ScheduleError:
            return None
        length = max(shape * f, max(busy))
        in_flight = held(layout.schedule, layout.pp, m)
    else:
        length, in_flight = busy[0], (1,)
    crowd = _crowded(job, layout, sum(busy))
    whole = max(length, crowd)
    tensor = max(m * each for each in known.tensor)
    compute = max(busy) - tensor

    sizes = [_memory(job, layout, stage, flying) for stage, flying in zip(known.stages, in_flight, strict=True)]
    fullest = max(sizes, key=sum)
    psi = max(stage.parameters for stage in known.stages) * profile.itemsize
    data, update = _data_axis(job, layout, psi, m)
    share = 1 if layout.data_parallel == "ddp" else layout.dp
    elements = sum(stage.parameters for stage in known.stages) * layout.tp * layout.dp
    each = max(stage.parameters for stage in known.stages) / share
    passes = PASSES * (2 + STATES[job.optimizer]) * max(4, profile.itemsize) / machine.bandwidth
    update += max(each * passes / machine.threads(), _crowded_update(job, elements / share * passes))
    return Cost(
        layout, compute, tensor, whole - compute - tensor, data, update, *fullest, microbatches=m,
        in_flight=max(in_flight),
    )  # fmt: skip


def _crowded(job: Job, layout: Layout, busy: float) -> float:
    """The seconds of all ranks' work (of one pipeline: busy) when a node has fewer cores than ranks."""
    lanes = layout.dp * layout.tp
    return busy * lanes / job.ranks * min(job.ranks, job.machine.per_node) / _lanes(job)


def _crowded_update(job: Job, seconds: float) -> float:
    return seconds / job.machine.threads() / job.ranks * min(job.ranks, job.machine.per_node) / _lanes(job)


def _lanes(job: Job) -> float:
    return min(float(min(job.ranks, job.machine.per_node)), job.machine.node_capacity())


def _data_axis(job: Job, layout: Layout, psi: float, m: int) -> tuple[float, float]:
    """(seconds of gradients, seconds of parameters) along dp in one step; psi: bytes of parameters on a rank."""
    machine, dp, stride = job.machine, layout.dp, layout.tp
    if dp == 1:
        return 0.0, 0.0
    kind = layout.data_parallel
    if kind == "ddp":
        return machine.collective("all_reduce", dp, stride, psi)[0], 0.0
    scatter, inside = machine.collective("reduce_scatter", dp, stride, psi)
    gather = 0.0 if inside else machine.collective("all_gather", dp, stride, psi)[0]
    times = m if kind != "zero1" and layout.pp == 1 else 1
    if kind == "zero3":
        return times * scatter + 2 * m * gather, 0.0
    return times * scatter, gather


def _memory(job: Job, layout: Layout, stage: Stage, in_flight: int) -> tuple[float, float, float, float, float]:
    """Bytes of parameters, gradients, optimizer, activations, work of a rank."""
    profile, dp, kind = job.profile, layout.dp, layout.data_parallel
    size, elements = profile.itemsize, stage.parameters
    _, inside = job.machine.level(layout.tp * (dp - 1) + 1)
    shared = kind != "ddp" and inside and dp > 1
    parameters = elements * size
    if shared:
        parameters /= dp
    elif kind == "zero3":
        parameters = elements * size / dp + 2 * stage.largest_unit * size
    gradients = elements * size
    if kind in ("zero2", "zero3") and dp > 1:
        # room for two blocks and the two ends; in a pipeline for all of it, within a step
        rooms = elements if layout.pp > 1 else min(elements, 2 * stage.largest_unit + stage.ends)
        gradients = gradients / dp + rooms * size
    master = 4.0 if size == 2 else 0.0
    optimizer = elements * (STATES[job.optimizer] * max(4, size) + master) / (1 if kind == "ddp" else dp)
    b = layout.micro_batch
    share = 1 / layout.chunks
    if layout.recompute:  # when a block is computed again, what the exit kept of this microbatch is gone
        last = stage.inputs * share + max(stage.inside, stage.edges)
        activations = b * ((in_flight - 1) * (stage.inputs + stage.edges) * share + last)
    else:
        activations = b * in_flight * stage.saved * share
    return parameters, gradients, optimizer, activations, WORKING * b * stage.largest


@cache
def pace(schedule: str, ranks: int, microbatches: int, backward: float, transfer: float) -> float:
    """Length of a schedule's timeline, in forwards of one stage; ScheduleError where it cannot be.

    Of many microbatches the middle is one pattern that repeats: then it is counted, not played.
    """
    played = _played(ranks, microbatches)
    seconds = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    length = Timeline(_programs(schedule, ranks, played), seconds, transfer).length
    each = SCHEDULES[schedule].chunks * (1 + backward)
    if schedule == "zb_v" and microbatches > played:  # its pattern waits where F, I and W differ
        each = (Timeline(_programs(schedule, ranks, played + ranks), seconds, transfer).length - length) / ranks
    return length + (microbatches - played) * each


@cache
def held(schedule: str, ranks: int, microbatches: int) -> tuple[int, ...]:
    """The most (stage, microbatch) pairs in flight, for each rank."""
    if schedule == "gpipe":
        return (microbatches,) * ranks
    return tuple(map(peak_in_flight, _programs(schedule, ranks, min(microbatches, 2 * ranks))))


def _played(ranks: int, microbatches: int) -> int:
    return microbatches if microbatches <= 2 * ranks else ranks + microbatches % ranks


@cache
def _programs(schedule: str, ranks: int, microbatches: int) -> list[Program]:
    return programs(schedule, ranks, microbatches)


@cache
def _sizes(weights: tuple[float, ...], stages: int) -> list[int]:
    return balanced(weights, stages)
