"""What rank 0 tells while a run goes on: lines that can be searched, and under them a bar where there is a terminal.

    first step after 1.9 s
    step   10/200  loss 4.1234  grad_norm 1.234  lr 1.0e-03      12,345 tokens/s  eta 0:00:12
    step   50/200  validation loss 3.2345
    ━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━  75/200  loss 2.9876  grad_norm 0.987  lr 8.7e-04  12,345 tokens/s  0:00:10

Under `mpirun` the stdout of a rank is a pipe even when the user sits at a terminal, so the question is put to mpirun's
own stdout; `dtrain launch`, which reads that, names its own. rich is imported with the first finished step: the start
of a run does not wait for it. The bar has no thread of its own, which would take the interpreter away from the step; it
is drawn when a step ends, a few times a second.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from dtrain.config import Config
from dtrain.launch import environment

RECENT = 20  # steps that the speed is taken over: a hiccup of the machine is forgotten after so many
REDRAW = 0.1  # seconds between two drawings of the bar
LAUNCHERS = ("mpirun", "mpiexec", "hydra", "prterun", "orterun")


class Record(Protocol):
    """What is told of a step: the trainer's StepRecord has it."""

    @property
    def step(self) -> int:
        """Counts from 1."""

    @property
    def loss(self) -> float:
        """Mean over the targets of the step."""

    @property
    def grad_norm(self) -> float:
        """Before clipping."""

    @property
    def learning_rate(self) -> float:
        """Used in this step."""

    @property
    def step_seconds(self) -> float:
        """Wall time."""

    @property
    def tokens(self) -> int:
        """Of this step, on all ranks (of rows: samples)."""

    @property
    def loss_scale(self) -> float:
        """Of the backward."""

    @property
    def skipped_steps(self) -> int | None:
        """Until now; None without a dynamic loss scale."""

    @property
    def validation_loss(self) -> float | None:
        """None where it was not measured."""

    @property
    def measures(self) -> Mapping[str, float]:
        """What else was measured then."""


