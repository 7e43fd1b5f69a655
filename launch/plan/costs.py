"""Time of a step and memory of a rank for one layout: sums that can be checked by hand.

    microbatch                forward and backward on each rank of the pipeline: microbatch.py
    pipeline                  the schedule's timeline at the pace of the slowest stage; ranks that wait leave their
                              cores to others: where n ranks work at once, they share the cores of their nodes; all
                              cores at once may do less than one alone times their number (Machine.together)
    step                      pipeline + gradients and parameters of the data axis + update
    overlap                   what ddp sums over a network while the last backward goes on is not counted; in a node the
                              cores that compute do the sums as well, and nothing is hidden

    memory                    parameters + gradients + optimizer + activations in flight + work + the program

Bytes of the data axis (Ψ of a rank's stage): ddp, zero1, zero2 2Ψ, zero3 3Ψ, stage 2 and 3 with every microbatch where
there is no pipeline. Inside a node ZeRO's parameters are shared: nothing is gathered, and Ψ of parameters is 1/dp.
ep: samples are spread over ep as over dp; experts are 1/ep, and their gradients summed over dp alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.launch.plan.layout import Job, Layout
from dtrain.launch.plan.machine import PROGRAM
from dtrain.launch.plan.microbatch import Work
from dtrain.launch.plan.pace import concurrency, held
from dtrain.launch.plan.stages import Stage
from dtrain.strategies.pipeline.schedules import ScheduleError

WORKING = 3.0  # arrays of the largest output that a backward has at once beside what was kept
STATES = {"sgd": 1.0, "adam": 2.0, "adamw": 2.0, "lamb": 2.0, "adafactor": 0.1}  # numbers per parameter
BUCKET = 4 << 20  # bytes: parallel.bucket_mb
PASSES = 0.2  # time of an update per byte of parameter, gradient and state, in that of an elementwise op: measured


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
        how = layout.schedule, layout.pp, m, round(2 * b / f) / 2, round(known.transfer / f, 1)
        try:
            # While few ranks work they have the cores, while many do they share them.
            shape = sum(max(time, _crowded(job, layout, ranks * time)) for ranks, time in concurrency(*how))
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
    largest = max(known.stages, key=lambda stage: stage.parameters)
    data, update = _data_axis(job, layout, largest, max(known.backward), m)
    share = 1 if layout.data_parallel == "ddp" else layout.sharers
    elements = sum(stage.parameters for stage in known.stages) * layout.tp * layout.cp * layout.data
    each = max(stage.parameters for stage in known.stages) / share
    passes = PASSES * (2 + STATES[job.optimizer]) * max(4, profile.itemsize) / machine.bandwidth
    update += max(each * passes / machine.threads(), _crowded_update(job, elements / share * passes))
    return Cost(
        layout, compute, tensor, max(0.0, whole - compute - tensor), data, update, *fullest, microbatches=m,
        in_flight=max(in_flight),
    )  # fmt: skip


def _crowded(job: Job, layout: Layout, busy: float) -> float:
    """The seconds of all ranks' work (of one pipeline: busy) when a node has fewer cores than ranks."""
    lanes = layout.data * layout.cp * layout.tp
    return busy * lanes / job.ranks * min(job.ranks, job.machine.per_node) / _lanes(job)


def _crowded_update(job: Job, seconds: float) -> float:
    return seconds / job.machine.threads() / job.ranks * min(job.ranks, job.machine.per_node) / _lanes(job)


def _lanes(job: Job) -> float:
    return min(float(min(job.ranks, job.machine.per_node)), job.machine.node_capacity())


def _data_axis(job: Job, layout: Layout, stage: Stage, backward: float, m: int) -> tuple[float, float]:
    """(seconds of gradients, of parameters) along dp, ep and cp in one step; backward: seconds of the last one."""
    machine, tp, cp, itemsize = job.machine, layout.tp, layout.cp, job.profile.itemsize
    kind = layout.data_parallel
    # bytes, over how many ranks, how far apart: experts are other ones along ep
    groups = [
        ((stage.parameters - stage.experts) * itemsize, layout.data * cp, tp),
        (stage.experts * itemsize, layout.sharers, tp * layout.ep),
    ]
    if kind == "ddp":
        seconds, near = 0.0, True
        for psi, size, stride in groups:
            one, inside = machine.collective("all_reduce", size, stride, psi) if psi else (0.0, True)
            seconds, near = seconds + one, near and inside
        late = min(1.0, BUCKET / (stage.parameters * itemsize))  # the last bucket is full when the backward is over
        return seconds * machine.crowd() if near else max(late * seconds, seconds - backward), 0.0
    gradients = parameters = 0.0
    for psi, size, stride in groups:
        scatter, inside = machine.collective("reduce_scatter", size, stride, psi)
        gather = 0.0 if inside else machine.collective("all_gather", size, stride, psi)[0]
        times, calls = (m, stage.blocks + 1) if kind != "zero1" and layout.pp == 1 else (1, 1)
        scatter += (calls - 1) * machine.collective("reduce_scatter", size, stride, 0.0)[0]  # a call per block
        gradients += times * scatter * (machine.crowd() if inside else 1.0)  # the node's cores add up for all ranks
        gradients += 2 * m * gather if kind == "zero3" else 0.0
        parameters += 0.0 if kind == "zero3" else gather
    return gradients, parameters


def _memory(job: Job, layout: Layout, stage: Stage, in_flight: int) -> tuple[float, float, float, float, float]:
    """Bytes of parameters, gradients, optimizer, activations, work of a rank."""
    profile, shares, kind = job.profile, layout.sharers, layout.data_parallel
    size, elements = profile.itemsize, stage.parameters
    _, inside = job.machine.level(layout.tp * layout.ep * (shares - 1) + 1)
    shared = kind != "ddp" and inside and shares > 1
    parameters = elements * size
    if shared:
        parameters /= shares
    elif kind == "zero3":
        parameters = elements * size / shares + 2 * stage.largest_unit * size
    gradients = elements * size
    if kind in ("zero2", "zero3") and shares > 1:
        # room for two blocks and the two ends; in a pipeline for all of it, within a step
        rooms = elements if layout.pp > 1 else min(elements, 2 * stage.largest_unit + stage.ends)
        gradients = gradients / shares + rooms * size
    master = 4.0 if size == 2 else 0.0
    optimizer = elements * (STATES[job.optimizer] * max(4, size) + master) / (1 if kind == "ddp" else shares)
    b = layout.micro_batch
    share = 1 / layout.chunks
    if layout.recompute:  # when a block is computed again, what the exit kept of this microbatch is gone
        last = stage.inputs * share + max(stage.inside, stage.edges)
        activations = b * ((in_flight - 1) * (stage.inputs + stage.edges) * share + last)
    else:
        activations = b * in_flight * stage.saved * share
    return parameters, gradients, optimizer, activations, WORKING * b * stage.largest
