"""Loss scaling: the rule (check 7 of the course), and that all ranks skip together in every layout."""

import functools
import math
from typing import Any

import numpy as np
import pytest

from dtrain import config
from dtrain.checkpoint import Reader
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.loss_scale import DynamicLossScale, make_loss_scale
from tests import training

SECTIONS: dict[str, Any] = {
    "model": {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 16},
    "train": {
        "steps": 7,
        "global_batch": 12,
        "micro_batch": 2,
        "dtype": "float16",
        "loss_scale": "dynamic",
        "validate": {"every": 0},
    },
}
START = 2.0**18  # nearer to where it ends than 2^24: fewer skipped steps to wait for


def test_the_rule():
    scale = DynamicLossScale()
    assert scale.value == 2**24
    for i, squares in enumerate((math.inf, math.nan, math.inf)):
        assert not scale.judge(squares)
        assert (scale.value, scale.skipped) == (2.0 ** (23 - i), i + 1)
    assert all(scale.judge(1.0) for _ in range(1999))
    assert scale.value == 2**21
    assert scale.judge(1.0) and scale.value == 2**22
    assert all(scale.judge(1.0) for _ in range(2000)) and scale.value == 2**23  # and again
    assert all(scale.judge(0.0) for _ in range(1999))
    assert not scale.judge(math.inf)  # 1999 good ones are not 2000
    assert all(scale.judge(0.0) for _ in range(1999)) and scale.value == 2**22
    with pytest.raises(UserError, match=r"train.loss_scale: dynamic: the gradients are inf or nan even at"):
        for _ in range(40):
            scale.judge(math.nan)


def test_static_scales():
    assert [make_loss_scale(None, dtype).value for dtype in ("float16", "bfloat16", "float64")] == [1024, 1, 1]
    assert make_loss_scale(64, "float16").value == 64 and not make_loss_scale(64, "float16").dynamic


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"loss_scale": "dynamic", "dtype": "bfloat16"}},
            r"train.loss_scale: dynamic; of use with .*float16",
        ),
        ({"train": {"loss_scale": 0.0}}, r"train.loss_scale: 0.0; must be above 0"),
        (
            {**SECTIONS, "parallel": {"compression": {"kind": "top_k"}}},
            r"parallel.compression.kind: top_k; keeps what it did not send",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(sections, message):
    with pytest.raises(Exception, match=message):
        training.config(**sections)
    assert config.TrainConfig(steps=1, global_batch=1, micro_batch=1).loss_scale is None


def train(comm, sections):
    """The records; and for every step whether any parameter or state of this rank changed."""
    trainer = training.trainer(comm, **sections)
    trainer.scaler.value = START
    records, changed = [], []
    held = lambda: [b.array.copy() for blocks in trainer._blocks().values() for b in blocks]  # noqa: E731
    before = held()
    for record in trainer.run():
        after = held()
        changed.append(not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)))
        records.append(record)
        before = after
    return records, changed, trainer.optimizer.steps


@functools.cache
def without(taken):
    """The losses of one process in float64 that leaves out the batches of the skipped steps."""
    wide = {**SECTIONS["train"], "dtype": "float64", "loss_scale": None}
    trainer = training.trainer(single(), model=SECTIONS["model"], train=wide)
    losses = []
    for step in range(len(taken)):
        trainer.step, trainer.consumed = step, 12 * step
        if taken[step]:
            losses.append(trainer.train_step().loss)
    return losses


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (3, {"data_parallel": "ddp"}),
        (2, {"data_parallel": "zero1", "replicate": True}),
        (2, {"data_parallel": "zero2"}),
        (2, {"data_parallel": "zero3", "replicate": True}),
        (2, {"tp": 2}),
        (2, {"tp": 2, "sequence": True}),
        (2, {"pp": 2}),
        (8, {"pp": 2, "tp": 2, "data_parallel": "zero3", "replicate": True}),
    ],
    ids=str,
)
def test_every_layout_skips_together(ranks, parallel):
    results = run_threads(ranks, train, {**SECTIONS, "parallel": parallel})
    records, changed, updates = results[0]
    taken = [math.isfinite(record.grad_norm) for record in records]
    skipped = [taken[: i + 1].count(False) for i in range(len(taken))]
    assert not taken[0] and taken[-1] and taken.count(True) >= 3
    assert [r.skipped_steps for r in records] == skipped
    assert [r.loss_scale for r in records] == [START / 2**before for before in [0, *skipped[:-1]]]
    assert changed == taken and updates == taken.count(True)
    for others, changes, _ in results[1:]:
        assert changes == changed
        assert [(r.loss, r.loss_scale) for r in others] == [(r.loss, r.loss_scale) for r in records]
    losses = [record.loss for record, good in zip(records, taken, strict=True) if good]
    np.testing.assert_allclose(losses, without(tuple(taken)), rtol=3e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_rank_is_enough(bad):
    def poisoned(comm):
        trainer = training.trainer(comm, **SECTIONS, parallel={"data_parallel": "naive"})
        trainer.scaler.value = 1024.0
        execute = trainer.execute

        def with_an_overflow(microbatches):
            result = execute(microbatches)
            if comm.rank == 1 and trainer.step == 1:
                trainer.flat.groups[0].grad[5] = bad
            return result

        trainer.execute = with_an_overflow
        return [(record.loss_scale, record.skipped_steps) for record in trainer.run()]

    for seen in run_threads(3, poisoned):
        assert seen == [(1024, 0), (1024, 1), *[(512, 1)] * 5]


def test_a_checkpoint_has_the_scale(tmp_path):
    trainer = training.trainer(single(), **SECTIONS)
    trainer.scaler.value = START
    records = [trainer.train_step() for _ in range(5)]
    assert trainer.scaler.skipped == records[-1].skipped_steps > 0
    folder = trainer.save(tmp_path)
    assert Reader(folder).state["loss_scale"] == {
        "value": trainer.scaler.value,
        "good": trainer.scaler.good,
        "skipped": records[-1].skipped_steps,
    }
    again = training.trainer(single(), **SECTIONS)
    again.load(folder)
    assert again.scaler == trainer.scaler
    assert [r.loss for r in again.run()] == [r.loss for r in trainer.run()]


@pytest.mark.parametrize("data_parallel", ["ddp", "zero2"])
def test_gradients_that_overflow_a_static_scale_are_refused_before_the_update(data_parallel):
    """The loss is finite. All ranks refuse together, with the same words, and no parameter has moved."""

    def train(comm: Any) -> str:
        sections: dict[str, Any] = {
            **SECTIONS,
            "train": {**SECTIONS["train"], "loss_scale": 1e12},
            "parallel": {"data_parallel": data_parallel},
        }
        trainer = training.trainer(comm, **sections)
        before = training.parameters(trainer)
        told = r"gradients of step 1 are inf or nan \(\w+.*train.loss_scale: 1e\+12"
        with np.errstate(over="ignore", invalid="ignore"), pytest.raises(UserError, match=told) as caught:
            trainer.train_step()
        for name, parameter in training.parameters(trainer).items():
            np.testing.assert_array_equal(parameter, before[name], err_msg=name)
        return str(caught.value)

    first, second = run_threads(2, train)
    assert first == second  # one mistake of all, told once
