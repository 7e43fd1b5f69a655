"""`parallel.reproducible`: the same bits of all parameters for every number of data ranks and every way of summing."""

import argparse
import functools
import math
from typing import Any

import numpy as np
import pytest

from dtrain import optimizers, reproducible
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.fixed_tree import FixedTree
from tests import training

STEPS = 4
BASE: dict[str, Any] = {
    "model": {"kind": "gpt", "layers": 2, "dim": 16, "heads": 2, "sequence": 8, "dropout": 0.1},
    "data": {"kind": "text", "path": argparse.__file__},
    "train": {"steps": STEPS, "global_batch": 24, "micro_batch": 1, "dtype": "float32"},
}
LAYOUTS = [
    (1, "ddp"), (2, "naive"), (2, "zero1"), (2, "zero2"), (2, "zero3"), (4, "ddp"), (4, "zero3"),
    (8, "ddp"), (8, "zero2"),
]  # fmt: skip


def train(comm, sections, data_parallel="ddp", reproducible=True):
    parallel = {"data_parallel": data_parallel, "reproducible": reproducible, "replicate": True, "bucket_mb": 0.01}
    trainer = training.trainer(comm, **{**BASE, **sections, "parallel": parallel})
    norms = [record.grad_norm for record in trainer.run()]
    blocks = [block for group in trainer.flat.groups for block in group.blocks(group.owned_data, group.owned)]
    return norms, [(block.name, block.start, block.array.copy()) for block in blocks]


@functools.cache
def alone():
    norms, blocks = train(single(), {})
    return norms, {name: value for name, _, value in blocks}


def differences(ranks, data_parallel, **options):
    """Elements with other bits, and norms with others."""
    expected_norms, expected = alone()
    wrong = 0
    for norms, blocks in run_threads(
        ranks, functools.partial(train, sections={}, data_parallel=data_parallel, **options)
    ):
        wrong += sum(a != b for a, b in zip(norms, expected_norms, strict=True))
        for name, start, value in blocks:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            wrong += int((value.view(np.uint32) != expected[name][part].view(np.uint32)).sum())
    return wrong


@pytest.mark.parametrize(("ranks", "data_parallel"), LAYOUTS)
def test_equal_bits_on_all_layouts(ranks, data_parallel):
    """24 microbatches: 3 of a rank where there are 8; clipping by a norm that must be the same too; dropout."""
    assert differences(ranks, data_parallel) == 0


def test_without_it_bits_differ():
    """Else the tests above say nothing."""
    assert differences(8, "ddp", reproducible=False) > 100


def test_it_is_the_gradient_of_the_whole_batch():
    norms, _ = alone()
    plain, _ = train(single(), {}, reproducible=False)
    np.testing.assert_allclose(norms, plain, rtol=1e-5)


def test_ranges_of_ranks_are_nodes_of_the_tree():
    assert reproducible.merges(1) == (0,) and reproducible.merges(4) == (0, 1, 0, 2)
    assert reproducible.merges(3) == (0, 0, 2)
    for leaves in (8, 12, 24, 40):
        for ranks in (2, 4):
            if leaves % (8 * ranks) == 0 or leaves // ranks > 1:
                part, whole = reproducible.merges(leaves // ranks), reproducible.merges(leaves)
                assert all(w >= p for w, p in zip(whole, part * ranks, strict=True))
                assert sum(whole) == leaves - 1 == sum(part) * ranks + ranks - 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_over_ranks_go_by_the_tree(ranks):
    values = np.random.default_rng(1).normal(size=(ranks, 37)).astype(np.float32)
    rows = list(values)
    while len(rows) > 1:
        rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]

    def sums(comm):
        tree = FixedTree.over(comm)
        out = np.empty(37, np.float32)
        work = tree.all_reduce_async(values[comm.rank], out=out)
        assert work.wait() is out
        mine = tree.reduce_scatter(values[comm.rank])
        return out, mine, tree.all_reduce(values[comm.rank], op="max")

    results = run_threads(ranks, sums)
    for whole, _, largest in results:
        np.testing.assert_array_equal(whole, rows[0])
        np.testing.assert_array_equal(largest, values.max(axis=0))
    np.testing.assert_array_equal(np.concatenate([mine for _, mine, _ in results]), rows[0])


def test_the_norm_is_right_and_exact():
    """Against the exact sum of the squares, for elements of very different size."""

    def squares(comm):
        trainer = training.trainer(comm, **BASE, parallel={"reproducible": True})
        for group in trainer.flat.groups:
            rng = np.random.default_rng(3)
            group.grad[...] = rng.normal(size=group.size) * np.exp(rng.uniform(-20, 5, size=group.size))
        for parameter in trainer.flat.parameters.values():
            parameter.grad = parameter.buffer
        exact = math.fsum(float(x) ** 2 for group in trainer.flat.groups for x in group.grad)
        return reproducible.sum_squares(trainer.flat), exact, optimizers.sum_squares(trainer.flat)

    (found, exact, plain), *others = run_threads(2, squares)
    assert found == pytest.approx(exact, rel=1e-14) and others[0][0] == found and plain < exact


@pytest.mark.parametrize(
    ("ranks", "sections", "message"),
    [
        (2, {"parallel": {"tp": 2}}, "with parallel.tp: 2; allowed: 1, only the data axis is reproducible"),
        (2, {"parallel": {"pp": 2}}, "with parallel.pp: 2; allowed: 1"),
        (3, {"parallel": {"dp": 3}}, "parallel.dp: 3; with parallel.reproducible: true, allowed: a power of two"),
        (
            2,
            {"parallel": {"data_parallel": "zero1"}, "optimizer": {"kind": "lamb", "learning_rate": 1e-3}},
            "with zero1 and optimizer.kind: lamb; allowed: sgd, adam or adamw",
        ),
    ],
)
def test_what_is_not_reproducible_is_refused(ranks, sections, message):
    merged = {**BASE, **sections, "parallel": {**sections["parallel"], "reproducible": True}}
    with pytest.raises((UserError, ValueError), match=message):
        run_threads(ranks, lambda comm: training.trainer(comm, **merged))
