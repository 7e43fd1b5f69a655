"""`dtrain show pipeline`: a pipeline schedule checked, timed, drawn, with its bubble and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch.configuration import for_ranks

if TYPE_CHECKING:
    from dtrain.strategies.pipeline.timeline import Span, Timeline

MOST_ACTIONS = 20_000


def show_pipeline(
    schedule: str,
    stages: int,
    microbatches: int,
    chunks: int | None,
    seconds: dict[str, float],
    transfer: float,
    output: Path | None,
    csv: Path | None,
) -> Timeline | None:
    """Print the timeline of a schedule on `stages` ranks; to `output` as SVG, its actions to `csv`; None: a comparison.

    seconds: of an action by kind (F, B, I, W), where they are not 1, 2, 1, 1.
    """
    from dtrain.strategies.pipeline import schedules
    from dtrain.strategies.pipeline.drawing import draw_svg
    from dtrain.strategies.pipeline.timeline import SECONDS, Timeline
    from dtrain.strategies.pipeline.user import to_csv

    if unknown := sorted(set(seconds) - set(SECONDS)):
        raise UserError(f"--seconds {unknown[0]}: allowed: {', '.join(SECONDS)}")
    if schedule == "all":
        if output is not None or csv is not None:
            raise UserError("--schedule: missing; --output and --csv take one schedule")
        _compare(stages, microbatches, seconds, transfer)
        return None
    try:
        programs = schedules.programs(schedule, stages, microbatches, chunks)
        timeline = Timeline(programs, {**SECONDS, **seconds}, transfer)
    except ValueError as error:
        raise UserError(str(error)) from None
    if csv is not None:
        _write(csv, to_csv(programs))
    title = f"{schedule}: {stages} ranks, {timeline.stages} stages, {microbatches} microbatches"
    facts = (
        f"bubble {timeline.bubble:.1%} of the time; in flight at most "
        f"{', '.join(map(str, timeline.in_flight()))} (rank 0, 1, …); {timeline.messages} messages"
    )
    if output is not None:
        if len(timeline.spans) > MOST_ACTIONS:
            raise UserError(f"{len(timeline.spans)} actions are too many for a picture; allowed: {MOST_ACTIONS}")
        _write(output, draw_svg([(f"{title}; {facts}", timeline.spans)], stages))
    print(f"{title}\n")
    _print_rows(timeline.spans, stages)
    print(f"\n{facts}")
    return timeline


def of_config(
    config: Config, ranks: int, seconds: dict[str, float], transfer: float, output: Path | None, csv: Path | None
) -> None:
    """The same of the pipeline that `config` has on `ranks` ranks, and the blocks of each stage."""
    from dtrain import models
    from dtrain.data import data_of
    from dtrain.strategies import AXES
    from dtrain.strategies.pipeline import PipelineParallel, placed
    from dtrain.strategies.pipeline.stages import blocks_of_stages, costs

    config = for_ranks(config, ranks)
    if config.parallel.pp == 1:
        raise UserError("parallel.pp: 1; there is no pipeline to show. Allowed: 2 or more, such as parallel.pp=4")
    strategy = AXES["pp"](config)
    assert isinstance(strategy, PipelineParallel)
    model = models.outline(config.model, data_of(config), dtype=config.train.dtype)
    timeline = show_pipeline(
        strategy.schedule,
        config.parallel.pp,
        strategy.microbatches,
        strategy.chunks,
        seconds,
        transfer,
        output,
        csv,
    )
    if timeline is not None:
        print("\n".join(placed(timeline, blocks_of_stages(model, timeline.stages, strategy.cut), costs(model))))


def _compare(ranks: int, microbatches: int, seconds: dict[str, float], transfer: float) -> None:
    """All schedules in one table."""
    from dtrain.strategies.pipeline.schedules import SCHEDULES, ScheduleError, programs
    from dtrain.strategies.pipeline.timeline import SECONDS, Timeline

    print(f"{ranks} ranks, {microbatches} microbatches\n")
    print(f"{'schedule':<13}{'stages':>7}{'time':>9}{'bubble':>9}{'in flight':>11}{'messages':>10}")
    for name in SCHEDULES:
        try:
            timeline = Timeline(programs(name, ranks, microbatches), {**SECONDS, **seconds}, transfer)
        except ScheduleError as error:
            print(f"{name:<13} {error}")
            continue
        # An action of a rank with several stages is that much shorter, and what it holds that much smaller.
        share = ranks / timeline.stages
        print(
            f"{name:<13}{timeline.stages:>7}{timeline.length * share:>9.4g}{timeline.bubble:>9.1%}"
            f"{max(timeline.in_flight()) * share:>11.4g}{timeline.messages:>10}"
        )
    print("\ntime in forwards of a rank's whole part, in flight in whole microbatches of it, of the fullest rank")


def _print_rows(spans: Sequence[Span], ranks: int) -> None:
    """In colour where the output is a terminal."""
    import shutil
    import sys

    from dtrain.strategies.pipeline.drawing import STYLES, cells, draw_text

    width = shutil.get_terminal_size((110, 24)).columns
    if not sys.stdout.isatty():
        print(draw_text(spans, ranks, width))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, highlight=False)
    for rank, runs in enumerate(cells(spans, ranks, width - 9)):
        line = Text(f"rank {rank}".ljust(9))
        for text, kind in runs:
            line.append(text, STYLES.get(kind, ""))
        console.print(line, no_wrap=True, overflow="crop")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"{path}: written")
