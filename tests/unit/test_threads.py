"""The same collectives between threads of one process, and alone; and what `run_threads` promises about failures."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dtrain.collectives import Communicator, run_threads, single
from tests import collective_cases


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", collective_cases.ALL)
def test_case(name: str, size: int) -> None:
    run_threads(size, collective_cases.ALL[name])


@pytest.mark.parametrize("name", collective_cases.ALL)
def test_case_alone(name: str) -> None:
    collective_cases.ALL[name](single())


def test_results_in_rank_order() -> None:
    assert run_threads(3, lambda comm, x: x + comm.rank, 10) == [10, 11, 12]


def test_first_failure_is_raised_and_nobody_waits() -> None:
    def fail(comm: Communicator) -> None:
        part = comm.split(0)
        assert part is not None
        if comm.rank == 1:
            raise KeyError("the reason")
        part.all_reduce(np.ones(3))

    began = time.monotonic()
    with pytest.raises(KeyError, match="the reason") as caught:
        run_threads(4, fail)
    assert time.monotonic() - began < 10
    assert caught.value.__notes__ == ["on rank 1 of 4"]


def test_a_receive_ends_when_the_sender_fails() -> None:
    def fail(comm: Communicator) -> None:
        if comm.rank == 0:
            raise ZeroDivisionError
        comm.recv(np.empty(3), 0)

    with pytest.raises(ZeroDivisionError):
        run_threads(2, fail)


def test_time_limit_names_the_late() -> None:
    def stray(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.barrier()

    with pytest.raises(TimeoutError, match=r"0\.2 s.*rank 0"):
        run_threads(2, stray, timeout=0.2)


def test_import_starts_no_mpi_and_the_bare_name_is_refused() -> None:
    code = "import sys, dtrain.collectives; sys.exit('mpi4py' in sys.modules or 'ml_dtypes' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import collectives"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 1
    assert "ImportError: import dtrain.collectives" in done.stderr
