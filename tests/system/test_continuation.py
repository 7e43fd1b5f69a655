"""Jobs that end before their last step, or after it, and start again: the same bits, and nothing lost."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.system import program
from tests.system.program import (
    MPIRUN,
    Process,
    dtrain,
    losses,
    metrics,
    needs_mpirun,
    on,
    results,
    wait_for,
    well,
    write_config,
)

pytestmark = [pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def long(folder: Path, text: Path) -> tuple[Path, Path]:
    """A job long enough to be interrupted in its middle, and its folder when it was not."""
    train = {"steps": 40, "global_batch": 12, "micro_batch": 2, "validate": {"every": 20, "batches": 1}}
    config = write_config(folder, text, name="long", train=train, model={"dropout": 0.1}, checkpoint={"every": 10})
    return config, folder / "runs" / "long"


def interrupted(config: Path, run: Path, ranks: int, number: int) -> None:
    """Start the job and end it by a signal, sent to all its processes, once a checkpoint is there."""
    for _ in range(5):
        shutil.rmtree(run, ignore_errors=True)
        job = Process(on(ranks, "dtrain", "run", config, f"name={run.name}"))
        # the launcher has given its ranks groups of their own; SIGKILL must reach them all the same: they lose MPI
        wait_for(lambda job=job: (run / "checkpoints" / "step_00000010").exists() or job.poll() is not None)
        os.killpg(job.pid, number)
        assert job.finish().code != 0 or (run / "summary.json").exists()
        wait_for(lambda: not alive(run.name), what=f"the end of all ranks of {run.name}")
        if not (run / "summary.json").exists():
            return
    pytest.fail("the job was faster than the signal, five times")


def alive(name: str) -> bool:
    return bool(program.processes(f"name={name}"))


@pytest.mark.parametrize(
    ("ranks", "number"),
    [(0, signal.SIGTERM), pytest.param(2, signal.SIGKILL, marks=needs_mpirun)],
)
def test_a_resumed_run_is_the_whole_run(long, folder, ranks, number):
    config, _ = long
    whole, run = folder / "runs" / f"whole-{ranks}", folder / "runs" / f"interrupted-{ranks}"
    well("run", config, f"name={whole.name}", ranks=ranks)
    interrupted(config, run, ranks, number)
    before = len(metrics(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')  # killed while writing
    shutil.copytree(run, folder / "runs" / f"elsewhere-{ranks}")

    ended = well("run", config, f"name={run.name}", ranks=ranks)
    assert before < 40 and "resumed from" in ended.out
    assert results(run) == results(whole)  # the same bits
    assert "0 different" in well("checkpoint", "diff", run, whole).out

    other = folder / "runs" / f"elsewhere-{ranks}"  # on another number of ranks
    others = {0: 2 if MPIRUN else 0, 2: 3}[ranks]
    assert "resumed from" in well("run", config, f"name={other.name}", ranks=others).out
    assert [row["step"] for row in metrics(other)] == list(range(1, 41))
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-9)


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_a_finished_run_is_left_alone(alone, config, folder, ranks):
    run = folder / "runs" / f"again-{ranks}"
    shutil.copytree(alone[1], run)
    well("run", config, f"name={run.name}")  # now its config.yaml has the name
    before = snapshot(run)
    ended = well("run", config, f"name={run.name}", ranks=ranks)
    assert "finished already" in ended.out and "20 of 20" in ended.out
    assert "first step" not in ended.out and "loss curve" not in ended.out
    after = snapshot(run)
    assert set(after) == set(before)
    assert [name for name in after if after[name] != before[name]] == []


def test_never_resume_protects_what_is_there(alone, config):
    before = snapshot(alone[1])
    ended = dtrain("run", config, "name=alone", "checkpoint.resume=never")
    assert ended.code == 2
    assert "checkpoint.resume" in ended.err and ended.err.count("\n") == 1
    assert snapshot(alone[1]) == before


def test_old_checkpoints_go(config, folder):
    well("run", config, "name=keep", "checkpoint.every=5", "checkpoint.keep=2")
    kept = sorted(path.name for path in (folder / "runs" / "keep" / "checkpoints").iterdir())
    assert kept == ["step_00000015", "step_00000020"]


def test_a_damaged_checkpoint_is_told_and_passed_over(alone, config, folder):
    run = folder / "runs" / "damaged"
    shutil.copytree(alone[1], run)
    shard = next((run / "checkpoints" / "step_00000020").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 255
    shard.write_bytes(content)
    verified = dtrain("checkpoint", "verify", run / "checkpoints" / "step_00000020")
    assert verified.code == 2 and verified.err.count("\n") == 1 and shard.name in verified.err
    shard.unlink()  # half a checkpoint
    assert "damaged" in well("checkpoint", "ls", run).out
    ended = well("run", config, "name=damaged")
    assert "step_00000010" in ended.out.split("first step")[0]
    assert results(run) == results(alone[1])
