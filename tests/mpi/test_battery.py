"""The battery over processes: combinations of strategies on all ranks = one process; see tests/battery.py."""

import os

import pytest

from dtrain.collectives import Communicator
from dtrain.launch.environment import job
from tests import battery
from tests.battery import Case

ASKED = os.environ.get("DTRAIN_BATTERY")
CASES = battery.all_cases([job().size])
CHOSEN = battery.piece(CASES, ASKED) if ASKED else battery.covering(CASES, limit=6)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_this_layout_equals_one_process(comm: Communicator, case: Case) -> None:
    report = battery.run(comm, case)
    assert report.right, f"{report.finding}: {max(report.rows, key=lambda row: row.excess)}"
