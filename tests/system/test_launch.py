"""`dtrain launch`: what may pass is started again, and nothing is lost; what does not pass is the end."""

import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dtrain.checkpoint import Reader, latest
from tests.system.program import (
    ROOT,
    Ended,
    Process,
    dtrain,
    needs_mpirun,
    on,
    processes,
    results,
    wait_for,
    write_config,
)

pytestmark = [needs_mpirun, pytest.mark.timeout(300)]

# Found by every Python that is started: in rank 1, a step that ends badly, once or always.
SITE = """
import os, pathlib
if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    from dtrain.trainer import Trainer
    whole = Trainer.execute
    def part(self, *args):
        if self.step == {step} and "once" not in {how!r}:
            raise ArithmeticError("the moon is in the way")
        if self.step == {step} and not os.path.exists({mark!r}):
            pathlib.Path({mark!r}).touch()
            os.kill(os.getpid(), 9)
        return whole(self, *args)
    Trainer.execute = part
"""


def launch(config: Path, *arguments: str, how: str = "", step: int = 7) -> Ended:
    """`dtrain launch` on two ranks, of which one fails in that step."""
    folder = config.parent / f"site-{how}"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(step=step, how=how, mark=str(folder / "mark")) if how else "")
    return dtrain("launch", "-n", "2", "--delay", "0", config, *arguments, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


@pytest.fixture
def config(tmp_path: Path, text: Path) -> Path:
    return write_config(tmp_path, text, train={"steps": 10}, checkpoint={"every": 5}, model={"dropout": 0.1})


def test_a_killed_rank_costs_no_step(config: Path) -> None:
    """The file wants another start than the newest checkpoint: the restart goes on from it all the same."""
    runs = config.parent / "runs"
    whole, killed = (
        launch(config, f"name={name}", "checkpoint.resume=never", how=how)
        for name, how in (("whole", ""), ("killed", "once"))
    )
    assert (whole.code, killed.code) == (0, 0), killed.out + killed.err
    assert "dtrain: " not in whole.err and "Exit codes" not in whole.out + killed.out
    told = re.findall("^dtrain: .*", killed.err, re.M)
    assert len(told) == 1 and re.fullmatch(
        r"dtrain: (rank 1|rank 0 or 1|a rank) on \S+ was killed by signal 9; restart 1 of 3 from step 5 in 0 s", told[0]
    ), told
    assert killed.out.count("resumed from") == 1 and "step_00000005: step 5 of 10" in killed.out
    assert results(runs / "killed") == results(runs / "whole")  # the same bits
    a, b = (Reader(latest(runs / name / "checkpoints") or "") for name in ("whole", "killed"))
    assert a.names() == b.names() and a.state["step"] == b.state["step"] == 10
    assert all(np.array_equal(a.tensor(name), b.tensor(name)) for name in a.names())


def test_a_fault_that_does_not_pass_is_given_up(config: Path) -> None:
    ended = launch(config, "--restarts", "1", how="always")
    assert ended.code == 1
    fault = r"dtrain: rank 1 on \S+ failed \(ArithmeticError: the moon is in the way\); "
    told = [line for line in ended.err.splitlines() if line.startswith("dtrain: ") and "the job ends" not in line]
    assert len(told) == 2, ended.err
    assert re.fullmatch(fault + "restart 1 of 1 from step 5 in 0 s", told[0])
    assert re.fullmatch(fault + "no newer checkpoint after 1 restarts from step 5: given up", told[1])


def test_mistakes_are_not_tried_again(config: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for arguments, word in (
        (["--mpi", "--bogus-option"], "bogus-option"),
        ([f"data.path={short}"], "data.path"),  # what only the ranks find
    ):
        ended = launch(config, *arguments)
        assert ended.code == 2 and ended.err.count("dtrain: ") == 1, ended.err
        assert ended.err.startswith("dtrain: error: ") and word in ended.err
        assert "Traceback" not in ended.err and "restart" not in ended.err


def test_without_checkpoints_a_restart_begins_anew(config: Path) -> None:
    ended = launch(config, "checkpoint.every=0", "train.steps=4", how="once", step=3)
    assert ended.code == 0, ended.err
    first, second = re.findall("^dtrain: .*", ended.err, re.M)
    assert "checkpoint.every: 0 writes no checkpoints" in first
    assert second.endswith("restart 1 of 3 from step 0 in 0 s")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_all_and_starts_nothing(config: Path, number: int, code: int) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux ends the children of a process that was killed")
    steps = config.parent / "runs" / "small" / "metrics.jsonl"
    job = Process(on(0, "dtrain", "launch", "-n", "2", "--delay", "0", config, "train.steps=10000000"))
    wait_for(lambda: job.poll() is not None or (steps.exists() and steps.read_text().count("\n") > 1))
    os.kill(job.pid, number)
    wait_for(lambda: not processes(str(config)), 15, f"the end of all processes of {config}")
    ended = job.finish(15)
    assert (ended.code, ended.err.strip()) == (code, "")
