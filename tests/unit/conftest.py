"""Fixtures that several files use; and generated examples are the same in every run."""

import os

import pytest
from hypothesis import settings

settings.register_profile("dtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("dtrain")


@pytest.fixture
def fast_disk(monkeypatch):
    """Forcing each of hundreds of small files to the disk tests the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
