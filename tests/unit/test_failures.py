"""How jobs end: each test starts a real job, lets it fail, and looks at the exit code and at every word said."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.executable).with_name("mpirun")
MPIRUN = str(BESIDE) if BESIDE.exists() else shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: neither the wheel's nor the system's")

PROGRAM = """
import os, sys, threading, time
from dtrain.errors import UserError
from dtrain.launch.environment import job
from dtrain.launch.failures import guard

with guard():
    case, rank = sys.argv[1], job().rank
    if case == "mistake of all, early": raise UserError("bad key")
    if case == "mistake of one, early" and rank == 1: raise UserError("bad file")
    if case == "fault of all, early": raise ZeroDivisionError("unlucky")
    if case == "fault of one, early" and rank == 1: raise ZeroDivisionError("unlucky")
    from dtrain.collectives import world
    comm = world()
    if case == "mistake of all": raise UserError("bad key")
    if case == "mistake of one" and rank == 1: raise UserError("bad file")
    if case == "mistake of the first" and rank == 0: raise UserError("bad file")
    if case == "fault of all": raise ZeroDivisionError("unlucky")
    if case == "fault of one" and rank == 1: raise ZeroDivisionError("unlucky")
    if case == "fault in a thread" and rank == 1: threading.Thread(target=lambda: 1 // 0).start()
    if case == "exit" and rank == 1: sys.exit(3)
    if case == "sleep":
        os.write(1, f"{os.getpid()}\\n".encode())
        time.sleep(60)
    if case != "well":
        comm.barrier()
        time.sleep(60)
"""


def environ() -> dict[str, str]:
    """Our variables without those of a launcher, with leave for root and for more ranks than cores under Open MPI."""
    strange = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_LOCAL", "HYDRA_", "SLURM_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    ours |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ours | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


def end(case: str, ranks: int) -> tuple[int, str]:
    """Exit code and everything that a job says; without mpirun for `ranks` 0. A hanging job fails the test."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, case]
    if ranks:
        command = [str(MPIRUN), "-n", str(ranks), *command]
    run = subprocess.run(command, capture_output=True, text=True, env=environ(), timeout=40)
    words = run.stdout + run.stderr
    return run.returncode, words.split("-----------")[0]  # what Open MPI's launcher itself adds


@needs_mpirun
def test_all_is_well():
    assert end("well", 3) == (0, "")


@needs_mpirun
@pytest.mark.parametrize("when", ["", ", early"])
def test_a_mistake_of_all_is_told_once(when):
    assert end(f"mistake of all{when}", 3) == (2, "dtrain: error: bad key\n")


@needs_mpirun
@pytest.mark.parametrize("when", ["", ", early"])
def test_a_mistake_of_one_ends_all(when):
    code, words = end(f"mistake of one{when}", 3)
    assert code == 2
    assert words.startswith("dtrain: error: bad file (rank 1 of 3 on ")
    assert words.count("\n") == 1


@needs_mpirun
def test_a_mistake_of_the_first_ends_all():
    assert end("mistake of the first", 3) == (2, "dtrain: error: bad file\n")


@needs_mpirun
@pytest.mark.parametrize("case", ["fault of one", "fault of one, early", "fault of all", "fault of all, early"])
def test_a_fault_is_told_once_with_its_rank(case):
    code, words = end(case, 3)
    assert code == 1
    assert words.startswith("Traceback (most recent call last):\n")
    assert words.count("Traceback") == words.count("ZeroDivisionError: unlucky") == 1
    assert words.endswith(" failed, the job ends\n")
    assert "dtrain: rank 1 of 3 on " in words or "of one" not in case
    assert "failures.py" not in words


@needs_mpirun
def test_a_fault_in_a_thread_ends_all():
    code, words = end("fault in a thread", 3)
    assert code == 1
    assert words.count("ZeroDivisionError") == words.count("dtrain: rank 1 of 3 on ") == 1


@needs_mpirun
def test_an_exit_of_one_ends_all():
    assert end("exit", 3) == (3, "")


@pytest.mark.parametrize("when", ["", ", early"])
def test_alone(when):
    assert end(f"mistake of all{when}", 0) == (2, "dtrain: error: bad key\n")
    code, words = end(f"fault of all{when}", 0)
    assert code == 1
    assert words.endswith("ZeroDivisionError: unlucky\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=needs_mpirun)])
def test_signals_end_all_ranks(number, ranks):
    command = [sys.executable, "-c", PROGRAM, "sleep"]
    if ranks:
        command = [str(MPIRUN), "-n", str(ranks), *command]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )  # fmt: skip
    assert job.stdout is not None
    ids = [int(job.stdout.readline()) for _ in range(ranks or 1)]
    job.send_signal(number)
    _, words = job.communicate(timeout=20)
    if ranks == 0:
        assert (job.returncode, words) == (128 + number, "")
    assert "Traceback" not in words
    limit = time.monotonic() + 5
    while [process for process in ids if alive(process)] and time.monotonic() < limit:
        time.sleep(0.05)
    assert not [process for process in ids if alive(process)]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def dtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ(), cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "configs/gpt_dpp.yaml"], "configs/gpt_dpp.yaml: no such file; there are: configs/gpt_ddp.yaml, "),
        (["run", "configs/gpt_ddp.yaml", "optimizer.learning_rte=1"], "did you mean learning_rate?"),
        (["run", "configs/gpt_ddp.yaml", "train.steps=x"], "train.steps: 'x'; must be a whole number"),
        (["run", "--fast"], "--fast"),
    ],
)
def test_mistakes_on_the_command_line(arguments, told):
    run = dtrain(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("dtrain: error: ") and told in run.stderr
    assert "Traceback" not in run.stderr


def test_a_reader_that_leaves_is_no_fault():
    command = f"{sys.executable} -m dtrain.launch show config configs/gpt_ddp.yaml | true"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environ(), cwd=ROOT, timeout=60)
    assert run.stderr == ""
