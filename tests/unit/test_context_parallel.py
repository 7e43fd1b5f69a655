"""Context parallelism on in-process ranks: this layout = one process; who works how much; what is sent; what is kept.

Check 40 of the course: ring attention = full attention, in size - 1 exchanges.
"""

import functools
import json
from typing import Any

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.arrays import named_dtype
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.ops import blockwise
from dtrain.ops.attention import default_scale
from dtrain.strategies.context import places, ring, ulysses
from dtrain.tensor import Tensor
from tests import training

GPT: dict[str, Any] = {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 18, "dropout": 0.1}
LLAMA = {
    **GPT, "kv_heads": 2, "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False,
    "hidden": 50,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "heads8": {**GPT, "heads": 8},
    "llama": LLAMA,
    "bert": {**GPT, "kind": "bert"},
}
TRAIN = {"steps": 2, "micro_batch": 2, "global_batch": 8, "validate": {"every": 2, "batches": 1}}


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    held = [(block.name, block.array.copy(), block.start) for block in trainer._blocks()["parameter"]]
    return training.losses(records), records[-1].validation_loss, held


@functools.cache
def reference(sections):
    losses, validation, held = train(single(), json.loads(sections))
    return losses, validation, {name: array for name, array, _ in held}


def compare(ranks, name, recompute=False, **parallel):
    """Uneven parts wherever 18 tokens do not divide, over two microbatches."""
    sections = {"model": MODELS[name], "train": {**TRAIN, "recompute": recompute}}
    expected, validation, values = reference(json.dumps(sections))
    sections["train"] |= {"micro_batch": 4 // parallel.get("dp", 1)}
    for losses, validated, held in run_threads(ranks, train, {**sections, "parallel": parallel}):
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        np.testing.assert_allclose(validated, validation, rtol=1e-11)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("name", "ranks"), [("gpt", 2), ("gpt", 3), ("gpt", 8), ("llama", 4), ("llama", 8), ("bert", 2), ("bert", 3)]
)
def test_ring_equals_one_process(name, ranks):
    compare(ranks, name, cp=ranks, context="ring")


@pytest.mark.parametrize(
    ("name", "ranks"), [("gpt", 2), ("gpt", 3), ("llama", 3), ("llama", 4), ("bert", 4), ("heads8", 8)]
)
def test_ulysses_equals_one_process(name, ranks):
    """Also where cp does not divide the heads (4 on 3), and with fewer key/value heads than ranks (2 on 3 and 4)."""
    compare(ranks, name, cp=ranks, context="ulysses")


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("gpt", {"cp": 2, "dp": 2, "bucket_mb": 0.01}),
        ("llama", {"cp": 2, "dp": 2, "data_parallel": "zero2"}),
        ("gpt", {"cp": 2, "dp": 2, "data_parallel": "zero3", "replicate": True}),
        ("llama", {"cp": 2, "tp": 2}),
        ("bert", {"cp": 2, "tp": 2, "sequence": True}),
        ("gpt", {"cp": 2, "pp": 2, "tp": 2, "sequence": True}),
        ("llama", {"cp": 2, "pp": 2, "dp": 2, "data_parallel": "zero1"}),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_with_other_axes(name, parallel, kind):
    compare(int(np.prod([parallel.get(axis, 1) for axis in ("cp", "dp", "tp", "pp")])), name, context=kind, **parallel)


def test_a_rank_without_heads():
    """Two key/value heads on three tensor-parallel ranks: the third takes part with its tokens alone."""
    compare(6, "llama", cp=2, tp=3, sequence=True)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_recomputation(kind):
    compare(2, "llama", recompute=True, cp=2, context=kind)


# Attention by blocks


def dense(q, k, v, visible, scale):
    """By the definition, one head at a time."""
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            of = h // (q.shape[2] // k.shape[2])
            scores = np.where(visible, q[b, :, h] @ k[b, :, of].T * scale, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, of]
    return out


def arrays(length=5, keys=7, heads=4, groups=2, width=6, dtype=np.float64):
    rng = np.random.default_rng(length * 100 + keys)
    shapes = (2, length, heads, width), (2, keys, groups, width), (2, keys, groups, width)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("length", "keys"), [(5, 7), (6, 3), (4, 4), (1, 1)])
