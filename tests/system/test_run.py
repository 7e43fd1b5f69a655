"""The main job, as a user sees it: what is said and written, and that it does not depend on the number of ranks."""

import json
import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
import yaml

from tests.system.program import (
    MLP,
    losses,
    metrics,
    needs_mpirun,
    well,
    write_config,
)

pytestmark = [pytest.mark.timeout(600)]

STEPS, BATCH, SEQUENCE = 20, 24, 16  # of the small job


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_files(job):
    _, run = job
    named = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "loss.svg", "sample.txt"}
    assert {path.name for path in run.iterdir()} == named | {"tokenizer.json"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000010", "step_00000020"}


def test_the_resolved_configuration_is_itself(job):
    _, run = job
    written = (run / "config.yaml").read_text()
    assert yaml.safe_load(written)["parallel"]["dp"] == (2 if run.name == "two" else 1)
    assert well("show", "config", run / "config.yaml").out.strip() == written.strip()


def test_it_is_told_too(job, tmp_path):
    ended, run = job
    begin = ended.out.index(f"config as resolved; every key: {run}/config.yaml\n")
    told = ended.out[begin : ended.out.index("\ndata   text")].splitlines()[1:]
    assert len(told) <= 12 and f"       parallel: {{dp: {1 + (run.name == 'two')}}}" in told
    (tmp_path / "told.yaml").write_text("\n".join(line.strip() for line in told))
    assert well("show", "config", tmp_path / "told.yaml").out == (run / "config.yaml").read_text()


def test_metrics(job):
    _, run = job
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds", "tokens", "memory_bytes"}
    for row in rows:
        assert set(row) == keys | ({"validation_loss"} if row["step"] % 10 == 0 else set())
        assert row["tokens"] == row["step"] * BATCH * SEQUENCE
        assert math.isclose(row["tokens_per_second"] * row["step_seconds"], BATCH * SEQUENCE, rel_tol=1e-9)
        assert 2e7 < row["memory_bytes"] < 1e9
    # from log(256) of a model that knows nothing, down
    assert abs(rows[0]["loss"] - math.log(256)) < 0.2 and rows[-1]["loss"] < 4
    digits = [len(word.split('"loss": ')[1].split(",")[0]) for word in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(digits) >= 17  # all that a float64 has


def test_the_learning_rate_is_the_schedule(alone):
    for row in metrics(alone[1]):
        step = row["step"]
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4))) / 2
        expected = 0.01 * (step / 4 if step <= 4 else cosine)
        assert math.isclose(row["learning_rate"], expected, rel_tol=0.15), step


def test_summary(job):

    _, run = job
    summary = json.loads((run / "summary.json").read_text())
    rows = metrics(run)
    assert summary["steps"] == STEPS
    assert summary["final_loss"] == rows[-1]["loss"]
    assert summary["final_validation_loss"] == rows[-1]["validation_loss"]
    assert summary["tokens"] == STEPS * BATCH * SEQUENCE
    assert summary["seconds"] > 0
    peaks = summary["peak_memory_bytes_per_rank"]
    assert len(peaks) == summary["layout"]["ranks"] and max(peaks) >= rows[-1]["memory_bytes"] and min(peaks) > 2e7
    assert summary["layout"]["ranks"] == (2 if run.name == "two" else 1)
    assert summary["versions"]["numpy"] == np.__version__
    assert run.name != "two" or "thread level" in summary["versions"]["mpi"]
    dim, hidden = 32, 128
    block = 4 * dim + 3 * dim * dim + 3 * dim + dim * dim + dim + 2 * dim * hidden + hidden + dim
    assert summary["parameters"] == 256 * dim + SEQUENCE * dim + block + 2 * dim


