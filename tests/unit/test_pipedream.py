"""PipeDream on in-process ranks = a hand-written simulation of the same delayed updates, in float64.

Check 47 of the course: forward and backward of a microbatch use one version of the weights; without stashing this is
detected.
"""

import pytest

from dtrain.autograd import GraphError
from dtrain.collectives import run_threads
from dtrain.errors import UserError
from dtrain.strategies.pipeline.pipedream import AsynchronousEngine
from tests import training
from tests.pipedream_cases import BASE, CASES, check, train


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_delayed_updates_are_those_of_the_simulation(case, stages):
    check(case, run_threads(stages, train, CASES[case][0]))


def test_without_stashing_the_mismatch_is_detected(monkeypatch):
    """The tape knows that the weights changed between a forward and its backward."""
    monkeypatch.setattr(AsynchronousEngine, "stashing", False)
    with pytest.raises(GraphError, match="was changed in place after the forward"):
        run_threads(2, train, {"schedule": "pipedream"})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {**BASE["optimizer"], "clip_norm": 1.0}}, r"optimizer.clip_norm: 1.0; pipedream updates each"),
        ({"model": {**BASE["model"], "tied": True}}, r"embedding.weight is used by two stages.*set model.tied: false"),
        ({"parallel": {"pp": 2, "dp": 2}}, r"does not go with parallel.dp: 2, since"),
        ({"pipeline": {"schedule": "pipedream_3"}}, r"pipedream_3; allowed: pipedream, pipedream_2bw"),
    ],
)
def test_what_needs_all_stages_is_refused(sections, message):
    merged = {**BASE, "parallel": {"pp": 2}, "pipeline": {"schedule": "pipedream"}, **sections}
    ranks = 4 if "parallel" in sections else 2
    with pytest.raises(UserError, match=message):
        run_threads(ranks, lambda comm: training.trainer(comm, **merged))
