"""`dtrain verify` on in-process ranks: right layouts pass, broken ones do not, and the layer is named.

A layout is broken as a programmer would break it: one sum over ranks is left out, one is done twice, one gradient is
counted twice.
"""

import argparse
from typing import Any

import numpy as np
import pytest

from dtrain import conjugate, optimizers
from dtrain.collectives import run_threads
from dtrain.errors import UserError
from dtrain.launch import verify_report
from dtrain.launch.verify import Reference, Report, Row, Tolerance, comparable, verify
from dtrain.strategies.ddp import DistributedDataParallel
from dtrain.strategies.pipeline.engine import Engine
from dtrain.strategies.tensor import TensorParallel, layers
from dtrain.strategies.zero import ZeRO
from tests import training

BASE: dict[str, Any] = {
    "model": {"kind": "gpt", "layers": 3, "dim": 16, "heads": 4, "sequence": 8},
    "data": {"kind": "text", "path": argparse.__file__},
    "train": {"micro_batch": 3, "global_batch": 12},
}


def check(ranks: int, steps: int = 2, **sections: Any) -> Report:
    reports = run_threads(ranks, lambda comm: verify(training.config(**{**BASE, **sections}), comm, steps))
    assert all(report == reports[0] for report in reports)
    return reports[0]


def worst(report: Report) -> float:
    return max(row.excess for row in report.rows)


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"dp": 2, "data_parallel": "zero3", "replicate": True}},
        {"parallel": {"tp": 2, "sequence": True}},
        {"parallel": {"pp": 2}, "train": {**BASE["train"], "recompute": True}},
        {"parallel": {"dp": 2}, "optimizer": {"kind": "lamb", "learning_rate": 1e-3}},
        {"parallel": {"pp": 2}, "optimizer": {"kind": "adafactor", "learning_rate": 1e-3}},
        {"parallel": {"dp": 2}, "optimizer": {"kind": "sgd", "learning_rate": 0.1}},
        {
            "parallel": {"tp": 2},
            "model": {"kind": "mlp", "hidden": [8, 8]},
            "data": {"kind": "images", "path": "digits"},
        },
    ],
    ids=lambda sections: "-".join(sections),
)
def test_right_layouts_are_right(sections):
    report = check(2, **sections)
    assert report.right and report.finding is None
    assert worst(report) < 0.5, "the tolerance is near what happens"
    kinds = {row.kind for row in report.rows}
    assert kinds == {"loss", "grad_norm", "gradient 1", "gradient 2", "parameter"}


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("float32", {"tp": 2}),
        ("bfloat16", {"tp": 2, "sequence": True}),
        ("bfloat16", {"dp": 2, "data_parallel": "zero3", "replicate": True}),
        ("bfloat16", {"pp": 2}),
        ("float16", {"dp": 2}),
    ],
)
def test_other_precisions(dtype, parallel):
    report = check(2, parallel=parallel, train={**BASE["train"], "dtype": dtype})
    assert report.right, report.finding
    assert report.tolerance.relative < 0.5


# --- broken layouts ---------------------------------------------------------------------------------------------------


def test_a_forward_sum_that_is_left_out(monkeypatch):
    """Of all of tensor parallelism only the attention of the middle block adds nothing up."""
    leave = TensorParallel.leave

    def init(self, whole, way):
        self.weight, self.bias, self.name = whole.weight, whole.bias, whole.name
        self._leave = (lambda y: y) if whole.name == "blocks.1.attention.out" else way

    monkeypatch.setattr(layers.RowLinear, "__init__", init)
    report = check(2, parallel={"tp": 2})
    assert leave is TensorParallel.leave
    assert not report.right and report.finding == "forward of step 1: blocks.1 is the first that gives something else"


def test_a_backward_sum_that_is_left_out(monkeypatch):
    """The forward is right, and so are the gradients of all that comes after the branch."""
    copy = conjugate.copy
    calls = {"mlp": 0}

    def enter(self, x):
        return copy(x, self.comm)

    def branch(self, x, residual, *context):
        if self.name == "blocks.1.mlp":
            calls["mlp"] += 1
            return self.inner(x, residual, *context)
        return self.inner(self._enter(x), residual, *context)

    monkeypatch.setattr(TensorParallel, "enter", enter)
    monkeypatch.setattr(layers.Branch, "forward", branch)
    report = check(2, parallel={"tp": 2})
    assert calls["mlp"] and not report.right
    assert report.finding is not None
    assert "gradients of step 1" in report.finding and "blocks.1.norm2 the last" in report.finding


