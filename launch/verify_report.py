"""What `dtrain verify` prints: the verdict, where a difference began, and a table of tensors, the worst first.

RIGHT  2 ranks equal one process over 3 steps: 162 of 162 numbers and tensors
difference / allowed  verdict
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dtrain.collectives import world
from dtrain.config import Config
from dtrain.launch import configuration, environment

if TYPE_CHECKING:
    from dtrain.launch.verify import Report

SHOWN = 8  # rows, unless all are asked for


def command(config: Config, steps: int, dtype: str, show_all: bool) -> None:
    """Verify, tell it on rank 0, exit with 0 or 1. Collective over the world."""
    from msgspec.structs import replace

    from dtrain.launch.verify import verify

    comm = world()
    environment.check_world(comm.size)
    if dtype != "config":
        config = replace(config, train=replace(config.train, dtype=dtype))
    config = configuration.for_ranks(config, comm.size)
    report = verify(config, comm, steps)
    if comm.rank == 0:
        show(report, config, comm.size, show_all)
        sys.stdout.flush()
    comm.barrier()  # what ends with another code than 0 ends all ranks at once: not before this was read
    sys.exit(0 if report.right else 1)


def show(report: Report, config: Config, ranks: int, show_all: bool) -> None:
    """Print the report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=int(os.environ.get("COLUMNS") or 110), highlight=False)
    wrong = [row for row in report.rows if not row.right]
    parallel = config.parallel
    used = [f"{axis}={getattr(parallel, axis)}" for axis in ("pp", "dp", "cp", "ep", "tp")]
    used += ["2d"] * (parallel.tensor_grid() is not None)
    layout = " ".join([*(part for part in used if not part.endswith("=1")), parallel.data_parallel])
    steps = f"{report.steps} step{'s' * (report.steps > 1)}"
    of = f"of {len(report.rows)} losses, norms and tensors"
    if wrong:
        beside = f"{ranks} ranks ({layout}) differ from one process over {steps}"
        console.print(f"[bold red]WRONG[/]  {beside}: in {len(wrong)} {of}")
        console.print(f"       {report.finding}")
    else:
        beside = f"{ranks} ranks ({layout}) equal one process over {steps}"
        console.print(f"[bold green]RIGHT[/]  {beside}: {len(report.rows)} {of}")
    console.print(
        f"       allowed: {report.tolerance.relative:.1e} of the largest element = {report.tolerance.because}; "
        "beside that, of a parameter, where the gradient is rounding error itself, as far as others moved"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("what", "left"), ("where", "left"), ("difference", "right"), ("largest", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("of what is allowed", justify="right")
    table.add_column("verdict")
    rows = report.rows if show_all else sorted(report.rows, key=lambda row: -row.excess)[:SHOWN]
    for row in rows:
        verdict = "right" if row.right else "[red]WRONG[/]"
        numbers = f"{row.difference:.2e}", f"{row.scale:.2e}", f"{row.excess:.2g} x"
        table.add_row(row.kind, row.name, *numbers, verdict)
    console.print(table)
    if len(rows) < len(report.rows):
        console.print(f"and {len(report.rows) - len(rows)} more that differ less; --all shows them")


__all__ = ["command", "show"]
