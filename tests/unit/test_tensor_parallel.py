"""Tensor and sequence parallelism on in-process ranks: this layout = one process; what is cut; what is sent.

Checks of the course: 35 (two all_reduces of b·s·h per block and direction, two more with recomputation), 36 (slices
side by side are the whole), 37 (cross-entropy: three all_reduces of b·s, no logits of the whole vocabulary), 38
(dropout), 39 (heads that tp does not divide: cut unevenly here, not refused, with the same result), 50 (dp x pp x tp;
gradients per rank are 1/(pp tp)).
"""

import collections
import functools
import json
import math
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

import dtrain.functional as F
from dtrain import autograd
from dtrain.collectives import Communicator, run_threads, single
from dtrain.collectives.dtypes import cut
from dtrain.errors import UserError
from dtrain.strategies.tensor import layers
from dtrain.tensor import Tensor
from tests import training
from tests.nodes_in_threads import run_nodes

GPT: dict[str, Any] = {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 12, "dropout": 0.1}
LLAMA = {
    **GPT, "kv_heads": 2, "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False,
    "hidden": 50,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"model": GPT},
    "llama": {"model": LLAMA},
    "bert": {"model": {**GPT, "kind": "bert"}},
    "mlp": {"model": {"kind": "mlp", "hidden": [48, 9], "dropout": 0.1}, "data": {"kind": "images", "path": "digits"}},
}
MODELS["linear"] = {**MODELS["mlp"], "model": {"kind": "mlp", "hidden": []}}
TRAIN = {"steps": 2, "micro_batch": 4, "global_batch": 16}


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for b in trainer._blocks()["parameter"]]
    return training.losses(records), held


@functools.cache
def reference(sections):
    losses, held = train(single(), json.loads(sections))
    return losses, {name: array for name, array, _ in held}


def compare(ranks, name, run=run_threads, **parallel):
    sections = {**MODELS[name], "train": TRAIN}
    expected, values = reference(json.dumps(sections))
    few = {"micro_batch": 8} if name != "mlp" and "dp" not in parallel else {}  # two microbatches
    results = run(ranks, train, {**sections, "train": {**TRAIN, **few}, "parallel": parallel})
    seen = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for losses, held in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-10, err_msg=name)
            seen[name][part] = True
    assert all(every.all() for every in seen.values()), "slices side by side are the whole"


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_transformers_equal_one_process(name, ranks, sequence):
    """Also where tp divides neither heads nor vocabulary, and where a rank has no heads (llama on 3 and 4)."""
    compare(ranks, name, tp=ranks, sequence=sequence)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_between_hosts_sums_move_while_weights_get_their_gradients(monkeypatch, name, sequence):
    """The sum behind each branch's first product is started, and awaited only after the weights' gradients."""
    events: dict[int, list[str]] = collections.defaultdict(list)  # of each thread, which is a rank
    started = "reduce_scatter_async" if sequence else "all_reduce_async"
    start, weights = getattr(Communicator, started), autograd._weights

    def noted_start(comm, array, *args, **options):
        work = start(comm, array, *args, **options)
        events[threading.get_ident()].append("start")
        finish = work.wait
        work.wait = lambda: (events[threading.get_ident()].append("wait"), finish())[1]
        return work

    def noted_weights(*args):
        events[threading.get_ident()].append("weights")
        weights(*args)

    monkeypatch.setattr(Communicator, started, noted_start)
    monkeypatch.setattr(autograd, "_weights", noted_weights)
    compare(2, name, run=lambda ranks, *args: run_nodes(range(ranks), *args), tp=2, sequence=sequence)
    assert len(events) == 2
    for each in events.values():
        begins = [k for k, event in enumerate(each) if event == "start"]
        assert len(begins) == (5 - sequence) * 2 * TRAIN["steps"], "2 branches of 2 layers, the head; 2 microbatches"
        assert all(each[k + 1] == "weights" and "wait" in each[k + 2 : k + 6] for k in begins)


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_mlp_equals_one_process(ranks):
    compare(ranks, "mlp", tp=ranks)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 2, "dp": 2, "data_parallel": "ddp"},
        {"tp": 2, "dp": 2, "data_parallel": "zero3", "replicate": True},
        {"tp": 2, "pp": 2, "sequence": True},
        {"tp": 2, "pp": 2, "dp": 2, "data_parallel": "zero2", "sequence": True},
    ],
    ids=lambda parallel: "-".join(f"{key}{value}" for key, value in parallel.items()),
)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_with_other_axes(name, parallel):
    compare(parallel["tp"] * parallel.get("pp", 1) * parallel.get("dp", 1), name, **parallel)


SAMPLES, HEAD = {"blocks": "samples"}, {"head": "head"}


@pytest.mark.parametrize(
    ("name", "parallel", "plan"),
    [
        ("mlp", {"tp": 3}, SAMPLES | HEAD),  # parts of 2, 1 and 1 samples
        ("llama", {"tp": 2, "dp": 2}, SAMPLES | HEAD),
        ("gpt", {"tp": 2, "pp": 2}, SAMPLES | HEAD | {"embedding": "vocabulary"}),
        ("bert", {"tp": 3, "cp": 2}, SAMPLES),
        ("gpt", {"tp": 2}, {r"blocks\.1\.mlp": "mlp"}),
        ("llama", {"tp": 2, "dp": 2, "data_parallel": "zero3"}, HEAD | {r"blocks\.0\.attention": "attention"}),
    ],
)
def test_a_plan_of_the_user_equals_one_process(name, parallel, plan):
    compare(math.prod(size for axis, size in parallel.items() if axis != "data_parallel"), name, **parallel, plan=plan)


