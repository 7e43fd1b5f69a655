"""What stands in examples/ and the README works as it stands there, with less of everything."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.system.program import MPIRUN, ROOT, Process, dtrain, on

pytestmark = [pytest.mark.timeout(300)]

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STARTED = ("ddp_in_python",)  # as a program by the tests of its own, tests/examples
TRANSFORMER = ["model.layers=1", "model.dim=32", "model.heads=4", "model.sequence=16", "sample.tokens=5"]
LESS = ["train.steps=2", "log.every=1"]


def less(config: Path) -> list[str]:
    """Overrides that make a job small."""
    return LESS + ([] if "mlp" in config.name else TRANSFORMER)


def test_docstrings_tell_how_to_run_the_examples():
    for example in EXAMPLES:
        assert any(f"examples/{example.name}" in line for line in example.read_text().splitlines()[:5]), example


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.stem not in STARTED], ids=lambda path: path.name)
def test_examples(example, tmp_path):
    ended = Process(on(0, sys.executable, "-W", "error", example), cwd=tmp_path).finish()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out


def commands() -> list[str]:
    """Commands of the README: the indented lines that start our program."""
    lines = [line.partition("  #")[0].rstrip() for line in (ROOT / "README.md").read_text().splitlines()]
    return [line.strip() for line in lines if line.startswith(("    mpirun", "    dtrain"))]


def test_the_readme_has_commands():
    assert len(commands()) >= 4 and any(" run " in command for command in commands())


@pytest.mark.parametrize("command", commands())
def test_readme(command, tmp_path):
    words = shlex.split(command)
    ranks = 0
    if words[0] == "mpirun":
        assert words[1] == "-n"
        ranks, words = min(int(words[2]), 2) if MPIRUN else 0, words[3:]
    assert words[0] == "dtrain"
    if "run" in words:
        config = ROOT / words[words.index("run") + 1]
        if "digits" in config.name:
            pytest.importorskip("sklearn")
        words += [*less(config), f"output={tmp_path}"]
    ended = dtrain(*words[1:], ranks=ranks)
    assert ended.code in ((0, 1) if "doctor" in words else (0,)), ended.out + ended.err
