"""The main job and the commands around it, as a user sees them: what is said and written, and whether it is true."""

import itertools
import json
import math
import os
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from dtrain.launch.main import cli
from tests.system import program
from tests.system.program import (
    MPIRUN,
    Ended,
    Process,
    dtrain,
    losses,
    metrics,
    on,
    results,
    wait_for,
    well,
    write_config,
)

pytestmark = [pytest.mark.timeout(600)]
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: neither the wheel's nor the system's")

STEPS, BATCH, SEQUENCE = 20, 24, 16  # of the small job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder: Path, text: Path) -> Path:
    return write_config(folder, text, train={"validate": {"every": 10, "batches": 2}})


@pytest.fixture(scope="module")
def alone(folder: Path, config: Path) -> tuple[Ended, Path]:
    """`dtrain run` without mpirun: what it said, and its folder."""
    return well("run", config, "name=alone"), folder / "runs" / "alone"


@pytest.fixture(scope="module")
def two(folder: Path, config: Path) -> tuple[Ended, Path]:
    """The same on two ranks, each gradient accumulated over four micro-batches (alone: over eight)."""
    return well("run", config, "name=two", ranks=2), folder / "runs" / "two"


@pytest.fixture(params=["alone", pytest.param("two", marks=needs_mpirun)])
def job(request: pytest.FixtureRequest) -> tuple[Ended, Path]:
    """Each of the two."""
    found: tuple[Ended, Path] = request.getfixturevalue(request.param)
    return found


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
    assert summary["layout"]["ranks"] == (2 if run.name == "two" else 1)
    assert summary["versions"]["numpy"] == np.__version__
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


# --- any number of ranks ----------------------------------------------------------------------------------------------


@needs_mpirun
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.micro_batch=24"]),
        (2, ["parallel.data_parallel=naive"]),
        (2, ["train.micro_batch=12"]),
        (3, ["train.micro_batch=8"]),
        (8, []),
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
MLP = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "images", "path": "digits", "validation": 0.2},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
}


