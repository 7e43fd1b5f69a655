"""`dtrain launch`: start mpirun, and start it again from the newest checkpoint when the job ended by what may pass.

    mpirun -n 8 dtrain run CONFIG ──► done (0), or a mistake of the user (2)     the end
              ▲                   ──► Ctrl-C, SIGTERM to this process            the end, of all ranks
              │                   ──► a rank killed, a host lost, a fault, a hang
              └── wait ◄── fewer than N restarts since the newest checkpoint ──┴── else the end, with its exit code

A job that gets on may fail as often as it likes; one that does not is given up. Where to go on from is for the ranks to
find, as in every `dtrain run`.

Invariant: never two jobs at once, and none without this process. The next start waits until nothing holds the pipes of
the one before, and the kernel ends mpirun when this process is killed (Linux).
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.checkpoint_reader import scan
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch import configuration, environment, mpirun

KEPT = 1 << 18  # characters that a job said last: from them is told how it ended
FAREWELL = 30.0  # seconds for mpirun to end the others once it is known that the job has failed
TRIAL = 60.0  # seconds for a program that does nothing to start on all hosts

# A process that ends when the one that started it does, and becomes mpirun.
_BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class Job:
    """What is started, once or more: `dtrain run` with `arguments`, by an mpirun with `options` of its own."""

    launcher: mpirun.Mpirun
    ranks: int
    options: list[str]
    arguments: list[str]

    @property
    def environment(self) -> dict[str, str]:
        """The user's, so that ranks choose their number of BLAS threads themselves, and what mpirun needs."""
        terminal = {"DTRAIN_TERMINAL": os.ttyname(1)} if os.isatty(1) else {}  # for the width of the bar
        return environment.GIVEN | self.launcher.leave(self.ranks, bool(self.options)) | terminal

    def command(self, *program: str) -> list[str]:
        """The command line that starts a program on all ranks."""
        return self.launcher.command(self.ranks, program, self.options)

    def what_happened(self, said: str) -> str:
        """Which rank failed and how: in its own words (`failures`), else in mpirun's; empty where none is known."""
        failed = re.search(r"dtrain: (rank \d+) of \d+ on (\S+) failed", said)
        if failed is None:
            return self.launcher.kind.lost(said)
        trace = said[: failed.start()].rpartition("Traceback (most recent call last)")[2]
        error = [f" ({line[:160]})" for line in trace.splitlines()[1:] if line[:1].strip()]
        return f"{failed[1]} on {failed[2]} failed{error[0] if error else ''}"


def launch(
    source: Path, overrides: Sequence[str], ranks: int, restarts: int, delay: float, hosts: Path | None, mpi: str
) -> int:
    """Train as `source` says, in as many jobs as it takes; the exit code of the last one."""
    if environment.job().size > 1:
        raise UserError("dtrain launch: starts mpirun itself; call it without mpirun, with -n")
    config = configuration.load(source, overrides)
    if not config.parallel.auto:
        configuration.for_ranks(config, ranks)
    launcher = mpirun.find()
    job = Job(launcher, ranks, _options(launcher, hosts, mpi), [str(source), *overrides])
    if job.options:
        _try(job)
    if restarts and not config.checkpoint.every:
        _tell("checkpoint.every: 0 writes no checkpoints: a restart begins where this start does")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
    began = newest = _newest(config)
    failures = 0  # since the newest checkpoint was written
    while True:
        # The configuration may want another start than the newest checkpoint, but only until there is one of our own.
        code, how = _run(job, [] if newest == began else ["checkpoint.resume=auto"])
        if not how:
            return code
        known, newest = newest, _newest(config)
        failures = failures + 1 if newest == known else 1
        ours = newest != began or config.checkpoint.resume in ("auto", "never")
        place = f"step {newest[1] if newest else 0}" if ours else config.checkpoint.resume
        if failures > restarts:
            _tell(f"{how}; no newer checkpoint after {restarts} restarts from {place}: given up")
            return code
        _tell(f"{how}; restart {failures} of {restarts} from {place} in {delay:g} s")
        time.sleep(delay)


def _run(job: Job, overrides: Sequence[str]) -> tuple[int, str]:
    """One job, until nothing of it is left: its exit code, and how it failed where that may pass."""
    bound = [sys.executable, "-ISc", _BOUND] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*bound, *job.command(sys.executable, "-m", "dtrain.launch", "run", *job.arguments, *overrides)],
        env=job.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    try:
        said = _pass_on(job, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)  # its pipes close a moment before it ends
    finally:
        mpirun.stop(process)
    if process.returncode == 0:
        return 0, ""
    if "dtrain: error: " in said:
        return 2, ""  # told already, and no restart mends it; Intel's mpirun has another code
    code = process.returncode if process.returncode > 0 else 128 - process.returncode
    return code, job.what_happened(said) or f"mpirun ended with exit code {code}"


def _pass_on(job: Job, process: subprocess.Popen[bytes]) -> str:
    """Pass on what a job says until nobody has its pipes any more; the end of it."""
    assert process.stdout is not None and process.stderr is not None
    said, held, limit = "", b"", float("inf")
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ, sys.stdout.buffer)
        pipes.register(process.stderr, selectors.EVENT_READ, sys.stderr.buffer)
        while pipes.get_map() and time.monotonic() < limit:
            for key, _ in pipes.select(1.0):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    pipes.unregister(key.fileobj)
                said = (said + data.decode(errors="replace"))[-KEPT:]
                if key.fileobj is process.stdout:  # Hydra's last words, which come in pieces, wait for the end
                    data, *rest = (held + data).split(b"[mpiexec@", 1)
                    held = b"[mpiexec@".join([b"", *rest])
                key.data.write(data.replace(b"\0", b""))  # Open MPI ends its last words with one
                key.data.flush()
            if limit == float("inf") and (process.poll() is not None or job.what_happened(said)):
                limit = time.monotonic() + FAREWELL
    sys.stdout.buffer.write(mpirun.without_exit_codes(held))
    return said


def _options(launcher: mpirun.Mpirun, hosts: Path | None, mpi: str) -> list[str]:
    try:
        options = shlex.split(mpi)
    except ValueError as error:
        raise UserError(f"--mpi: {mpi!r}: {error}") from None
    if hosts is not None and not hosts.is_file():
        raise UserError(f"--hosts: {hosts}: no such file; it names a host per line, as {launcher.path} wants it")
    return options if hosts is None else [launcher.kind.hosts, str(hosts), *options]


def _try(job: Job) -> None:
    """UserError where mpirun cannot start anything: an option that it does not know, a host that is not there."""
    command, nothing = job.command("true"), subprocess.DEVNULL
    try:
        tried = subprocess.run(command, env=job.environment, stdin=nothing, capture_output=True, timeout=TRIAL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{shlex.join(command)}: not done after {TRIAL:.0f} s") from None
    if tried.returncode:
        words = (tried.stderr + tried.stdout).decode(errors="replace").strip()
        raise UserError(f"{shlex.join(command)}: exit code {tried.returncode}\n{words}")


def _newest(config: Config) -> tuple[int, int] | None:
    """Serial number and step of the checkpoint that a start with `checkpoint.resume: auto` would go on from."""
    found = [one for one in scan(Path(config.output) / config.name / "checkpoints") if one.problem is None]
    return (found[-1].serial, found[-1].step) if found else None


def _tell(text: str) -> None:
    sys.stdout.flush()
    print(f"dtrain: {text}", file=sys.stderr, flush=True)
