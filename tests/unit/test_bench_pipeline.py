"""The benchmark of bubbles: what it runs, counts and draws. How large bubbles are in seconds is for the benchmark."""

import pytest

from dtrain.errors import UserError
from dtrain.launch.bench_pipeline import bench_pipeline, run
from dtrain.strategies.pipeline.schedules import SCHEDULES


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formula_timeline_and_kept_bytes_agree(schedule):
    """Bytes that the tape keeps are counted, and are those in flight by the schedule."""
    result = run(schedule, 4, 8, 1e-4)
    if result.formula is not None:
        assert result.planned == pytest.approx(result.formula, rel=1e-9)
    assert sorted(span.action for span in result.spans) == sorted(span.action for span in result.plan)
    assert 0 < result.measured < 1
    assert result.kept == result.expected_kept


def test_1f1b_keeps_less_than_gpipe():
    gpipe, one = run("gpipe", 4, 8, 1e-4), run("1f1b", 4, 8, 1e-4)
    assert gpipe.kept == [8] * 4 and one.kept == [4, 3, 2, 1]


def test_the_table_and_the_picture(tmp_path, capsys):
    bench_pipeline(("1f1b", "zb_h1"), 2, 4, 1e-3, tmp_path / "bubbles.svg")
    out = capsys.readouterr().out
    assert "1f1b             20.0%    20.0%" in out and "zb_h1" in out
    assert (tmp_path / "bubbles.svg").read_text().count("measured: bubble") == 2
    with pytest.raises(UserError, match="--schedule 2f2b: allowed: naive, gpipe"):
        bench_pipeline(("2f2b",), 2, 4, 1e-3, None)
