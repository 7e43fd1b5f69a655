"""PipeDream on in-process ranks = a hand-written simulation of the same delayed updates, in float64.

Check 47 of the course: forward and backward of a microbatch use one version of the weights; without stashing this is
detected.
"""

import numpy as np
import pytest

from dtrain.autograd import GraphError
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.strategies.pipeline.pipedream import AsynchronousEngine
from tests import training

STEPS, RATE, MOMENTUM = 2, 0.05, 0.9
BASE = {
    "model": {"kind": "gpt", "layers": 4, "dim": 16, "heads": 2, "sequence": 8, "tied": False},
    "optimizer": {"kind": "sgd", "learning_rate": RATE, "momentum": MOMENTUM},
    "schedule": {"kind": "constant"},
    "train": {"steps": STEPS, "global_batch": 24, "micro_batch": 3, "validate": {"every": 0}},
}


def train(comm, pipeline):
    trainer = training.trainer(comm, **BASE, parallel={"pp": comm.size}, pipeline=pipeline)
    losses = [record.loss for record in trainer.run()]
    engine = trainer.strategies[0].engine
    values = {p.name: p.data.copy() for p in trainer.model.named_parameters().values()}
    return losses, values, dict(engine.staleness), engine.most_kept


def simulated(stage_of, stages, every, delay):
    """(losses, parameters): every update by hand. delay(k, s): the version that stage s computes microbatch k with."""
    trainer = training.trainer(single(), **BASE)
    model = trainer.model
    parameters = {p.name: p for p in model.named_parameters().values()}
    now = {name: p.data.copy() for name, p in parameters.items()}
    velocity = {name: np.zeros_like(value) for name, value in now.items()}
    losses = []
    for _ in range(STEPS):
        versions = [{name: value.copy() for name, value in now.items()}]
        sums, targets, total, count = {name: 0.0 for name in now}, 0, 0.0, 0
        for k, (batch, context) in enumerate(trainer.microbatches()):
            for name, parameter in parameters.items():
                parameter.data[...] = versions[delay(k, stage_of[name])][name]
                parameter.grad = None
            loss = model.loss(batch, context)
            loss.backward()
            total, count = total + loss.item(), count + model.count(batch)
            targets += model.count(batch)
            sums = {name: sums[name] + parameters[name].grad for name in now}
            if (k + 1) % every == 0 or k == 7:
                for name in now:
                    velocity[name] = MOMENTUM * velocity[name] + sums[name] / targets
                    now[name] = now[name] - RATE * velocity[name]
                versions.append({name: value.copy() for name, value in now.items()})
                sums, targets = {name: 0.0 for name in now}, 0
        losses.append(total / count)
        trainer.step, trainer.consumed = trainer.step + 1, trainer.consumed + 24
    return losses, now


CASES = {
    "pipedream": ({"schedule": "pipedream"}, lambda p: 1, lambda p: lambda k, s: max(0, k - (p - 1 - s))),
    "vertical": (
        {"schedule": "pipedream", "vertical_sync": True},
        lambda p: 1,
        lambda p: lambda k, s: max(0, k - (p - 1)),
    ),
    "2bw": ({"schedule": "pipedream_2bw"}, lambda p: p, lambda p: lambda k, s: max(0, k // p - 1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_delayed_updates_are_those_of_the_simulation(case, stages):
    pipeline, every, delay = CASES[case]
    results = run_threads(stages, train, pipeline)
    stage_of = {name: rank for rank, (_, values, _, _) in enumerate(results) for name in values}
    losses, expected = simulated(stage_of, stages, every(stages), delay(stages))
    for rank, (mine, values, staleness, kept) in enumerate(results):
        np.testing.assert_allclose(mine, losses, rtol=1e-10)
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-11, err_msg=name)
        assert sum(staleness.values()) == 8
        if case == "pipedream":
            assert max(staleness) == stages - 1 - rank and kept == stages - rank
        elif case == "vertical":
            assert kept <= stages
        else:
            assert kept <= 2
    one = training.trainer(single(), **BASE)
    assert abs([r.loss for r in one.run()][-1] - losses[-1]) > 1e-6  # delays are seen


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
        ({"parallel": {"pp": 2, "dp": 2}}, r"allowed without parallel.dp: 2 pipelines would drift apart"),
        ({"pipeline": {"schedule": "pipedream_3"}}, r"pipedream_3; allowed: pipedream, pipedream_2bw"),
    ],
)
def test_what_needs_all_stages_is_refused(sections, message):
    merged = {**BASE, "parallel": {"pp": 2}, "pipeline": {"schedule": "pipedream"}, **sections}
    ranks = 4 if "parallel" in sections else 2
    with pytest.raises(UserError, match=message):
        run_threads(ranks, lambda comm: training.trainer(comm, **merged))
