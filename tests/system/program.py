"""Start the program as a user does: a real process, alone or under mpirun, and keep all that it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MPIRUN = str(BIN / "mpirun") if (BIN / "mpirun").exists() else shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: neither the wheel's nor the system's")
LIMIT = 120  # seconds for one job; a loaded machine takes ten times as long as an idle one

# The smallest model that has everything of a large one; a step takes milliseconds.
SMALL: dict[str, Any] = {
    "model": {"kind": "gpt", "layers": 1, "dim": 32, "heads": 4, "sequence": 16},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 4},
    "train": {"steps": 20, "global_batch": 24, "micro_batch": 3, "dtype": "float64"},
    "checkpoint": {"every": 10},
    "log": {"every": 1},
    "sample": {"tokens": 20},
}
MLP: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "images", "path": "digits", "validation": 0.2},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
}


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def words(self) -> str:
        """Everything said, without what the launchers add when a job fails (below a line of dashes or =)."""
        return (self.out + self.err).split("\n-----------")[0].split("-----------------------")[0].split("\n=====")[0]


def environ(**more: str) -> dict[str, str]:
    """Our variables without those of a launcher, this Python's programs first on PATH.

    Open MPI needs leave to run as root, to start more ranks than there are cores, and must not try UCX on one machine.
    """
    strange = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_LOCAL", "HYDRA_", "SLURM_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    ours |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
    ours |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ours |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return ours | more


def on(ranks: int, *command: str | Path) -> list[str]:
    """The command line on so many ranks; 0: without mpirun."""
    return [*([str(MPIRUN), "-n", str(ranks)] if ranks else []), *map(str, command)]


class Process(subprocess.Popen[bytes]):
    """A process in a session of its own, where signals can be sent to it and all its children.

    What it says goes into files: a pipe that nobody reads would fill up and stop it.
    """

    def __init__(self, command: list[str], cwd: Path = ROOT, **variables: str) -> None:
        self.said = [tempfile.TemporaryFile() for _ in range(2)]
        out, err = self.said
        super().__init__(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environ(**variables),
            start_new_session=True,
        )  # fmt: skip

    def words(self) -> tuple[str, str]:
        """What it has said so far: standard output, standard error."""
        out, err = (os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace") for file in self.said)
        return out, err

    def finish(self, limit: float = LIMIT) -> Ended:
        """Wait for the end. A process that does not end is killed with its children and fails the test."""
        began = time.monotonic()
        try:
            self.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()
            out, err = self.words()
            raise AssertionError(f"still running after {limit} s: {self.args!r}\n{out[-3000:]}\n{err}") from None
        finally:
            out, err = self.words()
            for file in self.said:
                file.close()
        return Ended(self.returncode, out, err, time.monotonic() - began)


def dtrain(*arguments: str | Path, ranks: int = 0, cwd: Path = ROOT, limit: float = LIMIT, **variables: str) -> Ended:
    """Run `dtrain ARGUMENTS` to its end."""
    return Process(on(ranks, "dtrain", *arguments), cwd, **variables).finish(limit)


def well(*arguments: str | Path, ranks: int = 0, cwd: Path = ROOT, **variables: str) -> Ended:
    """Run `dtrain ARGUMENTS`, which must succeed."""
    ended = dtrain(*arguments, ranks=ranks, cwd=cwd, **variables)
    assert ended.code == 0, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    return ended


def write_config(folder: Path, text: Path, name: str = "small", **sections: dict[str, Any] | None) -> Path:
    """A YAML file of the small job with some sections changed; it writes below `folder`/runs."""
    values: dict[str, Any] = {"name": name, "output": str(folder / "runs")}
    values["data"] = {"kind": "text", "path": str(text), "tokenizer": "byte"}
    values |= {key: dict(section) for key, section in SMALL.items()}
    for key, section in sections.items():
        if section is None or section.get("kind", values.get(key, {}).get("kind")) != values.get(key, {}).get("kind"):
            values[key] = section or {}
        else:
            values[key] = {**values.get(key, {}), **section}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TIMES = ("tokens_per_second", "step_seconds", "memory_bytes")  # what may differ between two equal runs


def results(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory: what must be equal between equal runs."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in metrics(run)]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def wait_for(happened: Any, limit: float = LIMIT, what: str = "it") -> None:
    """Wait until `happened()` is true."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen within {limit} s"
        time.sleep(0.002)


def processes(mark: str) -> list[tuple[int, str]]:
    """(process id, command line) of all running processes with `mark` in their command line."""
    listed = subprocess.run(
        ["ps", "-axww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [(int(row[0]), row[2]) for row in rows if len(row) == 3 and mark in row[2] and not row[1].startswith("Z")]
