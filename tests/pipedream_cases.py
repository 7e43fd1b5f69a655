"""PipeDream beside its oracle: every delayed update done by hand in one process; for threads and for processes."""

import numpy as np

from dtrain.collectives import single
from tests import training

STEPS, RATE, MOMENTUM, BATCH = 2, 0.05, 0.9, 24
BASE = {
    "model": {"kind": "gpt", "layers": 4, "dim": 16, "heads": 2, "sequence": 8, "tied": False},
    "optimizer": {"kind": "sgd", "learning_rate": RATE, "momentum": MOMENTUM},
    "schedule": {"kind": "constant"},
    "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 3, "validate": {"every": 0}},
}


def base(stages):
    """A block or more for every stage, and more microbatches than stages."""
    train = {**BASE["train"], "micro_batch": BATCH // microbatches(stages)}
    return {**BASE, "model": {**BASE["model"], "layers": max(4, stages)}, "train": train}


def microbatches(stages):
    """Of a step."""
    return 8 if stages <= 4 else 24


def train(comm, pipeline):
    """(losses, parameters of this stage, microbatches by how stale, versions kept) of a pipeline of all ranks."""
    trainer = training.trainer(comm, **base(comm.size), parallel={"pp": comm.size}, pipeline=pipeline)
    losses = [record.loss for record in trainer.run()]
    engine = trainer.strategies[0].engine
    values = {p.name: p.data.copy() for p in trainer.model.named_parameters().values()}
    return losses, values, dict(engine.staleness), engine.most_kept


def simulated(stage_of, stages, every, delay):
    """(losses, parameters): every update by hand. delay(k, s): the version that stage s computes microbatch k with."""
    trainer = training.trainer(single(), **base(stages))
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
            if (k + 1) % every == 0 or k == microbatches(stages) - 1:
                for name in now:
                    velocity[name] = MOMENTUM * velocity[name] + sums[name] / targets
                    now[name] = now[name] - RATE * velocity[name]
                versions.append({name: value.copy() for name, value in now.items()})
                sums, targets = {name: 0.0 for name in now}, 0
        losses.append(total / count)
        trainer.step, trainer.consumed = trainer.step + 1, trainer.consumed + BATCH
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


def check(case, results):
    """results: of `train` on every stage. They are those of the updates done by hand, and not those of no delays."""
    stages, (_, every, delay) = len(results), CASES[case]
    stage_of = {name: rank for rank, (_, values, *_) in enumerate(results) for name in values}
    losses, expected = simulated(stage_of, stages, every(stages), delay(stages))
    for rank, (mine, values, staleness, kept) in enumerate(results):
        np.testing.assert_allclose(mine, losses, rtol=1e-10)
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-11, err_msg=name)
        assert sum(staleness.values()) == microbatches(stages)
        if case == "pipedream":
            assert max(staleness) == stages - 1 - rank and kept == stages - rank
        elif case == "vertical":
            assert kept <= stages
        else:
            assert kept <= 2
    one = training.trainer(single(), **base(stages))
    assert abs([r.loss for r in one.run()][-1] - losses[-1]) > 1e-6, "delays are seen"