def test_a_block_with_any_offset(length, keys):
    q, k, v = arrays(length, keys)
    for offset in (None, *range(-length - 2, keys + 2)):
        visible = np.ones((length, keys), bool) if offset is None else np.tri(length, keys, offset, dtype=bool)
        out, logsumexp = blockwise.block(q, k, v, offset, 0.4)
        seeing = visible.any(axis=1)
        assert blockwise.sees(length, keys, offset) == seeing.any()
        np.testing.assert_allclose(out[:, seeing], dense(q[:, seeing], k, v, visible[seeing], 0.4), atol=1e-13)
        assert not out[:, ~seeing].any() and np.isneginf(logsumexp[:, :, ~seeing]).all()
        scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)) * 0.4
        sums = np.where(visible, np.exp(scores), 0).sum(axis=-1)
        np.testing.assert_allclose(np.exp(logsumexp), sums, rtol=1e-12)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_blocks_add_up_to_the_whole(cut):
    """Forward and backward, with a causal mask that goes through both blocks."""
    q, k, v = arrays()
    g = np.random.default_rng(1).normal(size=q.shape)
    x = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    whole = F.attention(*x, causal=True, scale=0.4)  # query i sees keys up to i + 2
    (whole * g).sum().backward()
    out, logsumexp = blockwise.block(q, k[:, :cut], v[:, :cut], 2, 0.4)
    blockwise.merge(out, logsumexp, *blockwise.block(q, k[:, cut:], v[:, cut:], 2 - cut, 0.4))
    np.testing.assert_allclose(out, whole.data, atol=1e-13)
    first = blockwise.block_vjp(g, q, k[:, :cut], v[:, :cut], out, logsumexp, 2, 0.4)
    second = blockwise.block_vjp(g, q, k[:, cut:], v[:, cut:], out, logsumexp, 2 - cut, 0.4)
    np.testing.assert_allclose(first[0] + second[0], x[0].grad, atol=1e-12)
    for one, other, expected in zip(first[1:], second[1:], (x[1].grad, x[2].grad), strict=True):
        np.testing.assert_allclose(np.concatenate((one, other), axis=1), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types(dtype):
    """The weights of blocks are in float32 or wider: as close to float64 as attention in one piece."""
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(1, 32, (4 + 2 * 2) * 8))
    runs = places.zigzag(32, 4)
    exact = F.packed_attention(Tensor(qkv), 4, 2).data
    narrow = named_dtype(dtype)
    whole = F.packed_attention(Tensor(qkv.astype(narrow)), 4, 2).data

    def part(comm):
        mine = Tensor(qkv[:, places.positions(runs[comm.rank])].astype(narrow), requires_grad=True)
        y = ring.attention(mine, comm, 4, 2, runs, True, default_scale(8), None)
        y.sum().backward()
        assert y.dtype == narrow and mine.grad.dtype == narrow
        return y.data

    ours = np.zeros_like(whole)
    for rank, out in enumerate(run_threads(4, part)):
        ours[:, places.positions(runs[rank])] = out
    error = lambda x: np.abs(x.astype(np.float64) - exact).max()  # noqa: E731
    assert 0 < error(ours) < 3 * error(whole)


# Places


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("length", [16, 17, 50, 96])
def test_every_token_is_on_one_rank_and_all_work_alike(length, size):
    for runs in (places.blocks(length, size), places.zigzag(length, size)):
        assert sorted(np.concatenate([places.positions(each) for each in runs])) == list(range(length))
        assert all(places.count(each) == len(places.positions(each)) > 0 for each in runs)
    pairs = [int((places.positions(each) + 1).sum()) for each in places.zigzag(length, size)]
    if length % (2 * size) == 0:
        assert len(set(pairs)) == 1, "queries times the keys that they see"
    blocks = [int((places.positions(each) + 1).sum()) for each in places.blocks(length, size)]
    assert length < 2 * size or max(pairs) <= max(blocks)


@pytest.mark.parametrize("size", [2, 4])
def test_masked_pairs_are_left_out(size):
    """The same number of pairs on each rank, and (2 size + 1) size of (2 size)² in all: causal."""
    runs = places.zigzag(64, size)
    pairs = [sum(len(list(ring._pairs(runs, r, s, True))) for s in range(size)) for r in range(size)]
    assert pairs == [2 * size + 1] * size


# What is sent, and what is kept


