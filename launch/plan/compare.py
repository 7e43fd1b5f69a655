"""`dtrain plan --measure K`: K of the planned layouts run for a few steps, predicted beside measured, and their ranks.

Whether a plan can be trusted is whether it orders layouts as the machine does: Spearman's rank correlation, 1 where the
order is the same, 0 where it is no better than chance. Every layout is a launch of its own, as `dtrain bench step`: the
median step of the slowest rank, and the largest peak of memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from dtrain.config import CheckpointConfig, Config, ValidateConfig
from dtrain.errors import UserError
from dtrain.launch import environment, mpirun
from dtrain.launch.bench_launch import PAIRS, launch_dtrain
from dtrain.launch.bench_step import LIMIT, WARMUP, measured, tokens_per_step
from dtrain.launch.configuration import for_ranks
from dtrain.launch.plan.costs import Cost
from dtrain.launch.plan.report import mesh, seconds, size
from dtrain.launch.plan.search import applied

STEPS = 8


def compare(config: Config, found: Sequence[Cost], ranks: int, count: int) -> None:
    """Run `count` of the planned layouts, from the best to the worst, and print the table."""
    if environment.job().size > 1:
        raise UserError("dtrain plan --measure: starts mpirun itself; call it without mpirun, with --ranks")
    if len(found) < 2:
        raise UserError(f"--measure: {len(found)} layouts fit; a comparison needs 2 or more")
    chosen = spread(found, count)
    times, memory, launcher = [], [], mpirun.find()
    with tempfile.TemporaryDirectory(prefix="dtrain-plan-") as name:
        for number, each in enumerate(chosen):
            folder = Path(name) / str(number)
            folder.mkdir()
            started, reports = launch_dtrain(launcher, _short(config, each, ranks), ranks, folder, LIMIT)
            one = measured(reports, started, WARMUP, tokens_per_step(config))
            times.append(tokens_per_step(config) / one.tokens_per_second)
            memory.append(float(one.memory_bytes))
            print(f"{number + 1}/{len(chosen)}  {mesh(each.layout)}: {seconds(times[-1])}", flush=True)
    print("\n" + "\n".join(report(chosen, times, memory)))


def spread(found: Sequence[Cost], count: int) -> list[Cost]:
    """The first, the last, and as many between as make `count`, evenly."""
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places]


def _short(config: Config, each: Cost, ranks: int) -> Config:
    here = for_ranks(applied(config, each.layout), ranks)
    train = replace(here.train, steps=WARMUP + STEPS + PAIRS, validate=ValidateConfig(every=0))
    return replace(here, train=train, checkpoint=CheckpointConfig(every=0, resume="never"))


def report(chosen: Sequence[Cost], times: Sequence[float], memory: Sequence[float]) -> Iterator[str]:
    """A row per layout, and the correlations."""
    yield f"{'layout':<36}{'predicted':>11}{'measured':>11}{'ratio':>7}{'predicted':>12}{'measured':>11}{'ratio':>7}"
    for each, time, peak in zip(chosen, times, memory, strict=True):
        layout = each.layout
        names = [layout.data_parallel] * (layout.data * layout.cp > 1) + [layout.schedule] * (layout.pp > 1)
        names += layout.options
        yield (
            f"{mesh(layout) + ' ' + ' '.join(names):<36}{seconds(each.seconds):>11}{seconds(time):>11}"
            f"{time / each.seconds:>6.2f}x{size(each.memory):>12}{size(peak):>11}{peak / each.memory:>6.2f}x"
        )
    for name, predicted, seen in (
        ("time", [each.seconds for each in chosen], times),
        ("memory", [each.memory for each in chosen], memory),
    ):
        yield f"rank correlation of {name} (Spearman): {spearman(predicted, seen):.2f}"
    first = times[0] / min(times)
    yield f"the planned best takes {first:.2f} times as long as the fastest of those measured"


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of the ranks; equal values share the mean of their ranks. Not a number where all are equal."""
    if min(len(set(a)), len(set(b))) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
