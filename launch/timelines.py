"""The timeline of a pipeline in a run: the plan before the first step, and after the last what was measured beside it.

    pp     1f1b: 4 stages on 4 ranks, 8 microbatches; planned bubble 27.3 % of the step
    …
    pipeline of step 150: bubble 31.0 % measured, 27.3 % planned; picture: runs/gpt-pipeline/pipeline.svg

Measured are forwards and backwards on the ranks of one pipeline, that of rank 0. Where ranks share a core, an action
lasts as long as it takes to get one: then the bubble says little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.launch import environment
from dtrain.trainer import Trainer


def measured(trainer: Trainer) -> dict[str, Any] | None:
    """Of the last step that this process made: what `summary.json` tells, and the picture under "svg"; None without a
    pipeline. Collective."""
    if trainer.mesh.size("pp") == 1:
        return None
    from dtrain.strategies.pipeline import PipelineParallel
    from dtrain.strategies.pipeline.drawing import draw_svg
    from dtrain.strategies.pipeline.timeline import bubble

    strategy = next((each for each in trainer.strategies if isinstance(each, PipelineParallel)), None)
    if strategy is None or not strategy.engine.spans:
        return None
    spans, plan = strategy.measured(), strategy.plan
    found: dict[str, Any] = {
        "step": trainer.step,
        "schedule": strategy.schedule,
        "ranks": plan.ranks,
        "stages": plan.stages,
        "microbatches": plan.microbatches,
        "planned_bubble": plan.bubble,
        "measured_bubble": bubble(spans, plan.ranks),
        "seconds": max(span.stop for span in spans) - min(span.start for span in spans),
        "in_flight": plan.in_flight(),
        "busy_seconds": [sum(s.stop - s.start for s in spans if s.rank == rank) for rank in range(plan.ranks)],
    }
    title = f"{strategy.schedule}, {plan.ranks} ranks, {plan.microbatches} microbatches"
    found["svg"] = draw_svg(
        [
            (f"planned: {title}; bubble {plan.bubble:.1%} (a backward is two forwards)", plan.spans),
            (f"measured: step {trainer.step}, {found['seconds']:.3g} s; bubble {found['measured_bubble']:.1%}", spans),
        ],
        plan.ranks,
    )
    return found


def told(found: dict[str, Any], path: Path, ranks: int) -> str:
    """A line for the log. ranks: of the job."""
    crowded = "; ranks share cores and wait for them" if ranks > environment.cores() else ""
    return (
        f"pipeline of step {found['step']}: bubble {found['measured_bubble']:.1%} measured, "
        f"{found['planned_bubble']:.1%} planned{crowded}; picture: {path}"
    )