class Progress:
    """A context around the steps of a run; call `update` once per step. `on` is true on rank 0 and silent elsewhere.

    `started` is the time (time.time()) from which the first line counts; default: the start of this process.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int,
        start_step: int = 0,
        on: bool = True,
        stream: TextIO | None = None,
        started: float | None = None,
    ) -> None:
        self.total_steps, self.start_step, self.on = total_steps, start_step, on
        self.every = config.log.every
        self.unit = "tokens" if config.model.kind in ("gpt", "moe_gpt", "bert") else "samples"
        self.stream = sys.stdout if stream is None else stream
        self.started = process_start() if started is None else started
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._first_step = True
        self._bar: Any = None
        self._task: Any = None
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = None

    def update(self, record: Record, tokens_per_second: float | None = None) -> None:
        """Tell of a finished step; without `tokens_per_second`, the mean of the recent steps is shown."""
        if not self.on:
            return
        if self._first_step:
            self.note(f"first step after {time.time() - self.started:.1f} s")
            self._start_bar()
        elif len(self._recent) == 1 and self._recent[0][0] > 2 * record.step_seconds:
            self._recent.clear()  # the first step warmed the caches: it says nothing of the speed
        self._first_step = False
        self._recent.append((record.step_seconds, record.tokens))
        seconds = sum(seconds for seconds, _ in self._recent)
        speed = sum(tokens for _, tokens in self._recent) / seconds if seconds > 0 else 0.0
        speed = speed if tokens_per_second is None else tokens_per_second
        remaining = (self.total_steps - record.step) * seconds / len(self._recent)
        if self.tells(record.step):
            self.note(step_line(record, self.total_steps, speed, remaining, self.unit))
        if record.validation_loss is not None:
            more = "".join(f"  {name} {value:.4f}" for name, value in record.measures.items())
            self.note(f"{_place(record.step, self.total_steps)}  validation loss {record.validation_loss:.4f}{more}")
        if self._bar is not None:
            self._draw(record, speed, remaining)

    def tells(self, step: int) -> bool:
        """Whether this step has a line of its own; the same on all ranks."""
        return logs(step, self.every, self.start_step, self.total_steps)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.on:
            return
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start_bar(self) -> None:
        width = terminal_width(self.stream)
        if width is None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            BarColumn(bar_width=None),
            TextColumn("[bold]{task.completed}/{task.total}"),
            TextColumn("{task.fields[told]}"),
            console=Console(file=self.stream, force_terminal=True, width=width),
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("", total=self.total_steps, completed=self.start_step, told="")
        self._bar.start()

    def _draw(self, record: Record, speed: float, remaining: float) -> None:
        now = time.perf_counter()
        if now - self._drawn < REDRAW and record.step < self.total_steps:
            return
        self._drawn = now
        told = (
            f"loss [bold]{record.loss:.4f}[/]  grad_norm {record.grad_norm:.3f}  lr {record.learning_rate:.1e}  "
            f"[green]{speed:,.0f} {self.unit}/s[/]  [cyan]{clock(remaining)}[/]"
        )
        self._bar.update(self._task, completed=record.step, told=told)
        self._bar.refresh()


def logs(step: int, every: int, start_step: int, total_steps: int) -> bool:
    """Whether a step is told of, on the terminal and in metrics.jsonl: the first and last of a start, every `every`."""
    return step % every == 0 or step in (start_step + 1, total_steps)


def step_line(record: Record, total_steps: int, speed: float, remaining: float, unit: str = "tokens") -> str:
    """One aligned line of a step: words before numbers, so that grep and awk find them."""
    return (
        f"{_place(record.step, total_steps)}  loss {record.loss:.4f}  grad_norm {record.grad_norm:.3f}  "
        f"lr {record.learning_rate:.1e}  {speed:>10,.0f} {unit}/s  eta {clock(remaining)}{_scale(record)}"
    )


def _scale(record: Record) -> str:
    """The dynamic loss scale, where there is one."""
    if record.skipped_steps is None:
        return ""
    return f"  loss scale 2^{math.log2(record.loss_scale):.0f}, {record.skipped_steps} skipped"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _place(step: int, total_steps: int) -> str:
    return f"step {step:>{max(4, len(str(total_steps)))}}/{total_steps}"


# --- where the output ends up -----------------------------------------------------------------------------------------


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that shows `stream`, also through mpirun's pipe (Linux); None when there is none."""
    if os.environ.get("TERM") in (None, "", "dumb"):
        return None
    try:
        # Open MPI gives its ranks a terminal of their own, wherever their output goes: there only mpirun's own counts.
        if stream.isatty() and environment.job().launcher == "none":
            return _columns(os.get_terminal_size(stream.fileno()).columns)
        if stream is not sys.stdout:
            return None
        terminal = os.environ.get("DTRAIN_TERMINAL") or launcher_terminal(os.getppid())
        if terminal is None:
            return None
        descriptor = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
        try:
            return _columns(os.get_terminal_size(descriptor).columns)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):  # no file behind the stream, or a terminal that is not ours to ask
        return None


def launcher_terminal(process: int, proc: Path = Path("/proc")) -> str | None:
    """The terminal on stdout of the topmost mpirun above `process`; None: none above, or its output goes elsewhere."""
    found = None
    try:
        while process > 1:
            stat = (proc / str(process) / "stat").read_text(errors="replace")
            name = stat[stat.index("(") + 1 : stat.rindex(")")]  # the name may hold blanks and brackets itself
            if any(word in name for word in LAUNCHERS):
                found = process
            elif found is not None:
                break
            process = int(stat[stat.rindex(")") + 2 :].split()[1])
        target = "" if found is None else os.readlink(proc / str(found) / "fd" / "1")
    except (OSError, ValueError):  # no /proc here, or the process is another user's
        return None
    return target if target.startswith(("/dev/pts/", "/dev/tty")) else None


def process_start() -> float:
    """When this process was started, as time.time(); now where the system does not tell (other than Linux)."""
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat[stat.rindex(")") + 2 :].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return time.time()


def _columns(columns: int) -> int:
    return columns if columns >= 20 else 80  # a terminal may say 0
