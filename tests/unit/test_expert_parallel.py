"""Expert parallelism on in-process ranks: this layout = one process; what is sent; what a checkpoint carries over.

Checks of the course: 58 (two all_to_alls forward and two backward per mixture), 60 (one expert per token sends half of
what two send); and that an expert's gradient is summed over dp, all others' over dp and ep.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from tests import training

MOE_GPT: dict[str, Any] = {"kind": "moe_gpt", "layers": 2, "dim": 16, "heads": 2, "sequence": 12, "dropout": 0.1}
MIXTURES: dict[str, dict[str, Any]] = {
    "switch": {"top": 1, "capacity": 1.0},
    "switch_dropless": {"top": 1, "capacity": None, "bias_rate": 0.01, "shared": 1},
    "gshard": {"top": 2, "capacity": 1.25, "noise": 0.5, "z_loss": 0.001, "every": 2},
    "gshard_dropless": {"top": 2, "capacity": None, "hidden": 20},
    "expert_choice": {"router": "expert_choice", "top": 2, "capacity": 1.0},
}
TRAIN = {"steps": 2, "micro_batch": 2, "global_batch": 16, "validate": {"every": 2, "batches": 1}}


def sections(name, **train):
    return {"model": {**MOE_GPT, "moe": MIXTURES[name]}, "train": {**TRAIN, **train}}


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for blocks in trainer._blocks().values() for b in blocks]
    told = [[record.details[key] for key in ("load", "dropped")] for record in records]
    return training.losses(records), records[-1].validation_loss, held, told, trainer.model.router_bias


@functools.cache
def reference(given):
    losses, validation, held, told, bias = train(single(), json.loads(given))
    return losses, validation, {name: array for name, array, _ in held}, told, bias


def compare(name, parallel, **options):
    """Over two microbatches, on 8 ranks with samples of their own over one."""
    ways = parallel.get("dp", 1) * parallel.get("ep", 1)
    given = sections(name, **{"global_batch": max(2, min(4, ways)) * 2 * TRAIN["micro_batch"], **options})
    losses, validation, values, told, bias = reference(json.dumps(given))
    ranks = int(np.prod([size for axis, size in parallel.items() if axis in ("dp", "ep", "cp", "tp", "pp")]))
    seen = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for mine in run_threads(ranks, train, {**given, "parallel": parallel}):
        np.testing.assert_allclose(mine[0], losses, rtol=1e-10)
        assert mine[1] == pytest.approx(validation, rel=1e-10)
        for key, value, start in mine[2]:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[key][part], rtol=1e-8, atol=1e-10, err_msg=key)
            seen[key][part] = True
        assert mine[3] == told, "loads and drops are the same numbers"
        np.testing.assert_array_equal(mine[4], bias)
    assert all(every.all() for every in seen.values()), "slices side by side are the whole"


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_equals_one_process(name, ep):
    compare(name, {"ep": ep})


@pytest.mark.parametrize(
    "parallel",
    [
        {"ep": 2, "dp": 2, "data_parallel": "naive"},
        {"ep": 2, "dp": 2, "bucket_mb": 0.01},
        {"ep": 3, "tp": 2},
        {"ep": 2, "tp": 3, "sequence": True},
        {"ep": 2, "pp": 2},
        {"ep": 4, "dp": 2, "data_parallel": "zero1"},
        {"ep": 2, "dp": 2, "data_parallel": "zero2"},
        {"ep": 2, "dp": 2, "data_parallel": "zero3"},
        {"ep": 2, "data_parallel": "zero3", "replicate": True},
        {"ep": 2, "tp": 2, "dp": 2, "data_parallel": "zero3", "replicate": True, "sequence": True},
        {"ep": 2, "tp": 2, "pp": 2},
        {"ep": 2, "pp": 2, "dp": 2, "data_parallel": "zero2"},
        {"tp": 2, "sequence": True},
        {"pp": 2},
        {"ep": 4, "tp": 2, "data_parallel": "zero1"},
        {"ep": 8, "data_parallel": "zero2"},
    ],
    ids=lambda parallel: "-".join(f"{key}{value}" for key, value in parallel.items()),
)
def test_with_other_axes(parallel):
    """With one expert per token and with two, in turn."""
    name = "switch" if len(parallel) % 2 else "gshard"
    compare(name, parallel)


@pytest.mark.parametrize(
    "parallel", [{"cp": 4, "ep": 2}, {"cp": 2, "context": "ulysses"}], ids=["cp4-ep2", "cp2-ulysses"]
)
@pytest.mark.parametrize("name", MIXTURES)
def test_sequences_that_lie_on_several_ranks(name, parallel):
    """Room, loads, order and noise are of whole sequences, whose tokens lie in zigzag blocks of uneven lengths."""
    compare(name, parallel)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("expert_choice", {"cp": 2, "tp": 2, "sequence": True}),
        ("gshard", {"cp": 2, "tp": 2}),
        ("switch", {"cp": 2, "dp": 2, "data_parallel": "zero3"}),
        ("gshard_dropless", {"cp": 2, "pp": 2, "data_parallel": "zero1"}),
    ],
    ids=str,
)
def test_sequences_on_several_ranks_with_other_axes(name, parallel):
    compare(name, parallel)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("gshard", {"tp": 2, "cp": 2, "ep": 2, "pp": 2, "sequence": True}),
        ("switch", {"tp": 2, "cp": 2, "ep": 2, "pp": 2, "data_parallel": "zero2"}),
        ("switch_dropless", {"tp": 2, "cp": 2, "ep": 2, "dp": 2, "data_parallel": "zero3"}),
    ],
    ids=str,
)
def test_sixteen_ranks_and_all_axes_at_once(name, parallel):
    compare(name, parallel)


def test_with_recomputation():
    compare("switch", {"ep": 2, "dp": 2}, recompute=True)


def exchanges(comm, given, parallel):
    """Calls and bytes (of what goes in, on all ranks) of the exchanges of one forward, and of its backward."""
    trainer = training.trainer(comm, **given, parallel=parallel)
    ep = trainer.mesh["ep"]
    (batch, context), *_ = trainer.microbatches()
    told = []
    original = ep.all_to_all

    def counted(array, *inputs, **options):
        told.append(array.nbytes)
        return original(array, *inputs, **options)

    ep.all_to_all = counted
    before = ep.counters.calls("all_to_all")
    loss = trainer.model.loss(batch, context)
    forward = ep.counters.calls("all_to_all") - before, sum(told)
    told.clear()
    loss.backward(trainer.loss_gradient)
    return forward, (ep.counters.calls("all_to_all") - before - forward[0], sum(told))


@pytest.mark.parametrize("layers", [1, 3])
def test_two_exchanges_forward_and_two_backward_per_mixture(layers):
    given = {"model": {**MOE_GPT, "layers": layers}, "train": TRAIN}
    for (forward, _), (backward, _) in run_threads(2, exchanges, given, {"ep": 2}):
        assert (forward, backward) == (2 * layers, 2 * layers)


def test_one_expert_per_token_sends_half_of_what_two_send():
    sent = {}
    for top in (1, 2):
        given = {"model": {**MOE_GPT, "moe": {"top": top, "capacity": None}}, "train": TRAIN}
        results = run_threads(4, exchanges, given, {"ep": 4})
        sent[top] = [sum(rank[way][1] for rank in results) for way in (0, 1)]
    tokens = 4 * TRAIN["micro_batch"] * MOE_GPT["sequence"]  # of a microbatch on all ranks
    assert sent[1] == [2 * 2 * tokens * MOE_GPT["dim"] * 8] * 2  # layers, exchanges, rows, numbers, bytes
    assert sent[2] == [2 * number for number in sent[1]]


def test_experts_are_summed_over_dp_and_all_else_over_dp_and_ep():
    def peers(comm):
        trainer = training.trainer(comm, **sections("switch"), parallel={"ep": 2, "dp": 2, "tp": 2})
        return {name: group.peers.size for group in trainer.flat.groups for name in group.parameters}

    for sizes in run_threads(8, peers):
        assert {size for name, size in sizes.items() if "experts" in name} == {2}
        assert {size for name, size in sizes.items() if "experts" not in name} == {4}


def test_experts_move_to_any_other_layout(tmp_path):
    """Written by 2 x ep, read by 4 x ep and by one process; and the other way round."""
    given = sections("switch_dropless", steps=4)
    expected = reference(json.dumps(given))[0]

    def first_half(comm, folder, parallel):
        trainer = training.trainer(comm, **given, parallel=parallel)
        for _ in range(2):
            trainer.train_step()
        return str(trainer.save(folder))

    def second_half(comm, folder, parallel):
        trainer = training.trainer(comm, **given, parallel=parallel)
        trainer.load(folder)
        return training.losses(list(trainer.run()))

    layouts: list[dict[str, Any]] = [{"ep": 2}, {"ep": 4}, {"dp": 1}]
    for before, after in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        folder, *_ = run_threads(max(before.values()), first_half, tmp_path / str(before), before)
        for losses in run_threads(max(after.values()), second_half, folder, after):
            np.testing.assert_allclose(losses, expected[2:], rtol=1e-10)


def test_a_validation_that_ranks_cannot_share_evenly():
    """A rank with one portion less, or none, still takes part in the exchanges."""

    class Short:
        def __init__(self, whole, length):
            self.whole, self.length = whole, length

        def __len__(self):
            return self.length

        def batch(self, indices):
            return self.whole.batch(indices)

    def losses(comm, parallel):
        trainer = training.trainer(comm, **sections("switch", micro_batch=1), parallel=parallel)
        data, told = trainer.data, []
        for length in (1, 3, 5):
            trainer.data = dataclasses.replace(data, validation=Short(data.validation, length))
            trainer.step = trainer.total_steps
            told.append(trainer.validation())
        return told

    expected = losses(single(), {})
    for parallel in ({"ep": 4}, {"ep": 2, "pp": 2}):
        for told in run_threads(4, losses, parallel):
            np.testing.assert_allclose(told, expected, rtol=1e-12)
