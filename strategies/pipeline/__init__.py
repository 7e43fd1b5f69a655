"""Pipeline parallelism: the model cut into stages, microbatches on their way through them.

schedules.py   in which order a rank works           timeline.py   checked, timed, memory counted
greedy.py      orders made by a rule                 drawing.py    pictures of planned and measured time
user.py        orders from the user                  cut.py        where the model is cut
stages.py      what a rank keeps of a model          engine.py     runs an order, sends and receives
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dtrain.errors import UserError
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.modules import Module
from dtrain.strategies.pipeline.engine import Engine
from dtrain.strategies.pipeline.schedules import Action, Program, ScheduleError, programs
from dtrain.strategies.pipeline.stages import blocks_of_stages, costs, split
from dtrain.strategies.pipeline.timeline import Span, Timeline
from dtrain.strategy import Microbatch, Strategy

if TYPE_CHECKING:
    from dtrain.trainer import Trainer


class PipelineParallel(Strategy):
    """Stages along the `pp` axis; a step runs all its microbatches by one schedule."""

    axis = "pp"

    def __init__(self, schedule: str, microbatches: int, chunks: int | None = None, cut: Sequence[int] | None = None):
        """microbatches: of a step, for which the schedule is checked; cut: blocks per stage (None: balanced)."""
        self.schedule, self.microbatches, self.chunks, self.cut = schedule, microbatches, chunks, cut

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Keep this rank's stages of the model."""
        assert isinstance(model, Model)
        self.comm = mesh["pp"]
        self._programs: dict[int, list[Program]] = {}
        self.plan = Timeline(self._programs_for(self.microbatches))
        parts, self.costs = blocks_of_stages(model, self.plan.stages, self.cut), costs(model)
        stages = split(model, mesh, self.plan.rank_of, parts)
        self.engine = Engine(self.comm, stages, self.plan.rank_of)
        self.parts = parts
        return model

    def execute(self, trainer: Trainer, microbatches: list[Microbatch]) -> tuple[float, float]:
        """Forwards and backwards of a step, in the order of the schedule."""
        if not microbatches:
            return 0.0, 0.0
        program = self._programs_for(len(microbatches))[self.comm.rank]
        return self.engine.run(trainer, program, microbatches)

    def evaluate(self, trainer: Trainer, microbatches: Iterable[Microbatch]) -> tuple[float, float]:
        """The forwards alone."""
        return self.engine.evaluate(trainer, microbatches)

    def notes(self) -> list[str]:
        """The plan, and what lies on each rank."""
        plan = self.plan
        head = (
            f"{self.schedule}: {plan.stages} stages on {plan.ranks} ranks, {plan.microbatches} microbatches; planned "
            f"bubble {plan.bubble:.1%} of the step"
        )
        return [head, *placed(plan, self.parts, self.costs)]

    def measured(self) -> list[Span]:
        """The spans of the last step on all ranks of this pipeline, in seconds from its begin. Collective over `pp`.

        On several hosts, whose clocks differ, each host's spans begin at 0.
        """
        rows = [[*span.action, span.start, span.stop] for span in self.engine.spans]
        everyone = list(zip(self.comm.hosts, self.comm.all_gather_object(rows), strict=True))
        begin: dict[str, float] = {}
        for host, spans in everyone:
            begin[host] = min(begin.get(host, float("inf")), *(start for *_, start, _ in spans))
        return [
            Span(rank, Action(stage, kind, m), start - begin[host], stop - begin[host])
            for rank, (host, spans) in enumerate(everyone)
            for stage, kind, m, start, stop in spans
        ]

    def _programs_for(self, microbatches: int) -> list[Program]:
        """Checked once for each number of microbatches."""
        if microbatches not in self._programs:
            try:
                made = programs(self.schedule, self.comm.size, microbatches, self.chunks)
                Timeline(made)
            except ScheduleError as error:
                raise UserError(f"pipeline: {error}") from None
            self._programs[microbatches] = made
        return self._programs[microbatches]


def placed(plan: Timeline, parts: Mapping[int, tuple[int, int]], products: Sequence[float]) -> list[str]:
    """A line for each rank of a pipeline: its stages with their blocks (first, behind the last), what is in flight.

    products: of each block, to tell how evenly they are cut.
    """
    lines, work = [], [0.0] * plan.ranks
    for number, (start, stop) in parts.items():
        work[plan.rank_of[number]] += sum(products[start:stop])
    whole = sum(work) or 1.0
    for rank, most in enumerate(plan.in_flight()):
        stages = []
        for number in sorted(parts):
            if plan.rank_of[number] == rank:
                start, stop = parts[number]
                blocks = "no block" if start == stop else f"block {start}" if stop == start + 1 else ""
                blocks = blocks or f"blocks {start}-{stop - 1}"
                ends = "entrance, " * (number == 0), ", exit and loss" * (number == plan.stages - 1)
                stages.append(f"stage {number}: {ends[0]}{blocks}{ends[1]}")
        share = f"{work[rank] / whole:.1%} of the products"
        lines.append(f"rank {rank}: {'; '.join(stages)}; {share}; at most {most} in flight")
    lines.append(f"balance: the fullest rank has {max(work) / whole * plan.ranks:.2f} times an even share")
    return lines
