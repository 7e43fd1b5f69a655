"""Embedding parallelism on in-process ranks: the three ways of cutting = one process; what is sent; what is refused.

Check 55 of the course: one all_to_all forward, one backward per step, the result of one process.
"""

import functools
import json
from typing import Any

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.collectives import run_threads, single
from dtrain.models.auc import auc
from dtrain.strategies.embedding.plan import PLANS
from dtrain.tensor import Tensor
from tests import training

CSV_ROWS = 120
MODEL = {"kind": "dlrm", "dim": 5, "bottom": [6], "top": [7, 6]}
TRAIN = {"steps": 2, "global_batch": 24, "micro_batch": 1, "validate": {"every": 2, "batches": 1}}
OPTIMIZER = {"kind": "adamw", "learning_rate": 0.02, "clip_norm": 0.1}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Bags, empty bags, tables of 2 to 31 rows, one with a single value; the answer depends on the words."""
    rng = np.random.default_rng(5)
    lines = ["age,user,tags,shop,always,bought"]
    for _ in range(CSV_ROWS):
        age, user, shop = rng.integers(18, 80), rng.integers(31), rng.integers(2)
        tags = "|".join(f"t{t}" for t in rng.integers(7, size=rng.integers(4)))
        lines.append(f"{age},u{user},{tags},s{shop},x,{'yes' if (user + shop + len(tags)) % 3 else 'no'}")
    path = tmp_path_factory.mktemp("table") / "shop.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def sections(table: str, **changed: Any) -> dict[str, Any]:
    data = {"kind": "table", "path": table, "categories": ["user", "tags", "shop", "always"], "validation": 0.3}
    return {"model": MODEL, "data": data, "train": TRAIN, "optimizer": OPTIMIZER, **changed}


def train(comm, given):
    """Over two microbatches; on 8 ranks over three."""
    few = {**given["train"], "micro_batch": max(1, 12 // comm.size)}
    trainer = training.trainer(comm, **{**given, "train": few})
    records = list(trainer.run())
    held = [(b.name, b.array.copy(), b.start) for blocks in trainer._blocks().values() for b in blocks]
    return training.losses(records), records[-1].validation_loss, held


@functools.cache
def reference(given):
    losses, validation, held = train(single(), json.loads(given))
    return losses, validation, {name: array for name, array, _ in held}


def compare(results, given):
    losses, validation, values = reference(json.dumps(given))
    seen = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for found, found_validation, held in results:
        np.testing.assert_allclose(found, losses[-len(found) :], rtol=1e-11)
        assert found_validation == pytest.approx(validation, rel=1e-12)
        for name, value, start in held:
            part = tuple(slice(first, first + length) for first, length in zip(start, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][part], rtol=1e-8, atol=1e-11, err_msg=name)
            seen[name][part] = True
    assert all(each.all() for each in seen.values()), "parts side by side are the whole, of parameters and of state"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("embedding", ["table", "row", "column", "replicate"])
def test_every_cut_equals_one_process(table, embedding, ranks):
    """Also more ranks than tables, rows or columns: then some have nothing of them."""
    given = sections(table)
    compare(run_threads(ranks, train, {**given, "parallel": {"embedding": embedding}}), given)


@pytest.mark.parametrize(
    ("data_parallel", "replicate"),
    [("naive", False), ("zero1", False), ("zero2", False), ("zero3", False), ("zero3", True)],
)
@pytest.mark.parametrize("embedding", ["table", "row", "column"])
def test_whatever_the_data_axis_does_with_the_rest(table, embedding, data_parallel, replicate):
    """Tables have one owner already: ZeRO neither gathers nor sums them, in any stage."""
    given = sections(table)
    parallel = {"embedding": embedding, "data_parallel": data_parallel, "replicate": replicate}
    compare(run_threads(3, train, {**given, "parallel": parallel}), given)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "lamb"])
def test_other_optimizers(table, optimizer):
    given = sections(table, optimizer={"kind": optimizer, "learning_rate": 0.02})
    compare(run_threads(3, train, {**given, "parallel": {"embedding": "row"}}), given)


def test_a_run_goes_on_with_another_cut(table, tmp_path):
    """Written by table on 2 ranks; read by row on 3, by column on 4, by one process."""
    given = sections(table)

    def begin(comm):
        trainer = training.trainer(comm, **{**given, "parallel": {"embedding": "table"}})
        trainer.train_step()
        return trainer.save(tmp_path)

    folder = run_threads(2, begin)[0]

    def go_on(comm, embedding):
        trainer = training.trainer(comm, **{**given, "parallel": {"embedding": embedding}})
        trainer.load(folder)
        records = list(trainer.run())
        held = [(b.name, b.array.copy(), b.start) for blocks in trainer._blocks().values() for b in blocks]
        return training.losses(records), records[-1].validation_loss, held

    for ranks, embedding in ((3, "row"), (4, "column"), (1, "table"), (2, "replicate")):
        compare(run_threads(ranks, go_on, embedding), given)


@pytest.mark.parametrize("embedding", ["table", "row", "column"])
def test_one_all_to_all_forward_and_one_backward(table, embedding):
    def count(comm):
        given = sections(table, train={**TRAIN, "micro_batch": 8}, parallel={"embedding": embedding})
        trainer = training.trainer(comm, **given)
        counters = trainer.mesh["dp"].counters
        batch, context = next(trainer.microbatches())
        calls = [counters.calls("all_to_all")]
        loss = trainer.model.loss(batch, context)
        calls.append(counters.calls("all_to_all"))
        loss.backward(1.0)
        calls.append(counters.calls("all_to_all"))
        tables = [group for group in trainer.flat.groups if group.cut_axes == ("dp",)]
        dense = sum(group.size for group in trainer.flat.groups if group.cut_axes == ())
        buckets = sum(bucket.where.stop - bucket.where.start for bucket in trainer.strategies[-1].buckets)
        return np.diff(calls).tolist(), len(tables), buckets - dense

    for calls, tables, more in run_threads(3, count):
        assert calls == [1, 1]
        assert tables == 1 and more == 0, "tables are not summed over the data axis"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", PLANS)
def test_plans_tile_the_tables(kind, ranks):
    shapes = [(10, 4), (3, 4), (1, 4), (25, 4), (8, 4)]
    plan = PLANS[kind](shapes, ranks)
    for t, shape in enumerate(shapes):
        held = np.zeros(shape, int)
        for rank in range(ranks):
            held[slice(*plan.rows[rank][t]), slice(*plan.columns[rank])] += 1
        assert (held == 1).all()
    assert sum(plan.elements()) == sum(rows * columns for rows, columns in shapes)
    if kind == "table" and ranks == 2:
        assert plan.elements() == [4 * 25, 4 * 22]


def test_bags_are_sums_of_rows():
    rng = np.random.default_rng(0)
    weight, ids = rng.normal(size=(6, 3)), np.array([[0, 5, 0], [-1, 2, -1], [-1, -1, -1], [1, -1, 3]])
    w = Tensor(weight, requires_grad=True)
    y = F.embedding_bag(w, ids)
    expected = np.array([sum((weight[i] for i in bag if i >= 0), np.zeros(3)) for bag in ids])
    np.testing.assert_allclose(y.data, expected, rtol=1e-15)
    g = rng.normal(size=(4, 3))
    y.backward(g)
    gradient = np.zeros_like(weight)
    for bag, row in zip(ids, g, strict=True):
        for i in bag[bag >= 0]:
            gradient[i] += row
    np.testing.assert_allclose(w.grad, gradient, rtol=1e-14)


def test_the_model_is_the_paper_s(table):
    """Against plain NumPy: bottom MLP, sums of bags, dot products of all pairs, top MLP, logistic loss."""
    trainer = training.trainer(single(), **sections(table, train={**TRAIN, "micro_batch": 24}))
    batch, _ = next(trainer.microbatches())
    p = training.parameters(trainer)
    x = batch["inputs"].astype(np.float64)
    for i in range(2):
        x = np.maximum(x @ p[f"bottom.{i}.linear.weight"].T + p[f"bottom.{i}.linear.bias"], 0)
    vectors = [x]
    for t in range(4):
        padded = np.vstack([p[f"tables.{t}.weight"], np.zeros(5)])  # -1 is the last row
        vectors.append(padded[batch["ids"][:, t]].sum(axis=1))
    pairs = [(vectors[i] * vectors[j]).sum(axis=1) for i in range(5) for j in range(i + 1, 5)]
    z = np.column_stack([x, *pairs])
    for i in range(2):
        z = np.maximum(z @ p[f"blocks.{i}.linear.weight"].T + p[f"blocks.{i}.linear.bias"], 0)
    logit = (z @ p["head.weight"].T + p["head.bias"])[:, 0]
    signs = np.where(batch["targets"] == 1, 1, -1)
    assert trainer.model.loss(batch).item() == pytest.approx(np.log1p(np.exp(-signs * logit)).sum(), rel=1e-12)


def test_validation_tells_the_area_under_the_roc_curve(table):
    """Exact over all ranks: as counted over all pairs of a "yes" and a "no"."""
    given = sections(table)

    def run(comm: Any) -> Any:
        trainer = training.trainer(comm, **given)
        return trainer, list(trainer.run())[-1].measures

    trainer, found = run(single())
    batch = trainer.data.validation.batch(np.arange(TRAIN["global_batch"]))
    scores = trainer.model(batch["inputs"], batch["ids"]).data[:, 1]
    yes, no = scores[batch["targets"] == 1][:, None], scores[batch["targets"] == 0]
    expected = float(np.mean((yes > no) + 0.5 * (yes == no)))
    assert found == {"auc": pytest.approx(expected, rel=1e-12)}
    for _, measures in run_threads(3, run):
        assert measures == {"auc": pytest.approx(expected, rel=1e-12)}


def test_the_area_with_ties_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    scores, targets = random.integers(0, 20, 500) / 20, random.integers(0, 2, 500)
    assert auc(scores, targets) == pytest.approx(metrics.roc_auc_score(targets, scores), rel=1e-12)
    assert np.isnan(auc(scores, np.ones(500)))


def test_the_survey_in_statsmodels_is_learned():
    pytest.importorskip("statsmodels")
    categories = ["rate_marriage", "religious", "educ", "occupation", "occupation_husb"]
    data = {"kind": "table", "path": "fair", "categories": categories, "validation": 0.2}
    given = sections("", data=data, model={"kind": "dlrm", "dim": 4, "bottom": [8], "top": [8]})
    given["train"] = {"steps": 100, "global_batch": 128, "micro_batch": 64, "validate": {"every": 100, "batches": 10}}
    given["optimizer"] = {"kind": "adamw", "learning_rate": 0.01}

    def work(comm):
        trainer = training.trainer(comm, **given)
        return list(trainer.run())[-1].validation_loss, trainer.data.entropy, trainer.data.tables

    loss, entropy, tables = run_threads(2, work)[0]
    assert tables == (5, 4, 6, 6, 6)
    assert loss < entropy - 0.03


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parallel": {"tp": 2}}, r"parallel\.tp: 2; model\.kind: dlrm uses dp only"),
        ({"model": {"kind": "mlp"}}, r"data\.categories: .*user.*; model\.kind: dlrm needs one or more, mlp takes"),
        ({"data": {"kind": "table", "path": "x.csv"}}, r"data\.categories: \[\]; model\.kind: dlrm needs"),
        ({"data": {"kind": "text", "path": "x"}}, r"data\.kind: text; model\.kind: dlrm learns from table"),
        ({"model": {"kind": "dlrm", "top": [0]}}, r"model\.top: \[0\]"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        training.config(**sections("x.csv", **changed))