def test_gradients_of_norms_that_sequence_parallelism_does_not_sum(monkeypatch):
    summed = TensorParallel.summed

    def forgetful(self, parameter):
        if parameter.name != "blocks.2.norm1.weight":
            summed(self, parameter)

    monkeypatch.setattr(TensorParallel, "summed", forgetful)
    report = check(2, parallel={"tp": 2, "sequence": True})
    assert report.finding == "gradients of step 1 (1 of 40 tensors): blocks.2.norm1"
    wrong = {row.name for row in report.rows if row.kind == "gradient 1" and not row.right}
    assert wrong == {"blocks.2.norm1.weight"}


def test_a_bucket_that_is_not_reduced(monkeypatch):
    post = DistributedDataParallel._post

    def some(self, bucket):
        if "blocks.1.mlp.up.weight" in bucket.names:
            self.posted += 1
        else:
            post(self, bucket)

    monkeypatch.setattr(DistributedDataParallel, "_post", some)
    report = check(2, parallel={"dp": 2, "bucket_mb": 1e-6})
    assert report.finding == "gradients of step 1 (1 of 40 tensors): blocks.1.mlp.up"


def test_a_sum_that_only_a_later_microbatch_needs(monkeypatch):
    monkeypatch.setattr(ZeRO, "no_sync", lambda self: pytest.MonkeyPatch.context())
    with pytest.raises(RuntimeError, match="a second gradient"):
        check(2, parallel={"dp": 2, "data_parallel": "zero1"})


def test_updates_that_are_not_gathered(monkeypatch):
    monkeypatch.setattr(ZeRO, "after_update", lambda self, model: None)
    report = check(2, parallel={"dp": 2, "data_parallel": "zero1", "replicate": True})
    assert (
        not report.right and report.finding == "update: embedding is the first in forward order with other parameters"
    )
    assert all(row.right for row in report.rows if row.kind == "gradient 1")


def test_a_norm_that_counts_twice(monkeypatch):
    squares = optimizers.sum_squares
    monkeypatch.setattr(
        optimizers, "sum_squares", lambda flat: 2 * squares(flat) if flat.mesh.size("tp") > 1 else squares(flat)
    )
    report = check(2, parallel={"tp": 2})
    assert report.finding == "norm of the gradients in step 1: all gradients are right, but not each counts once"


def test_a_microbatch_whose_gradient_a_stage_forgets(monkeypatch):
    weights = Engine._hand_back

    def forgetful(self, action, x):
        if x is not None and action == (2, "B", 1):
            x.grad[...] = 0
        weights(self, action, x)

    monkeypatch.setattr(Engine, "_hand_back", forgetful)
    report = check(3, parallel={"pp": 3})
    assert report.finding is not None and "blocks.1.mlp.down the last" in report.finding


def test_ranks_whose_copies_differ(monkeypatch):
    """Only one of two replicas is wrong: each is compared."""
    step = optimizers.Optimizer.step

    def nudge(self, *args):
        step(self, *args)
        if self.flat.mesh.comm.rank == 1:
            self.flat.parameters["norm.bias"].data[0] += 1e-3

    monkeypatch.setattr(optimizers.Optimizer, "step", nudge)
    report = check(2, steps=1, parallel={"dp": 2})
    assert report.finding == "update: norm is the first in forward order with other parameters"


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_compression_is_refused():
    with pytest.raises(UserError, match=r"compression.kind: int8; loses .* 'parallel.compression=\{kind: none\}'"):
        check(2, parallel={"dp": 2, "compression": {"kind": "int8", "everywhere": True}})


def test_a_reference_can_be_used_again():
    config = comparable(training.config(**BASE, parallel={"dp": 1}), 2)
    reference = Reference.train(config, 2)
    for parallel in ({"dp": 2}, {"pp": 2}):
        layout = training.config(**BASE, parallel=parallel)
        report = run_threads(2, lambda comm, c=layout: verify(c, comm, 2, reference=reference))[0]
        assert report.right and len(report.rows) == 2 * 2 + 3 * len(reference.values)


def test_the_report_names_the_worst_first(capsys):
    rows = [Row("gradient 1", f"layer{i}.weight", 1e-16 * i, 1.0, 0.01 * i) for i in range(20)]
    config = training.config(parallel={"dp": 2})
    verify_report.show(Report(3, Tolerance(1e-14, "rounding"), rows, None), config, 2, False)
    said = capsys.readouterr().out
    assert said.startswith("RIGHT") and "20 of 20" in said and "and 12 more" in said
    assert said.index("layer19.weight") < said.index("layer12.weight") and "layer11.weight" not in said
    rows.append(Row("parameter", "head.weight", np.inf, 1.0, np.inf))
    verify_report.show(Report(3, Tolerance(1e-14, "rounding"), rows, "update: head"), config, 2, True)
    said = capsys.readouterr().out
    assert said.startswith("WRONG") and "update: head" in said and "layer1.weight" in said