def test_the_traffic_of_a_step(job):
    """The gradients once, half of them from the other rank and half back; the sums of the losses apart."""
    ended, run = job
    rows = json.loads((run / "summary.json").read_text())["collectives"]
    if run.name == "alone":
        assert rows == [] and "communication" not in ended.out
        return
    step = [row for row in rows if not row["purpose"]]
    assert {(row["group"], row["collective"]) for row in step} == {("dp", "all_reduce")}
    parameters = json.loads((run / "summary.json").read_text())["parameters"]
    sent = sum(row["sent"] for row in step)
    assert 4 * parameters <= sent == sum(row["received"] for row in step) < 4 * parameters * 1.1  # padded to lines
    purposes = {row["purpose"]: row for row in rows if row["collective"] == "all_reduce"}
    assert purposes["loss"]["calls"] == 1 and purposes["loss"]["sent"] == 24  # loss, targets, squares of the gradients
    assert purposes["validation"]["calls"] == 2 / STEPS
    assert all(row["largest"][word] >= row[word] for row in rows for word in ("calls", "steps", "sent", "received"))
    told = ended.out.index("communication per step, until now")
    assert ended.out.index("step    1/20") < told < ended.out.index("step    2/20")
    assert f"communication per step, mean of {STEPS} steps" in ended.out


def test_the_unigram_entropy_is_that_of_the_text(alone, text):
    said = float(alone[0].out.split("unigram entropy ")[1].split()[0])
    counts = np.bincount(np.frombuffer(text.read_bytes(), np.uint8))
    shares = counts[counts > 0] / counts.sum()
    assert math.isclose(said, -(shares * np.log(shares)).sum(), rel_tol=0.02)  # of the training part


def test_pictures_and_words(job):
    ended, run = job
    assert ElementTree.parse(run / "loss.svg").getroot().tag.endswith("svg")
    assert (run / "sample.txt").read_text().strip("\n")
    ranks = 2 if run.name == "two" else 1
    assert f"{ranks} rank" in ended.out and f"dp={ranks}" in ended.out
    assert "validation loss" in ended.out and "unigram entropy" in ended.out and "grad_norm" in ended.out
    assert str(run) in ended.out
    assert ended.err == ""
    assert ended.out.count("unigram entropy of the text") == ended.out.count("a sample of its text") == 1


# --- any number of ranks; eight: test_configs.py ----------------------------------------------------------------------


@needs_mpirun
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.micro_batch=24"]),
        (2, ["parallel.data_parallel=naive"]),
        (3, ["train.micro_batch=8"]),
    ],
)
def test_the_result_does_not_depend_on_the_ranks(alone, two, config, folder, ranks, overrides):
    name = f"same-{ranks}-{len(overrides)}-{overrides[0] if overrides else ''}".replace("=", "-")
    well("run", config, f"name={name}", *overrides, ranks=ranks)
    for key in ("loss", "grad_norm"):
        expected = [row[key] for row in metrics(alone[1])]
        np.testing.assert_allclose([row[key] for row in metrics(two[1])], expected, rtol=1e-10)
        np.testing.assert_allclose([row[key] for row in metrics(folder / "runs" / name)], expected, rtol=1e-10)
    validated = [[row["validation_loss"] for row in metrics(folder / "runs" / run)[9::10]] for run in ("alone", name)]
    np.testing.assert_allclose(validated[1], validated[0], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@needs_mpirun
def test_every_precision(alone, config, folder, dtype):
    tolerance = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}[dtype]
    well("run", config, f"name={dtype}", f"train.dtype={dtype}", "train.micro_batch=12", ranks=2)
    np.testing.assert_allclose(losses(folder / "runs" / dtype), losses(alone[1]), rtol=tolerance)


LLAMA = {"norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False, "kv_heads": 2}
BERT = {"kind": "bert", "layers": 1, "dim": 32, "heads": 4, "sequence": 16}


@needs_mpirun
@pytest.mark.parametrize(
    ("name", "sections", "first_loss"),
    [
        ("llama", {"model": {**LLAMA, "dropout": 0.2}, "train": {"recompute": True}}, math.log(256)),
        ("bert", {"model": BERT}, math.log(257)),
        ("mlp", MLP, math.log(10)),
    ],
)
def test_every_model(folder, text, name, sections: dict[str, Any], first_loss):
    if name == "mlp":
        pytest.importorskip("sklearn")
    sections = {**sections, "train": {"steps": 4, "micro_batch": 8, **sections.get("train", {})}}
    config = write_config(folder, text, name=name, **sections)
    well("run", config)
    well("run", config, f"name={name}-on-3", ranks=3)
    one, three = losses(folder / "runs" / name), losses(folder / "runs" / f"{name}-on-3")
    assert len(one) == 4 and abs(one[0] - first_loss) < 0.35
    np.testing.assert_allclose(three, one, rtol=1e-10)