@pytest.mark.parametrize(
    ("name", "plan", "told"),
    [
        ("gpt", HEAD, "cuts one of embedding and head, which are one weight"),
        ("mlp", {"haed": "head"}, r"haed; fits no module.*Modules: blocks.0.linear, blocks.1.linear, head"),
        ("mlp", {"head": "mlp"}, "head: mlp; head is of kind Linear, allowed: MLP"),
        ("mlp", {"head": "samples"}, "samples is for blocks"),
        ("linear", SAMPLES, "blocks: samples; the model has no blocks"),
        ("mlp", {"(": "head"}, "is no pattern of paths"),
        ("gpt", SAMPLES | {r"blocks\.0\.mlp": "mlp"}, "does not go with blocks.0.mlp: mlp"),
    ],
)
def test_plans_that_cannot_be_are_refused(name, plan, told):
    with pytest.raises((UserError, msgspec.ValidationError), match=told):
        compare(2, name, tp=2, plan=plan)


def test_a_sequence_needs_all_branches_cut():
    with pytest.raises(UserError, match=r"parallel.plan leaves blocks.0.attention whole"):
        compare(2, "gpt", tp=2, sequence=True, plan={r"blocks\.\d+\.mlp": "mlp"})


def test_traffic_of_a_block():
    """Two all_reduces of b·s·h forward and two backward per block; the rest is that of the ends."""

    def count(comm, blocks, recompute=False, **parallel):
        model = {**GPT, "layers": blocks, "dropout": 0.0}
        train = {"steps": 1, "micro_batch": 4, "global_batch": 4, "validate": {"every": 0}, "recompute": recompute}
        trainer = training.trainer(comm, model=model, train=train, parallel={"tp": 2, **parallel})
        counters = trainer.mesh["tp"].counters
        before = {name: counters.calls(name) for name in ("all_reduce", "all_gather", "reduce_scatter")}
        trainer.execute(list(trainer.microbatches()))
        return {name: counters.calls(name) - number for name, number in before.items()}

    for blocks in (1, 3):
        calls = run_threads(2, lambda comm, n=blocks: count(comm, n))[0]
        # Ends: the embedding's sum, three of the cross-entropy, the gradient of the head's input.
        assert calls == {"all_reduce": 4 * blocks + 5, "all_gather": 0, "reduce_scatter": 0}
        calls = run_threads(2, lambda comm, n=blocks: count(comm, n, recompute=True))[0]
        assert calls["all_reduce"] == 6 * blocks + 5
        calls = run_threads(2, lambda comm, n=blocks: count(comm, n, sequence=True))[0]
        # Ends: the cut tokens' gradient is gathered, and the tokens behind the last block are.
        assert calls == {"all_reduce": 5, "all_gather": 4 * blocks + 2, "reduce_scatter": 4 * blocks}


def test_gradients_that_a_rank_sums_over_dp_are_divided_by_pp_and_tp():
    def sent(comm, **parallel):
        model = {**LLAMA, "layers": 4, "dropout": 0.0}
        train = {**TRAIN, "steps": 1, "validate": {"every": 0}}
        even = {"cut": [2, 2]}
        trainer = training.trainer(comm, model=model, train=train, parallel={"dp": 2, **parallel}, pipeline=even)
        counters = trainer.mesh["dp"].counters
        counters.reset()
        list(trainer.run())
        return counters.volume("all_reduce", purpose="").sent

    whole = sum(run_threads(2, sent))
    parts = run_threads(8, lambda comm: sent(comm, tp=2, pp=2))
    assert whole <= sum(parts) <= 1.05 * whole, "norms are whole on both ranks of tp"
    assert max(parts) < whole / 2 / 4 * 1.05


def test_cross_entropy_never_has_all_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 11)) * 1e4  # stable for large ones
    targets = np.array([0, 10, 3, -1, 5, 10])
    x = Tensor(logits, requires_grad=True)
    expected = F.cross_entropy(x, targets, ignore=-1, reduction="sum")
    expected.backward()

    def part(comm):
        lengths = cut(11, comm.size)
        first = sum(lengths[: comm.rank])
        mine = Tensor(logits[:, first : first + lengths[comm.rank]].copy(), requires_grad=True)
        before = comm.counters.calls("all_reduce")
        loss = layers.cross_entropy(mine, targets, comm, 11)
        assert comm.counters.calls("all_reduce") - before == 3
        assert loss.node is not None
        assert max(array.size for array in loss.node.saved[:3]) <= 6 * lengths[comm.rank]
        loss.backward()
        return loss.item(), mine.grad

    for ranks in (2, 3, 8, 16):
        results = run_threads(ranks, part)
        np.testing.assert_allclose([loss for loss, _ in results], expected.item(), rtol=1e-12)
        np.testing.assert_allclose(np.concatenate([g for _, g in results], axis=1), x.grad, atol=1e-12)


def test_an_unknown_style_and_a_model_without_tokens_are_refused():
    from dtrain.strategies.tensor import TensorParallel

    def unknown(comm):
        from dtrain import models
        from dtrain.mesh import Mesh

        sections = training.config(**MODELS["mlp"])
        model = models.outline(sections.model, type("S", (), {"vocabulary": 5, "features": 4})(), "float64")
        TensorParallel({r"head": "diagonal"}).apply(model, Mesh(comm, tp=2))

    with pytest.raises(UserError, match=r"plan: head: diagonal; allowed: vocabulary, attention, mlp, moe, head"):
        run_threads(2, unknown)
    with pytest.raises(UserError, match=r"parallel.sequence: MLP has no tokens; allowed: gpt, bert"):
        compare(2, "mlp", tp=2, sequence=True)
