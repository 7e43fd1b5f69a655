"""The book of the parameter servers: what is handed out, applied, given to others."""

from typing import Any

import pytest

from dtrain.config import ParameterServerConfig
from dtrain.strategies.parameter_server import Ledger, WorkersLost


def book(mode: str, workers: int = 2, steps: int = 4, fence: int = 4, **options: Any) -> Ledger:
    config = ParameterServerConfig(servers=1, mode=mode, **options)  # type: ignore[arg-type]
    return Ledger(config, workers, steps, lambda step: min(steps, (step // fence + 1) * fence))


def test_nothing_beyond_a_fence_is_handed_out_before_all_before_it_is_applied():
    ledger = book("async", fence=1)
    assert ledger.assign(0) == ledger.workers[0].holds and ledger.workers[0].holds.part == 0
    ledger.pushed(0, 0)
    assert ledger.assign(0).part == 1 and ledger.assign(1) is None  # type: ignore[union-attr]
    ledger.pushed(0, 1)
    assert ledger.at_fence and ledger.assign(1) is None
    ledger.go_on()
    assert ledger.assign(1).step == 1  # type: ignore[union-attr]


def test_the_work_of_the_dead_is_done_by_others():
    ledger = book("async")
    ledger.assign(0), ledger.assign(1)
    ledger.lose(0, "gone")
    ledger.pushed(1, 0)
    assert ledger.assign(1).part == 0 and ledger.assign(1).part == 0  # type: ignore[union-attr]
    with pytest.raises(WorkersLost, match="0 are left"):
        ledger.lose(1, "gone too")


def test_nobody_is_further_ahead_of_the_slowest_than_is_allowed():
    ledger = book("ssp", steps=9, fence=9, staleness=1)
    assert ledger.assign(1) is not None
    for version in range(2):  # the second while one ahead
        assert ledger.assign(0) is not None
        ledger.pushed(0, version)
    assert ledger.assign(0) is None  # it would be two ahead
    ledger.pushed(1, 0)
    assert ledger.assign(0) is not None


def test_nobody_waits_for_the_dead():
    ledger = book("ssp", workers=3, steps=9, fence=9, staleness=1)
    for version in range(2):
        ledger.assign(0), ledger.assign(1)
        ledger.pushed(0, version), ledger.pushed(1, version)
    assert ledger.assign(0) is None
    ledger.lose(2, "gone")
    assert ledger.assign(0) is not None


def test_parts_of_a_validation_are_not_lost_with_a_worker():
    ledger = book("sync", quorum=0.5)
    ledger.validate()
    assert ledger.assign(0).part == 0 and ledger.assign(1).part == 1  # type: ignore[union-attr]
    ledger.lose(1, "gone")
    assert ledger.evaluated(0) and not ledger.validated
    assert ledger.assign(0).part == 1 and ledger.evaluated(0) and ledger.validated  # type: ignore[union-attr]
