"""The battery on in-process ranks: combinations of strategies = one process, 1e-9, float64; see tests/battery.py.

Checks of the course: 24, 29 (all data-parallel strategies are one), 36 (slices), 46 (all schedules), 50 (three axes).
"""

import itertools
import os

import pytest

from dtrain.collectives import run_threads
from dtrain.errors import UserError
from tests import battery, training
from tests.battery import Case

ALL = battery.all_cases()
ASKED = os.environ.get("DTRAIN_BATTERY")
COVERING = battery.covering(ALL)
WIDE = battery.covering(battery.wide_cases())
CHOSEN = battery.piece(ALL + WIDE, ASKED) if ASKED else COVERING + WIDE[:8]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_this_layout_equals_one_process(case: Case) -> None:
    report = run_threads(case.ranks, battery.run, case)[0]
    assert report.right, f"{report.finding}: {max(report.rows, key=lambda row: row.excess)}"


def test_all_combinations_are_there() -> None:
    """Counted by hand: meshes of 2 to 8 ranks, times what each axis leaves to choose."""
    single = 7 * (8 + 6 + 3)  # one axis: dp by strategies, pp by schedules, tp in three ways
    pairs = 5 * (8 * 6 + 8 * 3 + 6 * 3)  # (2,2) (2,3) (3,2) (2,4) (4,2)
    assert len(ALL) == len(set(ALL)) == (single + pairs + 8 * 6 * 3) * 2 * 3


def test_all_meshes_with_context_and_expert_parallelism_are_there() -> None:
    """Of 2³ ranks on five axes there are 35, of which 10 have neither."""
    cases = battery.wide_cases()
    meshes = {tuple(getattr(case, axis) for axis in ("dp", "tp", "pp", "cp", "ep")) for case in cases}
    assert len(meshes) == 35 - 10 and len(cases) == len(set(cases))
    met = {pair for case in WIDE for pair in itertools.combinations(case.options, 2)}
    assert met == {pair for case in cases for pair in itertools.combinations(case.options, 2)}
    short = WIDE[:8]
    assert {case.cp for case in short} >= {1, 2} and {case.ep for case in short} >= {1, 2}
    assert {case.model for case in short} == set(battery.MODELS), short


def test_the_covering_part_covers() -> None:
    met = {pair for case in COVERING for pair in itertools.combinations(case.options, 2)}
    assert met == {pair for case in ALL for pair in itertools.combinations(case.options, 2)}
    assert len(COVERING) < 80 and COVERING == battery.covering(ALL)
    assert {battery.sections(case)["pipeline"]["schedule"] for case in COVERING} >= {"gpipe", "1f1b", "zb_v"}
    parts = [case for number in range(1, 13) for case in battery.piece(ALL, f"{number}/12")]
    assert sorted(map(str, parts)) == sorted(map(str, ALL))


def test_fewer_microbatches_than_stages_are_among_them() -> None:
    assert any(case.pp > 2 and case.schedule in battery.SHORT for case in COVERING)


@pytest.mark.parametrize(
    ("parallel", "sections", "message"),
    [
        ({"pp": 4}, {"model": {"layers": 3}}, "parallel.pp: 4 stages need as many blocks; the model has 3"),
        ({"pp": 2, "dp": 2}, {"pipeline": {"schedule": "interleaved"}, "model": {"layers": 3}}, "4 stages need"),
        ({"dp": 3}, {}, "parallel.dp: 3; does not fit 4 ranks"),
        ({"dp": 4}, {"train": {"micro_batch": 5}}, "train.global_batch: 24; must be a multiple of"),
        ({"tp": 2, "dp": 2, "sequence": True}, {"model": {"kind": "mlp"}}, "parallel.sequence: MLP has no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(parallel, sections, message) -> None:
    case = Case(1, 1, 4, None, "1f1b", None, False, "gpt")
    merged = battery.sections(case) | {"parallel": parallel}
    for name, values in sections.items():
        merged[name] = {**merged[name], **values}
    if merged["model"]["kind"] == "mlp":
        merged |= {"model": {"kind": "mlp"}, "data": {"kind": "images", "path": "digits"}}
    with pytest.raises((UserError, ValueError), match=message):
        run_threads(4, lambda comm: training.trainer(comm, **merged))
