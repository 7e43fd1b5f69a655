"""ZeRO on in-process ranks: this layout = one process, what each rank holds, what it sends.

Checks of the course: 26 and 27 (bytes per parameter), 28 (elements sent), 29 (the loss curves of all stages are one).
"""

import functools
import json
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.strategies.zero.buffers import Pages
from tests import training

GPT: dict[str, Any] = {"kind": "gpt", "layers": 3, "dim": 32, "heads": 4, "sequence": 16}
TRAIN: dict[str, Any] = {"steps": 2, "micro_batch": 2, "global_batch": 24}
MICRO_BATCH = {1: 12, 2: 6, 3: 4, 4: 2}  # of so many data ranks: two microbatches each, of four ranks three
STAGES = [(stage, replicate) for stage in (1, 2, 3) for replicate in (False, True)]


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for blocks in trainer._blocks().values() for b in blocks]
    split = [comm.name for comm in trainer.mesh.communicators() if " " in comm.name]  # these the mesh closes
    shard = trainer.config.parallel.shard_over
    assert len(split) == len(set(split)) and ("dp of copies" in split) == (shard > 0), split
    return training.losses(records), held


@functools.cache
def reference(sections):
    losses, held = train(single(), json.loads(sections))
    return losses, {name: array for name, array, _ in held}


