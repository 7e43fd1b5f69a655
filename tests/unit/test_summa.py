"""SUMMA, tensor parallelism on a grid of ranks: this layout = one process; what is cut; what is sent."""

import functools
import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.collectives.dtypes import cut
from dtrain.errors import UserError
from dtrain.mesh import Mesh
from dtrain.models.gpt import GPT as GPTModel
from dtrain.strategies.tensor import summa
from dtrain.strategies.tensor.summa_strategy import SummaParallel
from dtrain.tensor import Tensor
from tests import training

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
TRAIN = {"steps": 2, "micro_batch": 4, "global_batch": 16, "validate": {"every": 2, "batches": 1}}


def train(comm, sections):
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for b in trainer._blocks()["parameter"]]
    return np.array([[r.loss, r.grad_norm] for r in records]), records[-1].validation_loss, held


@functools.cache
def reference(sections):
    losses, validation, held = train(single(), json.loads(sections))
    return losses, validation, {name: array for name, array, _ in held}


def compare(ranks, name, changed=None, **parallel):
    """Over two microbatches or more."""
    sections = {**MODELS[name], "train": {**TRAIN, "global_batch": 8 * parallel.get("dp", 1)}}
    expected, validation, values = reference(json.dumps(sections))
    sections |= {key: {**sections.get(key, {}), **values} for key, values in (changed or {}).items()}
    results = run_threads(ranks, train, {**sections, "parallel": {"tensor": "2d", **parallel}})
    seen = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for losses, validated, held in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        np.testing.assert_allclose(validated, validation, rtol=1e-11)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-9, atol=1e-10, err_msg=name)
            seen[name][part] = True
    assert all(every.all() for every in seen.values()), "blocks side by side are the whole"


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 1), (2, 3)], ids=str)
def test_products_are_those_of_whole_matrices(grid):
    """Any grid and any lengths, also dims that are shorter than the grid is wide."""
    q, r = grid
    rng = np.random.default_rng(0)

    def block(matrix, comm):
        rows, columns = [np.cumsum([0, *cut(n, k)]) for n, k in zip(matrix.shape, (q, r), strict=True)]
        i, j = divmod(comm.rank, r)
        return matrix[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].copy()

    for m, k, n in ((6, 12, 9), (5, 2, 7), (1, 1, 1)):
        a, b, c = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=(m, n))

        def products(comm, a=a, b=b, c=c):
            mesh = Mesh(comm, tp=comm.size, grid=grid)
            where = summa.Grid(mesh["tp_column"], mesh["tp_row"])
            mine = functools.partial(block, comm=comm)
            over = summa.panels(cut(a.shape[1], r), cut(a.shape[1], q))
            for found, whole in (
                (summa.product(mine(a), mine(b), over, where), a @ b),
                (summa.product_bt(mine(c), mine(b), over, where), c @ b.T),
                (summa.product_at(mine(a), mine(c), over, where), a.T @ c),
            ):
                np.testing.assert_allclose(found, mine(whole), rtol=1e-12, atol=1e-12)

        run_threads(q * r, products)


