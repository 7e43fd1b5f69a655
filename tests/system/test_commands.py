"""The commands around a run: sample, checkpoint, show, doctor, bench; and that all of them are explained."""

import itertools
import json
import xml.etree.ElementTree as ElementTree

import pytest
from click.testing import CliRunner

from dtrain.launch.main import cli
from tests.system.program import (
    MLP,
    dtrain,
    needs_mpirun,
    well,
    write_config,
)

pytestmark = [pytest.mark.timeout(600)]


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
                assert what.strip() and not what.endswith("..."), line
                todo.append([*command, name])
    assert {"", "run", "sample", "show config", "show graph", "doctor", "bench step", "checkpoint export"} <= {*seen}


@needs_mpirun
def test_bench_step(config, tmp_path):
    ended = well("bench", "step", config, "--ranks", "1,2", "--steps", "2", "--rounds", "1", "--json", tmp_path / "b")

    assert "tokens/s" in ended.out and "first step" in ended.out and "matmuls" in ended.out
    assert json.loads((tmp_path / "b").read_text())
