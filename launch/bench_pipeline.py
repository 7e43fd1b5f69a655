"""`dtrain bench pipeline`: the bubble of each schedule, measured, beside its formula and its planned timeline.

    rank = a thread of this process; a block "computes" by sleeping: F 1, I 1, W 1 (B 2) units; real engine and messages

So that four stages really work at the same time on a machine with fewer cores, and nothing but the schedule, the engine
and its messages decides who waits for whom. Bubbles are shares of the whole time. What the tape keeps is counted in
bytes from the arrays that live, as a share of a rank's whole part of one microbatch.
References: GPipe, arXiv:1811.06965; 1F1B and interleaved, arXiv:2104.04473; zero bubble, arXiv:2401.10241.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, run_threads
from dtrain.errors import UserError
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.modules import Context, Module
from dtrain.op import Op
from dtrain.parameter import Constant, Parameter
from dtrain.strategies.pipeline import PipelineParallel
from dtrain.strategies.pipeline.schedules import SCHEDULES
from dtrain.strategies.pipeline.timeline import Span, Timeline, bubble
from dtrain.tensor import Tensor, apply

KEPT = 1 << 16  # bytes that a rank's whole part keeps of one microbatch
# Share of the whole time that p ranks wait, with m microbatches and v stages per rank, where F = I = W.
FORMULAS = {
    "naive": lambda p, m, v: 1 - 1 / p,
    "gpipe": lambda p, m, v: (p - 1) / (m + p - 1),
    "1f1b": lambda p, m, v: (p - 1) / (m + p - 1),
    "interleaved": lambda p, m, v: (p - 1) / (v * m + p - 1),
    "zb_h1": lambda p, m, v: (p - 1) / (3 * m + p - 1),
}


class Kept:
    """The bytes that the tape of one rank keeps, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def add(self, array: Array) -> Array:
        """Count an array until it is gone."""
        with self._lock:
            self.now += array.nbytes
            self.most = max(self.most, self.now)
        weakref.finalize(array, self._gone, array.nbytes)
        return array

    def _gone(self, nbytes: int) -> None:
        with self._lock:
            self.now -= nbytes


def _forward(x: Array, weight: Array, seconds: float, kept: Kept, nbytes: int) -> tuple[Array, Any]:
    time.sleep(seconds)
    return x + weight, kept.add(np.empty(nbytes, np.uint8))


def _vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    results: list[Array | None] = []
    for needed in node.needs:
        if needed:
            time.sleep(node.attributes["seconds"])
        results.append(g.copy() if needed else None)
    return tuple(results)


SLEEP = Op("sleep", _forward, _vjp, splits=True)


class Block(Module):
    """Sleeps instead of computing."""

    def __init__(self, seconds: float, nbytes: int, kept: Kept) -> None:
        self.weight = Parameter((1, 1), Constant(0.0), np.float64)
        self._how = {"seconds": seconds, "kept": kept, "nbytes": nbytes}

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(1, 1) -> (1, 1)."""
        return apply(SLEEP, x, self.weight, **self._how)


class Sleepers(Model):
    """A chain of such blocks."""

    def __init__(self, count: int, seconds: float, nbytes: int, kept: Kept) -> None:
        self.blocks: list[Module] = [Block(seconds, nbytes, kept) for _ in range(count)]
        self.assign_names()

    def enter(self, inputs: Array, context: Context | None = None) -> Tensor:
        """(1, 1), with a gradient that nobody uses: so the first stage takes as long as the others."""
        return Tensor(inputs, requires_grad=True)

    def loss_from(self, x: Tensor, batch: Any) -> Tensor:
        """The sum."""
        return x.sum()

    def count(self, batch: Any) -> int:
        """One target."""
        return 1


@dataclass(frozen=True)
class Result:
    """One schedule."""

    schedule: str
    formula: float | None
    planned: float
    measured: float
    expected_kept: list[float]
    """At most, in microbatches of a rank's whole part, by rank: from the schedule."""
    kept: list[float]
    """The same, counted."""
    plan: list[Span]
    spans: list[Span]


def run(schedule: str, ranks: int, microbatches: int, unit: float) -> Result:
    """Run a schedule; unit: seconds of a rank's forward of one microbatch."""
    chunks = SCHEDULES[schedule].chunks
    outcome = run_threads(ranks, _rank, schedule, microbatches, unit, timeout=600)
    plan, spans, _ = outcome[0]
    assert isinstance(plan, Timeline)
    formula = FORMULAS.get(schedule)
    return Result(
        schedule,
        None if formula is None else formula(ranks, microbatches, chunks),
        plan.bubble,
        bubble(spans, ranks),
        [count / chunks for count in plan.in_flight()],
        [most / KEPT for _, _, most in outcome],
        plan.spans,
        spans,
    )


def _rank(comm: Communicator, schedule: str, microbatches: int, unit: float) -> tuple[Timeline, list[Span], int]:
    kept = Kept()
    chunks = SCHEDULES[schedule].chunks
    model = Sleepers(comm.size * chunks, unit / chunks, KEPT // chunks, kept)
    strategy = PipelineParallel(schedule, microbatches)
    strategy.apply(model, Mesh(comm, pp=comm.size))
    model.materialise(0)
    nothing: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(dtype="float64")), no_sync=nullcontext, loss_gradient=1.0
    )
    batches = [({"inputs": np.zeros((1, 1))}, Context(0, 0, np.zeros(1, np.int64))) for _ in range(microbatches)]
    strategy.execute(nothing, batches)  # shapes are asked for
    kept.most = kept.now
    comm.barrier()
    strategy.execute(nothing, batches)
    return strategy.plan, strategy.measured(), kept.most


def bench_pipeline(
    schedules: tuple[str, ...], ranks: int, microbatches: int, unit: float, output: Path | None
) -> list[Result]:
    """Print planned and measured bubbles; draw both to `output` (SVG)."""
    if unknown := [name for name in schedules if name not in SCHEDULES]:
        raise UserError(f"--schedule {unknown[0]}: allowed: {', '.join(SCHEDULES)}")
    print(f"{ranks} ranks, {microbatches} microbatches, a forward sleeps {unit * 1e3:g} ms\n")
    print(f"{'schedule':<13}{'formula':>9}{'planned':>9}{'measured':>10}{'ratio':>8}   kept at most, planned | counted")
    results = []
    for name in schedules:
        result = run(name, ranks, microbatches, unit)
        results.append(result)
        formula = "-" if result.formula is None else f"{result.formula:.1%}"
        reference = result.planned if result.formula is None else result.formula
        kept = (" ".join(f"{each:g}" for each in row) for row in (result.expected_kept, result.kept))
        print(
            f"{name:<13}{formula:>9}{result.planned:>9.1%}{result.measured:>10.1%}{result.measured / reference:>8.3f}"
            f"   {' | '.join(kept)}"
        )
    print("\nratio: measured / formula; kept: whole microbatches of a rank's part, by rank")
    if output is not None:
        from dtrain.strategies.pipeline.drawing import draw_svg

        rows = [
            (f"{each.schedule}, {how}: bubble {share:.1%}", spans)
            for each in results
            for how, share, spans in (
                ("planned", each.planned, each.plan),
                ("measured", each.measured, each.spans),
            )
        ]
        try:
            output.write_text(draw_svg(rows, ranks), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {output}: cannot be written: {error.strerror}") from None
        print(f"{output}: written")
    return results
