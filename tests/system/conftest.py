"""For the system tests: one text, one cache (kernels are compiled once) and the small job, run once for all of them."""

import argparse
import os
from pathlib import Path

import pytest

from tests.system import program
from tests.system.program import Ended, Process, needs_mpirun, well, write_config


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the session's own, unless the caller chose one."""
    os.environ.setdefault("DTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def text() -> Path:
    """Real text: a file of Python's library, 100 kB."""
    return Path(argparse.__file__)


@pytest.fixture(scope="session", autouse=True)
def warm(cache: None, text: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile the kernels of both precisions at the same time: later jobs have limits that count on it."""
    folder = tmp_path_factory.mktemp("warm")
    config = program.write_config(folder, text, train={"steps": 1}, checkpoint={"every": 0})
    jobs = [
        Process(program.on(0, "dtrain", "run", config, f"name={dtype}", f"train.dtype={dtype}"))
        for dtype in ("float32", "float64")
    ]
    for ended in [job.finish(400) for job in jobs]:
        assert ended.code == 0, ended.out + ended.err


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def config(folder: Path, text: Path) -> Path:
    return write_config(folder, text, train={"validate": {"every": 10, "batches": 2}})


@pytest.fixture(scope="session")
def alone(folder: Path, config: Path) -> tuple[Ended, Path]:
    """`dtrain run` without mpirun: what it said, and its folder."""
    return well("run", config, "name=alone"), folder / "runs" / "alone"


@pytest.fixture(scope="session")
def two(folder: Path, config: Path) -> tuple[Ended, Path]:
    """The same on two ranks, each gradient accumulated over four micro-batches (alone: over eight)."""
    return well("run", config, "name=two", ranks=2), folder / "runs" / "two"


@pytest.fixture(params=["alone", pytest.param("two", marks=needs_mpirun)])
def job(request: pytest.FixtureRequest) -> tuple[Ended, Path]:
    """Each of the two."""
    found: tuple[Ended, Path] = request.getfixturevalue(request.param)
    return found
