"""Every MPI test has a time limit that prints the stacks of all ranks: a hang is the usual way to fail here."""

import faulthandler
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from dtrain.collectives import Communicator, node, world

LIMIT = float(os.environ.get("DTRAIN_TEST_TIMEOUT", "100"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """pytest-mpi takes the name of this folder for its mark and skips all; whoever names the folder wants the tests.

    Each rank has temporary folders of its own: pytest's common ones are tidied up by all ranks at once, which races.
    """
    if hasattr(config.option, "with_mpi"):
        config.option.with_mpi = True
    if not config.option.basetemp:
        config.option.basetemp = tempfile.mkdtemp(prefix="dtrain-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


@pytest.fixture(scope="session")
def comm() -> Communicator:
    """All ranks of this mpirun."""
    return world()


@pytest.fixture
def bold(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """All ranks once more, where no first collectives are compared: calls that come again are prepared at once."""
    monkeypatch.setattr(node, "CHECKED", 0)
    found = comm.split(0)
    assert found is not None
    yield found
    found.close()


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One new folder for all ranks."""
    path = Path(comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield path
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Print the stacks and end this rank, and with it the job, after LIMIT seconds."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure on one of several ranks is printed and ends the job: the others wait for it in a collective."""
    report = yield
    if report.failed:
        from dtrain.collectives.mpi import abort, position

        rank, size = position()
        if size > 1:
            capture = item.config.pluginmanager.getplugin("capturemanager")
            if capture is not None:
                capture.suspend_global_capture(in_=True)
            print(f"\n{item.nodeid} on rank {rank} of {size}\n{report.longreprtext}", file=sys.stderr, flush=True)
            abort(1)
    return report
