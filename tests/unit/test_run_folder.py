"""What a run tells on the terminal and what it writes are the same steps; and the memory of every rank."""

import json
import re
from pathlib import Path

import pytest

from dtrain.collectives import run_threads, single
from dtrain.launch.memory import peak_line
from dtrain.launch.run import run
from tests import training


def steps_of(folder: Path, out: str) -> tuple[list[int], list[int]]:
    rows = [json.loads(line) for line in (folder / "test" / "metrics.jsonl").read_text().splitlines()]
    told = re.findall(r"^step +(\d+)/\d+  loss", out, re.MULTILINE)
    return [row["step"] for row in rows], [int(step) for step in told]


def job(folder: Path, steps: int):
    return training.config(
        output=str(folder),
        model={"kind": "gpt", "layers": 1, "dim": 16, "heads": 2, "sequence": 8},
        data={"kind": "text", "path": json.__file__},
        train={"steps": steps, "micro_batch": 2, "validate": {"every": 0}},
        checkpoint={"every": 3},
        log={"every": 4},
        sample={"tokens": 0},
    )


def test_a_line_of_metrics_per_step_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(job(tmp_path, 9), Path("test.yaml"), single())
    written, told = steps_of(tmp_path, capsys.readouterr().out)
    assert written == told == [1, 4, 8, 9]
    run(job(tmp_path, 13), Path("test.yaml"), single())  # goes on: its first step is told of too
    written, told = steps_of(tmp_path, capsys.readouterr().out)
    assert written == [1, 4, 8, 9, *told] and told == [10, 12, 13]


def test_the_memory_of_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_threads(3, lambda comm: run(job(tmp_path, 3), Path("test.yaml"), comm))
    peaks = json.loads((tmp_path / "test" / "summary.json").read_text())["peak_memory_bytes_per_rank"]
    assert len(peaks) == 3 and all(peak > 2e7 for peak in peaks)
    assert f"\n{peak_line(peaks)}\n" in capsys.readouterr().out


def test_the_line_names_the_ranks() -> None:
    mib = 2**20
    assert peak_line([300 * mib]) == "peak memory of a process: 300 MiB"
    assert peak_line([200 * mib, 300 * mib, 100 * mib]) == (
        "peak memory of a process: 300 MiB on rank 1, 100 MiB on rank 2"
    )