@needs_mpirun
@pytest.mark.parametrize(
    ("name", "sections", "first_loss"),
    [
        ("llama", {"model": LLAMA}, math.log(256)),
        ("dropout", {"model": {"dropout": 0.2}, "train": {"recompute": True}}, math.log(256)),
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


# --- interruption and continuation ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(folder: Path, text: Path) -> tuple[Path, Path]:
    """A job long enough to be interrupted in its middle, and its folder when it was not."""
    train = {"steps": 60, "global_batch": 12, "micro_batch": 2, "validate": {"every": 20, "batches": 1}}
    config = write_config(folder, text, name="long", train=train, model={"dropout": 0.1}, checkpoint={"every": 10})
    return config, folder / "runs" / "long"


def interrupted(config: Path, run: Path, ranks: int, number: int) -> None:
    """Start the job and end it by a signal, sent to all its processes, once a checkpoint is there."""
    for _ in range(5):
        shutil.rmtree(run, ignore_errors=True)
        job = Process(on(ranks, "dtrain", "run", config, f"name={run.name}"))
        # the launcher has given its ranks groups of their own; SIGKILL must reach them all the same: they lose MPI
        wait_for(lambda job=job: (run / "checkpoints" / "step_00000010").exists() or job.poll() is not None)
        os.killpg(job.pid, number)
        assert job.finish().code != 0 or (run / "summary.json").exists()
        wait_for(lambda: not alive(run.name), what=f"the end of all ranks of {run.name}")
        if not (run / "summary.json").exists():
            return
    pytest.fail("the job was faster than the signal, five times")


def alive(name: str) -> bool:
    return bool(program.processes(f"name={name}"))


@pytest.mark.parametrize(
    ("ranks", "number"),
    [(0, signal.SIGTERM), pytest.param(2, signal.SIGKILL, marks=needs_mpirun)],
)
def test_a_resumed_run_is_the_whole_run(long, folder, ranks, number):
    config, _ = long
    whole, run = folder / "runs" / f"whole-{ranks}", folder / "runs" / f"interrupted-{ranks}"
    well("run", config, f"name={whole.name}", ranks=ranks)
    interrupted(config, run, ranks, number)
    before = len(metrics(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 59, "lo')  # killed while writing
    shutil.copytree(run, folder / "runs" / f"elsewhere-{ranks}")

    ended = well("run", config, f"name={run.name}", ranks=ranks)
    assert before < 60 and "resumed from" in ended.out
    assert results(run) == results(whole)  # the same bits
    assert "0 different" in well("checkpoint", "diff", run, whole).out

    other = folder / "runs" / f"elsewhere-{ranks}"  # on another number of ranks
    others = {0: 2 if MPIRUN else 0, 2: 3}[ranks]
    assert "resumed from" in well("run", config, f"name={other.name}", ranks=others).out
    assert [row["step"] for row in metrics(other)] == list(range(1, 61))
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-9)


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_a_finished_run_is_left_alone(alone, config, folder, ranks):
    run = folder / "runs" / f"again-{ranks}"
    shutil.copytree(alone[1], run)
    well("run", config, f"name={run.name}")  # now its config.yaml has the name
    before = snapshot(run)
    ended = well("run", config, f"name={run.name}", ranks=ranks)
    assert "finished already" in ended.out and "20 of 20" in ended.out
    assert "first step" not in ended.out and "loss curve" not in ended.out
    after = snapshot(run)
    assert set(after) == set(before)
    assert [name for name in after if after[name] != before[name]] == []


def test_never_resume_protects_what_is_there(alone, config):
    before = snapshot(alone[1])
    ended = dtrain("run", config, "name=alone", "checkpoint.resume=never")
    assert ended.code == 2
    assert "checkpoint.resume" in ended.err and ended.err.count("\n") == 1
    assert snapshot(alone[1]) == before


def test_old_checkpoints_go(config, folder):
    well("run", config, "name=keep", "checkpoint.every=5", "checkpoint.keep=2")
    kept = sorted(path.name for path in (folder / "runs" / "keep" / "checkpoints").iterdir())
    assert kept == ["step_00000015", "step_00000020"]


# --- the other commands -----------------------------------------------------------------------------------------------


def test_sample(alone):
    first = well("sample", alone[1], "--prompt", "def ", "--tokens", "30")
    assert first.out.startswith("def ")
    assert len(first.out.encode(errors="replace")) > 20
    assert well("sample", alone[1], "--prompt", "def ", "--tokens", "30").out == first.out
    assert well("sample", alone[1], "--prompt", "def ", "--tokens", "30", "--seed", "1").out != first.out
    likeliest = [
        well("sample", alone[1], "--prompt", "def ", "--temperature", "0", "--seed", str(seed)).out for seed in range(2)
    ]
    assert likeliest[0] == likeliest[1]


@needs_mpirun
@pytest.mark.parametrize(
    "command", [["sample", "RUN"], ["show", "config", "RUN/config.yaml"], ["checkpoint", "verify", "RUN"]]
)
def test_what_one_process_does_is_said_once_under_mpirun(alone, command):
    arguments = [word.replace("RUN", str(alone[1])) for word in command]
    assert well(*arguments, ranks=2).out == well(*arguments).out


def test_checkpoint_commands(alone, tmp_path):
    _, run = alone
    listed = well("checkpoint", "ls", run).out
    assert listed.count("complete") == 2
    assert "all checksums right" in well("checkpoint", "verify", run).out
    assert "0 different" in well("checkpoint", "diff", run, run / "checkpoints" / "step_00000020").out
    differing = dtrain(
        "checkpoint", "diff", run / "checkpoints" / "step_00000010", run / "checkpoints" / "step_00000020"
    )
    assert differing.code == 1 and "embedding.weight" in differing.out

    safetensors = pytest.importorskip("safetensors.numpy")
    well("checkpoint", "export", run, tmp_path / "out")
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")

    summary = json.loads((run / "summary.json").read_text())
    assert sum(tensor.size for tensor in tensors.values()) == summary["parameters"]
    assert tensors["embedding.weight"].shape == (256, 32)


def test_a_damaged_checkpoint_is_told_and_passed_over(alone, config, folder):
    run = folder / "runs" / "damaged"
    shutil.copytree(alone[1], run)
    shard = next((run / "checkpoints" / "step_00000020").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 255
    shard.write_bytes(content)
    verified = dtrain("checkpoint", "verify", run / "checkpoints" / "step_00000020")
    assert verified.code == 2 and verified.err.count("\n") == 1 and shard.name in verified.err
    shard.unlink()  # half a checkpoint
    assert "damaged" in well("checkpoint", "ls", run).out
    ended = well("run", config, "name=damaged")
    assert "step_00000010" in ended.out.split("first step")[0]
    assert results(run) == results(alone[1])


@pytest.mark.parametrize("kind", ["gpt", "mlp"])
def test_show_graph(config, folder, text, tmp_path, kind):
    if kind == "mlp":
        pytest.importorskip("sklearn")
        config = write_config(folder, text, name="graph", **MLP)
    well("show", "graph", config, "--output", tmp_path / "graph.svg")
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    words = " ".join(root.itertext())
    assert root.tag.endswith("svg")
    for word in ["cross_entropy", "linear"] + (["attention", "256"] if kind == "gpt" else ["16"]):
        assert word in words
    assert "FLOP" in words and "B" in words


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_doctor(ranks):
    ended = dtrain("doctor", ranks=ranks)
    assert ended.code in (0, 1) and ended.err == ""
    for word in ("MPI", "cores", "BLAS", "kernels", "cache"):
        assert ended.out.count(f" {word} ") >= 1
    assert (" bad " in ended.out or "fail" in ended.out) == (ended.code == 1)


def test_help_is_complete():
    """Every command, every argument and every option is explained: the program's first page, and all that follow."""
    first = well("--help").out
    todo: list[list[str]] = [[]]
    seen = []
    while todo:
        command = todo.pop()
        shown = CliRunner().invoke(cli, [*command, "--help"], prog_name="dtrain", terminal_width=110)
        assert shown.exit_code == 0, shown.output
        out = shown.output
        assert command or out.split() == first.split()
        seen.append(" ".join(command))
        usage, _, rest = out.partition("\n\n")
        assert usage.startswith("Usage: dtrain")
        explained, _, options = rest.partition("Options:\n")
        assert explained.strip(), command
        options, _, commands = options.partition("Commands:\n")
        for line, following in itertools.pairwise([*options.splitlines(), ""]):
            if line.startswith("  -"):
                assert len(line.split("  ")) > 2 or following.startswith("      "), f"{command}: {line}"
        for line in commands.splitlines():
            if line.strip() and not line.startswith("    "):
                name, _, what = line.strip().partition("  ")
                assert what.strip(), line
                todo.append([*command, name])
    assert {"", "run", "sample", "show config", "show graph", "doctor", "bench step", "checkpoint export"} <= {*seen}


@needs_mpirun
def test_bench_step(config, tmp_path):
    ended = well("bench", "step", config, "--ranks", "1,2", "--steps", "2", "--rounds", "1", "--json", tmp_path / "b")

    assert "tokens/s" in ended.out and "first step" in ended.out and "matmuls" in ended.out
    assert json.loads((tmp_path / "b").read_text())