def compare(ranks, parallel, **sections):
    sections = {"model": GPT, "train": TRAIN, **sections}
    expected, values = reference(json.dumps(sections))
    layout = {
        "train": {**sections["train"], "micro_batch": MICRO_BATCH[ranks // parallel.get("cp", 1)]},
        "parallel": parallel,
    }
    results = run_threads(ranks, train, {**sections, **layout})
    seen = {name: np.zeros(value.shape, int) for name, value in values.items()}
    for losses, held in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-10, err_msg=name)
            seen[name][part] += 1
    assert all((every == 1).all() for every in seen.values()), "every element has one owner"


@pytest.mark.parametrize(
    ("stage", "replicate", "ranks"), [(*each, ranks) for each in STAGES for ranks in (3, 4 if each[1] else 2)]
)
def test_all_stages_equal_one_process(stage, replicate, ranks):
    """With several microbatches, clipping, and a validation, which gathers again."""
    compare(ranks, {"data_parallel": f"zero{stage}", "replicate": replicate})


@pytest.mark.parametrize(
    ("stage", "replicate", "axes"),
    [
        *((stage, not stage % 2, {"cp": 2}) for stage in (1, 2, 3)),
        *((stage, bool(stage % 2), {"cp": 4}) for stage in (1, 2, 3)),
        *((stage, True, {"cp": 2, "dp": 2}) for stage in (2, 3)),
    ],
)
def test_over_the_ranks_of_context_parallelism_too(stage, replicate, axes):
    """Ranks along cp are data ranks for parameters, gradients and state: each keeps 1/(dp cp) of them."""
    ranks = axes["cp"] * axes.get("dp", 1)
    parallel = {"data_parallel": f"zero{stage}", "replicate": replicate, **axes}
    compare(ranks, parallel)

    def sizes(comm):
        trainer = training.trainer(comm, model=GPT, train=TRAIN, parallel=parallel)
        whole = sum(group.size for group in trainer.flat.groups)
        return [whole, *(sum(held(group).size for group in trainer.flat.groups) for held in HELD[:stage])]

    for whole, *held in run_threads(ranks, sizes):
        assert held == [whole // ranks] * stage


HELD = (lambda group: group.owned_data, lambda group: group.shard, lambda group: group.mine)


@pytest.mark.parametrize(("stage", "replicate"), STAGES)
def test_with_recomputation_dropout_and_untied_ends(stage, replicate):
    model = {**GPT, "dropout": 0.2, "tied": False, "norm": "rms", "position": "rotary"}
    compare(
        2, {"data_parallel": f"zero{stage}", "replicate": replicate}, model=model, train={**TRAIN, "recompute": True}
    )


@pytest.mark.parametrize(("stage", "replicate"), STAGES)
def test_an_mlp_and_bert(stage, replicate):
    parallel = {"data_parallel": f"zero{stage}", "replicate": replicate}
    compare(2, parallel, model={**GPT, "kind": "bert"})
    compare(3, parallel, model={"kind": "mlp", "hidden": [48, 8]}, data={"kind": "images", "path": "digits"})


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_within_a_pipeline(stage, schedule):
    """What others refuse: gradients of several microbatches are under way while the parameters come and go."""
    sections = {"model": {**GPT, "layers": 4}, "pipeline": {"schedule": schedule, "microbatches": 4}}
    expected, _ = reference(json.dumps({"model": {**GPT, "layers": 4}, "train": TRAIN}))
    parallel = {"pp": 2, "dp": 2, "data_parallel": f"zero{stage}", "replicate": True}
    for losses, _ in run_threads(4, train, {"train": {**TRAIN, "micro_batch": 3}, **sections, "parallel": parallel}):
        np.testing.assert_allclose(losses, expected, rtol=1e-11)


@pytest.mark.parametrize(("stage", "replicate"), STAGES)
def test_a_copy_in_every_group_of_ranks(stage, replicate):
    """Hybrid sharding: cut over 2 ranks, two copies of it; every element is counted once in norm and checkpoint."""
    sections = {"model": GPT, "train": TRAIN}
    expected, values = reference(json.dumps(sections))
    parallel = {"data_parallel": f"zero{stage}", "replicate": replicate, "shard_over": 2}
    results = run_threads(4, train, {**sections, "parallel": parallel})
    for losses, held in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-10, err_msg=name)
    for (_, mine), (_, other) in ((results[0], results[2]), (results[1], results[3])):
        for (name, value, start), (same, copy, where) in zip(mine, other, strict=True):
            assert (name, start) == (same, where)
            np.testing.assert_array_equal(value, copy, err_msg=name)
    with pytest.raises(UserError, match=r"parallel.shard_over: 3; must divide the 4 data ranks: \[1, 2, 4\]"):
        run_threads(4, train, {**sections, "parallel": {**parallel, "shard_over": 3}})


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor"])
def test_copies_and_optimizers_that_look_at_whole_parameters(optimizer):
    parallel = {"data_parallel": "zero1", "tp": 2, "shard_over": 2}
    sections = {"model": GPT, "train": TRAIN, "optimizer": {"kind": optimizer, "learning_rate": 3e-3, "clip_norm": 1.0}}
    if optimizer == "adafactor":  # refuses ranges that cut a matrix
        with pytest.raises(ValueError, match=r"optimizer.kind: adafactor; its rows and columns are of whole"):
            run_threads(8, train, {**sections, "parallel": parallel})
        return
    expected, _ = reference(json.dumps(sections))
    for losses, _ in run_threads(8, train, {**sections, "train": {**TRAIN, "micro_batch": 3}, "parallel": parallel}):
        np.testing.assert_allclose(losses, expected, rtol=1e-11)


def test_parameters_may_stay_until_the_backward():
    compare(3, {"data_parallel": "zero3", "replicate": True, "reshard": False})


def test_all_stages_have_the_bits_of_ddp():
    def losses(stage):
        sections = {"model": GPT, "train": {**TRAIN, "dtype": "float32", "micro_batch": 12}}
        results = run_threads(
            2, train, {**sections, "optimizer": {"clip_norm": None}, "parallel": {"data_parallel": stage}}
        )
        return results[0][0][:, 0]

    ddp = losses("ddp")
    for stage in (1, 2, 3):
        np.testing.assert_array_equal(losses(f"zero{stage}"), ddp)


PAPER = {1: (16, 16, 16), 2: (10, 9, 8), 4: (7, 5.5, 4), 8: (5.5, 3.75, 2), 64: (4.1875, 2.21875, 0.25)}


def test_the_numbers_of_the_paper():
    """Checks 26 and 27: 2 bytes of parameter, 2 of gradient, 12 of optimizer; 7.5 billion parameters, in GB."""
    for n, expected in PAPER.items():
        assert (4 + 12 / n, 2 + 14 / n, 16 / n) == expected
    assert [round(7.5 * each, 1) for each in (PAPER[1][0], *PAPER[64])] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize(("ranks", "expected"), [(n, PAPER[n]) for n in (1, 2, 4, 8)])
def test_bytes_per_parameter_are_those_of_the_paper(ranks, expected):
    """Mixed precision: 2 bytes of parameter and of gradient, 12 of optimizer (master copy and two moments)."""

    def held(comm, stage):
        sections = {"train": {**TRAIN, "dtype": "bfloat16", "micro_batch": 1}, "model": GPT}
        trainer = training.trainer(comm, **sections, parallel={"data_parallel": f"zero{stage}", "replicate": True})
        groups = trainer.flat.groups
        elements = sum(group.size for group in groups)
        if ranks == 1:
            kept = sum(group.data.nbytes + group.grad.nbytes for group in groups)
        else:
            kept = sum(sum(group.bytes_held().values()) for group in groups)
            for group in groups:  # what is counted is what is there
                whole = group.size * 2
                assert group.owned_data.nbytes == group.owned_grad.nbytes == whole // ranks
                assert (group.shard is None) == (stage == 1) and (group.mine is None) == (stage < 3)
        state = sum(array.nbytes for part in trainer.optimizer.parts for array in part.state.values())
        return (kept + state) / elements

    for stage, bytes_per_parameter in zip((1, 2, 3), expected, strict=True):
        for value in run_threads(ranks, held, stage):
            assert value == bytes_per_parameter


@pytest.mark.parametrize(
    ("data_parallel", "times"), [("naive", 2), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)]
)
def test_elements_sent_are_those_of_the_paper(data_parallel, times):
    """2Ψ, and 3Ψ in stage 3, which needs the parameters twice: but for the block that the backward begins with."""

    def count(comm):
        model = {**GPT, "layers": 6}
        train = {**TRAIN, "steps": 1, "micro_batch": 12, "validate": {"every": 0}}
        parallel = {"data_parallel": data_parallel, "replicate": True}
        trainer = training.trainer(comm, model=model, train=train, parallel=parallel)
        dp, asked = trainer.mesh["dp"], {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
        for name in asked:
            for twin in (name, f"{name}_async"):
                _watch(dp, twin, name, asked)
        for strategy in trainer.strategies:
            trainer.execute(list(trainer.microbatches()))
            strategy.reduce_gradients(trainer.model)
            strategy.after_update(trainer.model)
        whole = sum(group.size for group in trainer.flat.groups)
        last = [p.size for p in trainer.model.blocks[-1].named_parameters().values()]
        return 2 * asked["all_reduce"] + asked["reduce_scatter"] + asked["all_gather"], whole, sum(last)

    for elements, whole, block in run_threads(2, count):
        kept = block if times == 3 else 0
        ends_once = whole - 6 * block if times == 3 else 0  # the ends stay for the whole step
        assert times * whole - kept - ends_once == pytest.approx(elements, rel=0.01)


def _watch(comm, method, name, asked):
    plain = getattr(comm, method)

    def counting(array, *args, **options):
        out = options.get("out")
        asked[name] += max(array.size, 0 if out is None else out.size)
        return plain(array, *args, **options)

    setattr(comm, method, counting)


def test_unused_parameters_are_told():
    def step(comm, stage):
        trainer = training.trainer(comm, model=GPT, train=TRAIN, parallel={"data_parallel": f"zero{stage}"})
        block = trainer.model.blocks[1]
        block.inner.mlp.forward = lambda x, residual, context=None: residual
        trainer.train_step()

    for stage in (1, 2, 3):
        with pytest.raises(RuntimeError, match=r"no gradient reached blocks.1.mlp"):
            run_threads(2, step, stage)


def test_pages_are_zero_after_they_were_given_back():
    pages = Pages(1 << 16, np.dtype(np.float32))
    pages.array[...] = 1
    address = pages.array.__array_interface__["data"][0]
    pages.give_back()
    assert not pages.array.any() and pages.array.__array_interface__["data"][0] == address
