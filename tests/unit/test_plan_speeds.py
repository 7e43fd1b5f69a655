"""What a core does in a second: measured in a process of its own; where that fails, what happened and what helps."""

import dataclasses
import sys

import pytest

from dtrain.errors import UserError
from dtrain.launch.plan import machine, speeds
from dtrain.launch.plan.machine import Machine
from tests import training


def test_speeds_are_measured_in_a_process_of_its_own():
    found = speeds.measured("float32")
    assert found is speeds.measured("float32")
    assert all(value >= 0 for value in dataclasses.astuple(found)) and 0 < found.together <= 1
    assert found.flops > found.bandwidth > 1e6


WAYS = {  # what the process does, and what is said of it
    "late": ("exec sleep 20", r"more than 0.2 s\."),
    "fault": ("echo no room >&2; exit 3", r"exit code 3, no room\."),
    "no program": ("", "Permission denied"),
}


@pytest.fixture(params=WAYS)
def failing(request, monkeypatch, tmp_path):
    """What is said of a measurement that fails in one of three ways."""
    speeds.measured.cache_clear()
    does, said = WAYS[request.param]
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}")
    program.chmod(0o644 if request.param == "no program" else 0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(speeds, "LIMIT", 0.2 if request.param == "late" else 60.0)
    yield said
    speeds.measured.cache_clear()


def test_a_measurement_that_fails_says_what_to_give_instead(failing):
    with pytest.raises(UserError, match=rf"what a core .* failed: .*{failing}.* --gflops 30; .*parallel: auto, .*dp=4"):
        speeds.measured("float64")


def test_with_the_speed_that_was_given_it_is_not_missed(failing):
    given = training.config(), 4, None, None, None
    found = machine(*given, 60e9, None)
    assert found.flops == pytest.approx(60e9) and found.bandwidth == pytest.approx(2 * Machine().bandwidth)
    with pytest.raises(UserError, match="--gflops"):
        machine(*given, None, None)