def test_traffic_of_a_product_and_its_gradients():
    """C = A B: (r-1) m·k + (q-1) k·n elements are broadcast to all ranks together. Backward the same twice: as much is
    broadcast again, and summed once."""
    (q, r), (m, k, n) = (2, 3), (12, 18, 6)

    def count(comm):
        mesh = Mesh(comm, tp=6, grid=(q, r))
        grid = summa.Grid(mesh["tp_column"], mesh["tp_row"])
        x = Tensor(np.ones((m // q, k // r)), requires_grad=True)
        weight = Tensor(np.ones((n // r, k // q)), requires_grad=True)
        counters = [grid.along_row.counters, grid.along_column.counters]
        y = summa.linear(x, weight, summa.panels(cut(k, r), cut(k, q)), grid)
        forward = sum(each.volume("broadcast").received for each in counters)
        y.backward(np.ones(y.shape))
        broadcast, summed = (sum(each.volume(name)[column] for each in counters) for name, column in VOLUMES)
        return np.array([forward, broadcast, summed]) // 8

    once = (r - 1) * m * k + (q - 1) * k * n
    assert sum(run_threads(6, count)).tolist() == [once, 2 * once, once]


VOLUMES = (("broadcast", 2), ("reduce", 1))  # where a broadcast is received, where a sum is sent


def test_a_block_has_a_pth_of_everything():
    """Parameters, what goes from block to block, and the traffic of a block: 3 (7 (r-1) b·s·h + 12 (q-1) h²) elements
    of its four products over all ranks, and nothing else but 2 numbers per token for each norm and direction."""
    (q, r), batch, tokens, width = (2, 2), 4, 12, 32

    def count(comm, blocks):
        trainer = training.trainer(
            comm, model={**GPT, "layers": blocks, "dropout": 0.0}, parallel={"tp": 4, "tensor": "2d"},
            train={"steps": 1, "micro_batch": batch, "global_batch": batch, "validate": {"every": 0}},
        )  # fmt: skip
        seen = []
        for block in trainer.model.blocks:
            forward = block.forward
            block.forward = lambda *inputs, forward=forward: (seen.append(forward(*inputs)), seen[-1])[1]
        for parameter in trainer.model.named_parameters().values():
            held = 1 if parameter.ndim == 1 or "positions" in parameter.name else 2
            assert parameter.size * (r if held == 1 else q * r) == int(np.prod(parameter.whole)), parameter.name
        groups = [trainer.mesh["tp_column"].counters, trainer.mesh["tp_row"].counters]

        def sums():
            products = sum(each.volume(name)[column] for name, column in VOLUMES for each in groups) // 8
            return np.array([products, groups[0].calls("all_gather"), groups[0].calls("all_reduce")])

        before = sums()
        trainer.execute(list(trainer.microbatches()))
        assert {y.shape for y in seen} == {(batch // q, tokens, width // r)}
        return sums() - before

    one, three = (np.array(run_threads(4, lambda comm, n=n: count(comm, n))) for n in (1, 3))
    products = (three - one)[:, 0].sum() / 2
    assert products == 3 * (7 * (r - 1) * batch * tokens * width + 12 * (q - 1) * width**2)
    assert (three - one)[:, 1:].tolist() == [[2 * 2, 2 * 2]] * 4, "two norms in each of two blocks"


@pytest.mark.parametrize(
    ("ranks", "name"),
    [*((ranks, "gpt") for ranks in (2, 3, 4, 6)), *itertools.product((3, 4), ("llama", "bert", "mlp"))],
)
def test_models_equal_one_process(name, ranks):
    compare(ranks, name, tp=ranks)


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_panels_of_half_precision_are_added_up_in_float32(dtype, apart):
    sections = {"model": {**GPT, "dropout": 0.0}, "train": {**TRAIN, "global_batch": 8, "dtype": dtype}}
    expected, *_ = train(single(), sections)
    for losses, *_ in run_threads(4, train, {**sections, "parallel": {"tp": 4, "tensor": "2d"}}):
        np.testing.assert_allclose(losses[:, 0], expected[:, 0], rtol=apart)


@pytest.mark.parametrize(
    ("name", "parallel", "changed"),
    [
        ("gpt", {"tp": 4, "grid": [4, 1]}, {"train": {"micro_batch": 2}}),  # rows without samples
        ("gpt", {"tp": 4, "dp": 2, "data_parallel": "zero2"}, {"train": {"recompute": True}}),
        ("gpt", {"tp": 4, "dp": 2, "data_parallel": "zero3", "replicate": True, "order": "dp-tp-pp-cp-ep"}, {}),
        ("llama", {"tp": 4, "dp": 2, "data_parallel": "zero1"}, {}),
        ("gpt", {"tp": 4, "pp": 2}, {"pipeline": {"schedule": "zb_h1"}}),
        ("llama", {"tp": 2, "pp": 2, "dp": 2, "grid": [2, 1], "data_parallel": "zero3"}, {}),
        ("gpt", {"tp": 4, "cp": 2}, {}),
        ("llama", {"tp": 4, "cp": 2, "context": "ulysses"}, {}),
    ],
    ids=lambda part: "-".join(f"{key}{value}" for key, value in part.items()) if isinstance(part, dict) else part,
)
def test_with_other_axes(name, parallel, changed):
    sizes = [parallel.get(axis, 1) for axis in ("tp", "dp", "pp", "cp")]
    compare(int(np.prod(sizes)), name, changed, **parallel)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tensor": "2d", "tp": 4, "grid": [2, 3]}}, r"grid: \[2, 3\]; must be rows x columns"),
        ({"parallel": {"tp": 4, "grid": [2, 2]}}, "parallel.grid: .*; parallel.tensor: 1d has none"),
        ({"parallel": {"tensor": "2d", "tp": 4, "sequence": True}}, "parallel.sequence: true; parallel.tensor: 2d"),
        ({"parallel": {"tensor": "2d"}, "model": {**GPT, "kind": "moe_gpt"}}, "2d; model.kind: moe_gpt; allowed: gpt"),
        ({"parallel": {"tensor": "2d"}, "lora": {"from": "x"}}, "parallel.tensor: 2d; with lora, allowed: 1d"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        training.config(**sections)


def test_other_models_are_refused():
    class Own(GPTModel):
        pass

    def apply(comm):
        config = training.config(model=GPT)
        sizes = SimpleNamespace(vocabulary=5, features=0)
        SummaParallel().apply(Own(config.model, sizes), Mesh(comm, tp=2, grid=(1, 2)))

    with pytest.raises(UserError, match=r"parallel.tensor: 2d; cannot cut Own; allowed: GPT, BERT, MLP"):
        run_threads(2, apply)
