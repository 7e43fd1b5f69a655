"""Fixtures that several files use."""

import os

import pytest


@pytest.fixture
def fast_disk(monkeypatch):
    """Forcing each of hundreds of small files to the disk tests the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
