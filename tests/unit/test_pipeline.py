"""Pipeline parallelism on in-process ranks: this layout = one process, for every schedule; what lies where; messages.

Checks of the course: 45 (interleaving sends v times as much), 46 (all schedules give the gradient of the whole batch),
50 (dp x pp = one process).
"""

import functools
import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtrain import models
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.strategies.pipeline import PipelineParallel
from dtrain.strategies.pipeline.schedules import SCHEDULES, programs
from dtrain.strategies.pipeline.stages import Absent, costs
from dtrain.strategies.pipeline.user import to_csv
from tests import training

GPT = {"kind": "gpt", "layers": 4, "dim": 32, "heads": 4, "sequence": 16}
BASE: dict[str, Any] = {"model": GPT, "train": {"steps": 2, "micro_batch": 3}}
FOUR = {"steps": 2, "micro_batch": 6}  # microbatches, where eight would show the same


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    values = {p.name: p.data.copy() for p in trainer.model.named_parameters().values()}
    validation = [r.validation_loss for r in records if r.validation_loss is not None]
    counters = trainer.mesh["pp"].counters
    return training.losses(records), validation, values, counters.calls("send")


@functools.cache
def reference(sections):
    return train(single(), json.loads(sections))


def compare(ranks, **sections):
    """Train on threads and in one process; everything equal. Returns the number of sends of each rank."""
    sections = {**BASE, **sections}
    expected, validation, values, _ = reference(json.dumps({**sections, "parallel": {}, "pipeline": {}}))
    results = run_threads(ranks, train, sections)
    for losses, mine, held, _ in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        assert mine == pytest.approx(validation, rel=1e-11)
        for name, value in held.items():
            np.testing.assert_allclose(value, values[name], rtol=1e-9, atol=1e-10, err_msg=name)
    assert set().union(*(held for _, _, held, _ in results)) == set(values)
    return [sends for *_, sends in results]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "dp"), [(2, 1), (4, 1), (2, 2)])
def test_every_schedule_equals_one_process(schedule, pp, dp):
    layers = 2 * pp if SCHEDULES[schedule].chunks > 1 else 4
    compare(
        pp * dp,
        parallel={"pp": pp, "dp": dp, "bucket_mb": 0.01},
        pipeline={"schedule": schedule, "microbatches": 4},
        model={**GPT, "layers": layers},
        train={"steps": 2, "micro_batch": 3},
    )


@pytest.mark.parametrize(
    "model",
    [
        {**GPT, "dropout": 0.2},
        {**GPT, "kv_heads": 2, "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False},
        {**GPT, "kind": "bert"},
    ],
    ids=["dropout", "llama", "bert"],
)
@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_every_model_equals_one_process(model, schedule):
    compare(2, model=model, train=FOUR, parallel={"pp": 2}, pipeline={"schedule": schedule})


def test_layers_of_different_widths():
    """What goes from stage to stage is of another shape at each border."""
    compare(
        3,
        model={"kind": "mlp", "hidden": [48, 8, 64, 24]},
        data={"kind": "images", "path": "digits"},
        train={"steps": 3, "micro_batch": 5, "global_batch": 20},
        parallel={"pp": 3},
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
def test_fewer_microbatches_than_stages_and_recomputation(schedule):
    train = {"steps": 2, "micro_batch": 24, "recompute": True}
    compare(4, parallel={"pp": 4}, pipeline={"schedule": schedule, "microbatches": 2}, train=train)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "sgd"])
def test_other_optimizers(name):
    optimizer = {"kind": name, "learning_rate": 3e-3, "clip_norm": 0.5}
    compare(2, optimizer=optimizer, train=FOUR, parallel={"pp": 2}, pipeline={"schedule": "1f1b"})


def test_cut_by_hand_also_without_blocks(tmp_path):
    compare(4, parallel={"pp": 4}, pipeline={"schedule": "1f1b", "cut": [0, 3, 1, 0]})
    file = tmp_path / "mine.csv"
    file.write_text(to_csv(programs("zb_h1", 2, 8)))
    compare(2, parallel={"pp": 2}, pipeline={"schedule": str(file)})
    linear = {"kind": "mlp", "hidden": []}
    data, train = {"kind": "images", "path": "digits"}, {"steps": 2, "micro_batch": 5, "global_batch": 20}
    compare(2, model=linear, data=data, train=train, parallel={"pp": 2}, pipeline={"cut": [0, 0]})


