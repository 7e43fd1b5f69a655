"""Fixtures that several files use; and generated examples are the same in every run."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests import fake_cupy

settings.register_profile("dtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("dtrain")


@pytest.fixture
def fast_disk(monkeypatch):
    """Forcing each of hundreds of small files to the disk tests the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def cupy() -> Iterator[Any]:
    """A CuPy made of NumPy and threads."""
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture(params=["nccl", "staged"])
def layout(request: pytest.FixtureRequest) -> str:
    """Whether every rank has a GPU of its own, or all have one."""
    return str(request.param)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the test's own; what is made of data in it stays there."""
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path
