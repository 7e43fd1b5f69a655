"""LoRA on in-process ranks: any layout = one process; only adapters are trained, sent and saved; merged = unmerged.

Check 61 of the course: the first output is the base's; the base has no gradients; merged = unmerged; 2dr numbers of d²
are trained; with A = B = 0 nothing is ever learned.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import checkpoint, models
from dtrain.collectives import run_threads, single
from dtrain.config import LoRAConfig
from dtrain.errors import UserError
from dtrain.launch.checkpoints import export
from dtrain.launch.sample import assembled
from dtrain.safetensors_file import Mapped
from dtrain.strategies.lora import merged
from tests import training

GPT: dict[str, Any] = {"kind": "gpt", "layers": 2, "dim": 24, "heads": 4, "sequence": 8}
TRAIN = {"steps": 2, "global_batch": 16, "micro_batch": 2, "validate": {"every": 2, "batches": 1}}
LORA = {"rank": 3, "alpha": 6, "targets": ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]}
OTHER = {"seed": 9}  # another order of the data than the base's


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    trainer = training.trainer(single(), model=GPT, train=TRAIN)
    list(trainer.run())
    return str(trainer.save(tmp_path_factory.mktemp("base")))


def sections(base: str, **changed: Any) -> dict[str, Any]:
    lora = {"from": base, **LORA, **changed.pop("lora", {})}
    return {"model": GPT, "train": TRAIN, "lora": lora, **OTHER, **changed}


def train(comm, given):
    trainer = training.trainer(comm, **given)
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for b in trainer._blocks()["parameter"]]
    return training.losses(records), records[-1].validation_loss, held


@functools.cache
def reference(given):
    losses, validation, held = train(single(), json.loads(given))
    return losses, validation, {name: array for name, array, _ in held}


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 2},
        {"tp": 3, "sequence": True},
        {"dp": 4, "data_parallel": "naive"},
        {"dp": 4, "data_parallel": "zero1"},
        {"dp": 2, "data_parallel": "zero3", "replicate": True},
        {"pp": 2, "tp": 2, "dp": 2},
        {"cp": 2},
    ],
    ids=lambda parallel: "-".join(f"{key}{value}" for key, value in parallel.items()),
)
def test_every_layout_equals_one_process(base, parallel):
    given = sections(base)
    losses, validation, values = reference(json.dumps(given))
    ranks = int(np.prod([parallel.get(axis, 1) for axis in ("dp", "tp", "pp", "cp")]))
    seen = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for found, found_validation, held in run_threads(ranks, train, {**given, "parallel": parallel}):
        np.testing.assert_allclose(found, losses, rtol=1e-11)
        assert found_validation == pytest.approx(validation, rel=1e-12)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-12, err_msg=name)
            seen[name][part] = True
    assert all(each.all() for each in seen.values())


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_stage_without_adapters_has_nothing_to_train(base, schedule):
    given = sections(base, lora={"targets": ["blocks.1.mlp.up"]})
    expected = reference(json.dumps(given))[0]
    results = run_threads(2, train, {**given, "parallel": {"pp": 2}, "pipeline": {"schedule": schedule}})
    for losses, _, _ in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
    assert sorted(len(held) for _, _, held in results) == [0, 2]


def test_it_begins_as_the_base_and_trains_2dr_numbers(base):
    trainer = training.trainer(single(), **sections(base))
    plain = models.build(trainer.config.model, trainer.data, dtype="float64")
    reader = checkpoint.Reader(base)
    for name, parameter in plain.named_parameters().items():
        parameter.data = reader.tensor(name)
    batch, _ = next(trainer.microbatches())
    np.testing.assert_array_equal(trainer.model(batch["inputs"]).data, plain(batch["inputs"]).data)
    d = 24
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]  # of each block
    expected = 2 * sum(3 * (rows + columns) for rows, columns in shapes)
    assert sum(p.size for p in trainer.flat.parameters.values()) == expected
    assert all(name.endswith((".lora_a", ".lora_b")) for name in trainer.flat.parameters)
    square = training.trainer(single(), **sections(base, lora={"targets": ["attention.out"]}))
    assert sum(p.size for p in square.flat.parameters.values()) == 2 * (2 * d * 3)  # 2dr of d², in 2 blocks


def test_the_base_has_no_gradients_and_does_not_change(base):
    def work(comm):
        trainer = training.trainer(comm, **sections(base, parallel={"dp": 2}))
        frozen = {n: p for n, p in trainer.model.named_parameters().items() if "lora" not in n}
        before = {name: parameter.data.copy() for name, parameter in frozen.items()}
        counters = trainer.mesh["dp"].counters
        sent = counters.calls("all_reduce")
        trainer.train_step()
        for name, parameter in frozen.items():
            assert parameter.grad is None and parameter.buffer is None
            np.testing.assert_array_equal(parameter.data, before[name])
        elements = sum(group.size for group in trainer.flat.groups)
        return counters.calls("all_reduce") - sent, elements, sum(p.size for p in frozen.values())

    for calls, elements, frozen in run_threads(2, work):
        assert calls == 2  # one bucket of adapters, and the sums of the loss
        assert elements < frozen / 2


def test_with_both_matrices_zero_nothing_is_learned(base):
    trainer = training.trainer(single(), **sections(base))
    for name, parameter in trainer.flat.parameters.items():
        if name.endswith("lora_a"):
            parameter.data[...] = 0
    list(trainer.run())
    assert all(not parameter.data.any() for parameter in trainer.flat.parameters.values())


def test_merged_equals_unmerged(base, tmp_path):
    """A checkpoint of two ranks, exported, is a plain model with the outputs of the adapted one."""

    def work(comm):
        trainer = training.trainer(comm, **sections(base, parallel={"tp": 2}))
        list(trainer.run())
        batch, _ = next(trainer.microbatches())
        whole = assembled(trainer)
        return batch["inputs"], trainer.model(batch["inputs"]).data, trainer.save(tmp_path), trainer.data, whole

    (inputs, expected, folder, data, whole), _ = run_threads(2, work)
    assert len(checkpoint.Reader(folder).names("parameter")) == 2 * 2 * 4  # adapters only
    export(folder, tmp_path / "out")
    exported = Mapped(tmp_path / "out" / "model.safetensors")
    plain = models.build(training.config(model=GPT).model, data, dtype="float64")
    for name, parameter in plain.named_parameters().items():
        parameter.data = exported.array(name)
    np.testing.assert_allclose(plain(inputs).data, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole(inputs).data, expected, rtol=1e-10, atol=1e-12)
    changed = [n for n in exported.entries if not np.array_equal(exported.array(n), checkpoint.Reader(base).tensor(n))]
    assert len(changed) == 2 * 4, "the layers with adapters, and no other"


def test_a_run_goes_on_in_another_layout(base, tmp_path):
    given = sections(base)
    expected = reference(json.dumps(given))[0]

    def begin(comm):
        trainer = training.trainer(comm, **{**given, "parallel": {"tp": 2}})
        trainer.train_step()
        return trainer.save(tmp_path)

    folder = run_threads(2, begin)[0]

    def go_on(comm):
        trainer = training.trainer(comm, **{**given, "parallel": {"dp": 2, "data_parallel": "zero1"}})
        trainer.load(folder)
        return training.losses(list(trainer.run()))

    for losses in run_threads(2, go_on):
        np.testing.assert_allclose(losses, expected[1:], rtol=1e-11)


def test_adapters_know_their_base(base, tmp_path):
    trainer = training.trainer(single(), **sections(base))
    trainer.train_step()
    folder = trainer.save(tmp_path / "adapters")
    other = training.trainer(single(), model=GPT, train=TRAIN, seed=77)
    another = str(other.save(tmp_path / "other"))
    with pytest.raises(UserError, match=r"lora\.from: .*the adapters in .* were trained on .*other values"):
        training.trainer(single(), **sections(another)).load(folder)
    with pytest.raises(UserError, match=r"lora\.alpha: 5(\.0)?; the adapters in .* have 6"):
        training.trainer(single(), **sections(base, lora={"alpha": 5})).load(folder)
    with pytest.raises(UserError, match=r"not the base of .*: it holds other values"):
        merged(checkpoint.Reader(folder), another)
    with pytest.raises(UserError, match=r"lora\.from: .*it holds adapters only"):
        training.trainer(single(), **sections(str(folder)))
    moved = Path(base).rename(tmp_path / "step_00000003")
    try:
        with pytest.raises(UserError, match=r"must be a checkpoint, or a run"):
            export(folder, tmp_path / "out")
        export(folder, tmp_path / "out", str(moved))
    finally:
        moved.rename(base)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["attention.query"]}, r"lora\.targets: attention\.query; no such layer.*attention\.qkv.*mlp\.up"),
        ({"targets": ["head"]}, r"lora\.targets: head; its weight is tied"),
        ({"from": "/nowhere"}, r"lora\.from: /nowhere; must be a checkpoint"),
    ],
)
def test_what_cannot_be_is_refused(base, lora, message):
    with pytest.raises(UserError, match=message):
        training.trainer(single(), **sections(base, lora=lora))


def test_another_model_is_refused(base):
    with pytest.raises(UserError, match=r"lora\.from: .*there embedding\.weight is \[256, 24\].*\[256, 16\]"):
        training.trainer(single(), **{**sections(base), "model": {**GPT, "dim": 16}})
    with pytest.raises(UserError, match=r"lora\.from: .*has no blocks\.2"):
        training.trainer(single(), **{**sections(base), "model": {**GPT, "layers": 3}})


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"targets": ()}, {"base": ""}])
def test_values(wrong):
    with pytest.raises(ValueError, match=r"lora\.(rank|alpha|targets|from)"):
        LoRAConfig(**{"base": "x", **wrong})
