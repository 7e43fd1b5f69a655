"""`dtrain verify` as a user runs it; and the loss curves of five layouts on real text beside one process.

DTRAIN_BATTERY=all runs the curves: 200 steps in float32 under mpirun, ten minutes on two cores.
"""

import os
from pathlib import Path

import pytest

from tests.system import program

RIGHT = "parallel={tp: 2, pp: 2, data_parallel: zero2, sequence: true}"
LAYOUTS = {
    "dp8": (8, "parallel={dp: 8}"),
    "tp8": (8, "parallel={tp: 8}"),
    "pp8": (8, "parallel={pp: 8}"),
    "dp2-tp2-pp2": (8, "parallel={dp: 2, tp: 2, pp: 2}"),
    "zero3": (8, "parallel={dp: 8, data_parallel: zero3}"),
}


@pytest.fixture
def config(tmp_path: Path, text: Path) -> Path:
    """Two blocks, so that there are two stages."""
    model = {**program.SMALL["model"], "layers": 2}
    return program.write_config(tmp_path, text, model=model)


def test_a_right_layout(config: Path) -> None:
    ended = program.dtrain("verify", config, RIGHT, "--steps=2", ranks=4)
    assert ended.code == 0, ended.words
    assert "RIGHT  4 ranks (pp=2 tp=2 zero2) equal one process over 2 steps" in ended.out
    assert "(float64)" in ended.out and "more that differ less; --all shows them" in ended.out
    assert not (config.parent / "runs").exists()


def test_a_wrong_one_is_told_once_and_ends_with_1(config: Path, tmp_path: Path) -> None:
    """One of the sums between ranks is left out by a program of the user's."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "from dtrain.strategies.naive import NaiveDataParallel\n"
        "from dtrain.launch.main import run\n"
        "from dtrain.launch.failures import guard\n"
        "NaiveDataParallel.reduce_gradients = lambda self, model: None\n"
        f"with guard():\n    run(['verify', {str(config)!r}, 'parallel.data_parallel=naive', '--steps=1', '--all'])\n"
    )
    ended = program.Process(program.on(2, "python", broken)).finish()
    assert ended.code == 1, ended.words
    assert ended.out.count("WRONG  2 ranks (dp=2 naive) differ") == 1
    assert "gradients of step 1 (28 of 28 tensors): embedding is the first in forward order" in ended.out
    assert "Traceback" not in ended.words


def test_what_cannot_be_compared_is_refused(config: Path) -> None:
    compressed = "parallel.compression={kind: int8, everywhere: true}"
    ended = program.dtrain("verify", config, compressed, ranks=2)
    assert ended.code == 2 and "parallel.compression.kind: int8; loses" in ended.words


@pytest.mark.timeout(6000)
@pytest.mark.skipif("DTRAIN_BATTERY" not in os.environ, reason="ten minutes: make battery")
def test_loss_curves_of_200_steps_on_real_text(tmp_path: Path) -> None:
    """float32; the largest difference is printed, relative to the loss."""
    model = {"kind": "gpt", "layers": 8, "dim": 32, "heads": 8, "sequence": 32}
    train = {"steps": 200, "global_batch": 16, "micro_batch": 2, "dtype": "float32"}
    path = program.write_config(
        tmp_path, Path("stdlib"), model=model, train=train, checkpoint={"every": 0}, sample={"tokens": 0}
    )
    calm = "optimizer.learning_rate=0.002"
    assert program.dtrain("run", path, "name=alone", calm, limit=1200).code == 0
    alone = program.losses(tmp_path / "runs" / "alone")
    assert len(alone) == 200 and alone[-1] < alone[0] - 1.5
    for name, (ranks, layout) in LAYOUTS.items():
        ended = program.dtrain("run", path, f"name={name}", layout, calm, ranks=ranks, limit=1200)
        assert ended.code == 0, ended.words
        curve = program.losses(tmp_path / "runs" / name)
        apart = max(abs(a - b) / b for a, b in zip(curve, alone, strict=True))
        print(f"{name}: {len(curve)} steps, {alone[0]:.3f} to {curve[-1]:.3f}, largest difference {apart:.1e}")
        assert apart < 1e-3