def test_interleaving_sends_v_times_as_much():
    model = {**GPT, "layers": 8}
    sections = {
        "model": model,
        "train": {"steps": 1, "micro_batch": 3, "validate": {"every": 0}},
        "parallel": {"pp": 2},
    }
    headers = [1, 0]  # the shape of the activations, once
    assert compare(2, **sections, pipeline={"schedule": "1f1b"}) == [8 + headers[0], 8]
    assert sum(compare(2, **sections, pipeline={"schedule": "interleaved", "chunks": 4})) == 2 * 8 * 7 + 7
    assert sum(compare(2, **sections, pipeline={"schedule": "interleaved", "chunks": 2})) == 2 * 8 * 3 + 3


def test_a_rank_holds_its_stages_only():
    def look(comm):
        trainer = training.trainer(comm, **BASE, parallel={"pp": 4})
        names = {p.name for p in trainer.model.named_parameters().values()}
        absent = [type(block) is Absent for block in trainer.model.blocks]
        return names, absent, sum(group.size for group in trainer.flat.groups)

    whole = single()
    complete = sum(group.size for group in training.trainer(whole, **BASE).flat.groups)
    results = run_threads(4, look)
    for rank, (names, absent, size) in enumerate(results):
        assert absent == [block != rank for block in range(4)]
        assert any(name.startswith(f"blocks.{rank}.") for name in names) and size < complete
        assert ("embedding.weight" in names) == (rank in (0, 3))  # tied: the first and the last
        assert ("positions.weight" in names) == (rank == 0) and ("norm.weight" in names) == (rank == 3)


def test_the_measured_timeline_has_every_action_in_order():
    def measure(comm):
        trainer = training.trainer(comm, **BASE, parallel={"pp": 2})
        trainer.train_step()
        (strategy,) = [s for s in trainer.strategies if isinstance(s, PipelineParallel)]
        return strategy.measured(), strategy.plan

    spans, plan = run_threads(2, measure)[0]
    assert sorted(span.action for span in spans) == sorted(span.action for span in plan.spans)
    for rank, program in enumerate(plan.programs):
        mine = [span for span in spans if span.rank == rank]
        assert [span.action for span in mine] == program
        assert all(a.stop <= b.start for a, b in itertools.pairwise(mine))
    starts = {span.action: span.start for span in spans}
    for span in spans:
        if span.action.kind == "F" and span.action.stage == 0:
            assert span.stop <= starts[span.action._replace(stage=1)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"pipeline": {"schedule": "2f2b"}}, r"pipeline: schedule 2f2b: allowed: naive, gpipe"),
        ({"pipeline": {"cut": [1, 2]}}, r"pipeline.cut: \[1, 2\]; allowed: 2 numbers from 0 with the sum 4"),
        ({"pipeline": {"schedule": "interleaved", "microbatches": 3}}, r"multiples of the ranks, such as 2 or 4"),
        (
            {"pipeline": {"microbatches": 7}},
            r"multiple of parallel.dp x pipeline.microbatches = 1 x 7 = 7, nearest: 21 or",
        ),
        ({"model": {**GPT, "layers": 1}}, r"parallel.pp: 2 stages need as many blocks; the model has 1"),
    ],
)
def test_what_does_not_fit_is_refused(sections, message):
    sections = {**BASE, **sections, "parallel": {"pp": 2}}
    with pytest.raises(UserError, match=message):
        run_threads(2, lambda comm: training.trainer(comm, **sections))


def test_blocks_cost_what_a_token_is_multiplied_with():
    """By hand: 12 d² of the matrices and 2 T d of attention; a head of V rows at the end, no embedding."""
    d, tokens, rows = 32, 16, 300
    sizes = SimpleNamespace(vocabulary=rows, features=0, tables=())
    model = models.outline(training.config(model=GPT).model, sizes)
    block = 12 * d * d + 2 * tokens * d
    assert costs(model) == [block] * 3 + [block + rows * d]
    mixture = {**GPT, "kind": "moe_gpt", "moe": {"experts": 8, "every": 2, "top": 2}}
    model = models.outline(training.config(model=mixture).model, sizes)
    own = 2 * 2 * d * 2 * d  # two experts of width 2 d, up and down
    moe = 4 * d * d + own + 8 * d + 2 * tokens * d  # and the router
    assert costs(model) == [block, moe, block, moe + rows * d]


def test_the_balance_of_the_stages_is_told():
    def notes(comm):
        trainer = training.trainer(comm, **BASE, parallel={"pp": 2}, pipeline={"cut": [1, 3]})
        return next(s for s in trainer.strategies if isinstance(s, PipelineParallel)).notes()

    _, first, second, balance = run_threads(2, notes)[0]
    block, head = 12 * 32 * 32 + 2 * 16 * 32, 256 * 32
    share = block / (4 * block + head)
    assert f"{share:.1%} of the products" in first and f"{1 - share:.1%} of the products" in second
    assert f"the fullest rank has {2 * (1 - share):.2f} times an even share" in balance
