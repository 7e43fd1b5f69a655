"""Whole launches for `dtrain bench step`: dtrain under mpirun, PyTorch as plain processes, each with a time limit.

    launch_dtrain ──► mpirun -n P python -m dtrain.launch.bench_step_worker FOLDER ──► FOLDER/report-{0..P-1}.json
    launch_torch  ──► P x python launch/peers/torch_gpt.py spec.json report.json   ──► the same files, the same keys

No launch outlives its limit or its parent's error: every process has a session of its own, which is ended as a whole,
and the ranks end themselves when the limit is long over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dtrain.config import Config
from dtrain.launch import configuration, environment
from dtrain.launch.mpirun import Mpirun, stop

_THREADS = ("OMP_NUM_THREADS", *environment.THREAD_VARIABLES)

PAIRS = 7  # steps of dtrain that are compared with their bare matmuls, one by one

Report = dict[str, Any]


class BenchError(RuntimeError):
    """A launch failed or took too long; carries the end of what it said."""


def launch_dtrain(
    launcher: Mpirun, config: Config, ranks: int, folder: Path, limit: float
) -> tuple[float, list[Report]]:
    """Run `config` on `ranks` ranks of dtrain; return the time of the launch and every rank's report."""
    (folder / "config.yaml").write_text(configuration.dump(config))
    command = launcher.command(ranks, [sys.executable, "-m", "dtrain.launch.bench_step_worker", str(folder)])
    started = run_together([(command, launcher.leave(ranks))], folder / "output", limit)
    return started, _reports(folder, ranks)


def launch_torch(
    python: str, spec: dict[str, Any], ranks: int, folder: Path, limit: float
) -> tuple[float, list[Report]]:
    """Run the peer on `ranks` processes; return the time of the launch and every rank's report."""
    (folder / "spec.json").write_text(json.dumps(spec | {"store": str(folder / "store"), "limit": limit}))
    script = Path(__file__).parent / "peers" / "torch_gpt.py"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    commands = []
    for rank in range(ranks):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": loopback}
        command = [python, str(script), str(folder / "spec.json"), str(folder / f"report-{rank}.json")]
        commands.append((command, variables))
    started = run_together(commands, folder / "output", limit)
    return started, _reports(folder, ranks)


def run_together(commands: list[tuple[list[str], dict[str, str]]], output: Path, limit: float) -> float:
    """Run all commands at once until all have ended well; return the time of the launch.

    When one fails or `limit` seconds have passed, all are ended and BenchError tells the end of their output.
    """
    base = {**os.environ, **dict.fromkeys(_THREADS, "1"), "DTRAIN_BENCH_LIMIT": str(limit + 10)}
    processes: list[subprocess.Popen[bytes]] = []
    with output.open("wb") as file:
        started = time.time()
        try:
            for command, variables in commands:
                environ = base | variables
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environ,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                if time.time() - started > limit:
                    raise BenchError(f"{commands[0][0]}: not done after {limit:.0f} s\n{_tail(output)}")
                time.sleep(0.02)
        finally:
            for process in processes:
                stop(process)
    failed = [code for process in processes if (code := process.returncode)]
    if failed:
        raise BenchError(f"{' '.join(commands[0][0])}: exit code {failed[0]}\n{_tail(output)}")
    return started


def _reports(folder: Path, ranks: int) -> list[Report]:
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(ranks)]


def _tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-30:])
