"""For the system tests: one text and one cache for all of them, so that kernels are compiled once."""

import argparse
import os
from pathlib import Path

import pytest

from tests.system import program
from tests.system.program import Process


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
