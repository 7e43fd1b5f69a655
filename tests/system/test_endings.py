"""How jobs end that do not end well: soon, with one account of what happened, and without leaving a process behind."""

import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.system.program import Process, needs_mpirun, on, processes, wait_for, write_config

pytestmark = [pytest.mark.timeout(300)]
SOON = 15  # seconds from the fault to the end of the job; 5 are promised, on a machine with nothing else to do

# The program, except that one rank fails in the middle of a step; the others are on their way to the reduction.
FAULTY = """
import sys
from dtrain.launch import environment
environment.set_blas_threads()
from dtrain.launch.__main__ import main
from dtrain.trainer import Trainer

rank, where = int(sys.argv.pop(1)), sys.argv.pop(1)
whole = getattr(Trainer, where)

def part(self, *args):
    if self.step == 3 and self.mesh.comm.rank == rank:
        print("failing now", flush=True)
        raise ArithmeticError("the moon is in the way")
    return whole(self, *args)

setattr(Trainer, where, part)
main()
"""


@pytest.fixture
def mark() -> str:
    """A name that only the processes of this test have in their command lines."""
    return f"mark-{uuid.uuid4().hex}"


@pytest.fixture
def config(tmp_path: Path, text: Path, mark: str) -> Path:
    """A job that goes on for hours."""
    return write_config(
        tmp_path, text, name=mark, train={"steps": 10_000_000, "micro_batch": 1}, checkpoint={"every": 5}
    )


def gone(mark: str, limit: float = SOON) -> None:
    """Assert that no process of the test is left."""
    try:
        wait_for(lambda: not processes(mark), limit)
    except AssertionError:
        left = processes(mark)
        for process, _ in left:
            os.kill(process, signal.SIGKILL)
        raise AssertionError(f"still there {limit} s later: {left}") from None


def under_way(job: Process, tmp_path: Path, mark: str) -> None:
    """Wait until the job trains."""
    path = tmp_path / "runs" / mark / "metrics.jsonl"
    wait_for(lambda: job.poll() is not None or (path.exists() and path.read_text().count("\n") > 3))
    assert job.poll() is None, job.words()


@needs_mpirun
@pytest.mark.parametrize(
    ("ranks", "failing", "where"), [(2, 0, "execute"), (3, 1, "total"), (3, 2, "microbatches"), (8, 7, "execute")]
)
def test_an_exception_on_one_rank_ends_all(config, mark, ranks, failing, where):
    job = Process(on(ranks, sys.executable, "-c", FAULTY, str(failing), where, "run", str(config)))
    wait_for(lambda: "failing now" in job.words()[0] or job.poll() is not None)
    ended = job.finish(SOON)
    assert ended.code == 1
    words = ended.words
    assert words.count("Traceback (most recent call last)") == 1, words
    assert words.count("ArithmeticError: the moon is in the way") == 1
    assert words.count(f"rank {failing} of {ranks} on {socket.gethostname()}") == 1
    gone(mark, 5)


def test_an_exception_alone(config, mark):
    ended = Process(on(0, sys.executable, "-c", FAULTY, "0", "total", "run", str(config))).finish()
    assert ended.code == 1
    assert ended.err.count("Traceback") == ended.err.count("the moon is in the way") == 1
    gone(mark, 5)


@needs_mpirun
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["Ctrl-C", "SIGINT to mpirun", "SIGTERM to mpirun", "SIGKILL to mpirun"],
)
def test_a_signal_leaves_no_process_behind(config, tmp_path, mark, number, group):
    job = Process(on(3, "dtrain", "run", config))
    under_way(job, tmp_path, mark)
    assert len(processes(mark)) >= 3
    (os.killpg if group else os.kill)(job.pid, number)
    gone(mark)
    ended = job.finish(SOON)
    assert ended.code != 0
    assert "Traceback" not in ended.out + ended.err
    assert "dtrain: error" not in ended.out + ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_one_process(config, tmp_path, mark, number):
    job = Process(on(0, "dtrain", "run", config))
    under_way(job, tmp_path, mark)
    os.killpg(job.pid, number)
    ended = job.finish(SOON)
    assert (ended.code, ended.err.strip()) == (128 + number, "")
    gone(mark, 1)


@needs_mpirun
@pytest.mark.parametrize("victim", [0, -1])
def test_a_killed_rank_ends_the_job(config, tmp_path, mark, victim):
    job = Process(on(3, "dtrain", "run", config))
    under_way(job, tmp_path, mark)
    ranks = sorted(process for process, command in processes(mark) if "mpirun" not in command and "-n 3" not in command)
    ranks = [process for process in ranks if "python" in dict(processes(mark)).get(process, "")]
    assert len(ranks) == 3
    os.kill(ranks[victim], signal.SIGKILL)
    ended = job.finish(SOON)
    assert ended.code != 0
    assert "Traceback" not in ended.words
    gone(mark, 5)


@needs_mpirun
def test_a_signal_during_start_up_leaves_no_process_behind(config, tmp_path, mark):
    """Before, in and after the start of MPI; a signal that Python gets before our first line is told by Python."""
    for moment in (0.1, 0.4, 0.8):
        job = Process(on(3, "dtrain", "run", config))
        time.sleep(moment)
        os.killpg(job.pid, signal.SIGINT)
        ended = job.finish(2 * SOON)
        assert ended.code != 0
        gone(mark)