@pytest.mark.parametrize("size", [2, 3, 4])
def test_messages_of_the_ring(size):
    """One exchange less than ranks, of the key/value heads alone forward; backward the same, and their gradients."""
    length, heads, groups, width, batch = 8 * size, 4, 2, 6, 3
    runs = places.zigzag(length, size)

    def part(comm):
        shape = batch, places.count(runs[comm.rank]), (heads + 2 * groups) * width
        x = Tensor(np.random.default_rng(comm.rank).normal(size=shape), requires_grad=True)
        y = ring.attention(x, comm, heads, groups, runs, True, 0.3, None)
        forward = [row[:4] for key, row in comm.counters.totals().items() if key.collective == "send"]
        y.sum().backward()
        both = [row[:4] for key, row in comm.counters.totals().items() if key.collective == "send"]
        return forward, both

    message = batch * 8 * 2 * groups * width * 8
    for forward, both in run_threads(size, part):
        assert [(calls, sent) for calls, _, sent, _ in forward] == [(size - 1, (size - 1) * message)]
        assert [(calls, sent) for calls, _, sent, _ in both] == [(3 * (size - 1), 3 * (size - 1) * message)]


def test_messages_of_ulysses():
    """Two all_to_alls forward, two backward."""
    runs = places.blocks(16, 4)

    def part(comm):
        x = Tensor(np.random.default_rng(comm.rank).normal(size=(2, 4, (8 + 2 * 4) * 5)), requires_grad=True)
        y = ulysses.attention(x, comm, 8, 4, runs, True, 0.3, None)
        forward = comm.counters.calls("all_to_all")
        y.sum().backward()
        return forward, comm.counters.calls("all_to_all")

    assert run_threads(4, part) == [(2, 4)] * 4


def test_gradients_of_dp_and_cp_are_summed_at_once():
    def count(comm):
        trainer = training.trainer(comm, model=GPT, train={**TRAIN, "steps": 1}, parallel={"cp": 2, "dp": 2})
        before = [trainer.mesh[axes].counters.calls("all_reduce") for axes in ("cp", "dp", ("dp", "cp"))]
        trainer.execute(list(trainer.microbatches()))
        for strategy in trainer.strategies:
            strategy.reduce_gradients(trainer.model)
        from dtrain.flat import reduce_partial

        reduce_partial(trainer.flat)
        after = [trainer.mesh[axes].counters.calls("all_reduce") for axes in ("cp", "dp", ("dp", "cp"))]
        return [b - a for a, b in zip(before, after, strict=True)], len(trainer.strategies[-1].buckets)

    for calls, buckets in run_threads(4, count):
        assert calls == [0, 0, buckets]


def kept(loss, parameters):
    """Bytes of the arrays that the tape of a loss holds, those of the parameters aside."""
    owners: dict[int, int] = {}
    nodes, stack = {loss.node}, [loss.node]

    def add(value):
        if isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            owners[id(value)] = value.nbytes
        elif isinstance(value, tuple | list):
            for each in value:
                add(each)

    while stack:
        node = stack.pop()
        add(node.saved)
        for source in node.inputs:
            if type(source) is type(node) and source not in nodes:
                nodes.add(source)
                stack.append(source)
    whole = set()
    for parameter in parameters:
        array = parameter.data
        while isinstance(array.base, np.ndarray):
            array = array.base
        whole.add(id(array))
    return sum(size for owner, size in owners.items() if owner not in whole)


@pytest.mark.parametrize(("kind", "most"), [("ring", 1.01), ("ulysses", 1.06)])
def test_activations_are_a_cp_th(kind, most):
    """Ulysses keeps the result of attention twice: by heads for its gradient, by tokens for the layer behind."""
    model = {**LLAMA, "kv_heads": 4, "sequence": 64, "dropout": 0.0}

    def held(comm):
        trainer = training.trainer(comm, model=model, train=TRAIN, parallel={"cp": comm.size, "context": kind})
        batch, context = next(trainer.microbatches())
        return kept(trainer.model.loss(batch, context), trainer.model.named_parameters().values())

    alone = held(single())
    assert alone > 2 * 64 * 32 * 8 * 2 * 10, "ten activations of (B, T, C) and two layers, at the least"
    for size in (2, 4):
        assert max(run_threads(size, held)) <= most * alone / size


# Refusals


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": GPT, "parallel": {"cp": 8, "context": "ulysses"}},
            r"parallel.cp: 8 .* ulysses .* 1 to 4",
        ),
        (
            {"model": {**GPT, "sequence": 7}, "parallel": {"cp": 8}},
            r"model.sequence: 7; must be parallel.cp = 8 or more",
        ),
        (
            {"model": {"kind": "mlp"}, "data": {"kind": "images", "path": "digits"}, "parallel": {"cp": 8}},
            r"parallel.cp: MLP has no tokens; allowed: gpt, bert",
        ),
    ],
)
def test_refusals(sections, message):
    with pytest.raises(UserError, match=message):
        run_threads(8, lambda comm: training.trainer(comm, train=TRAIN, **sections))
