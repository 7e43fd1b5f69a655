"""A contestant in other processes: its turns, its mistakes, its end. A stand-in speaks for it; PyTorch where it is."""

import ast
import os
import stat
import sys
from pathlib import Path

import pytest

from dtrain.collectives import Communicator, run_threads
from dtrain.errors import UserError
from dtrain.launch import bench_collectives, bench_contest, bench_peer
from dtrain.launch.bench_collectives import Options, Outcome, measure
from dtrain.launch.bench_peer import Peer

# Rank r takes r + 1 ms for an all_reduce, and one element is wrong there on rank 1; other collectives it does not know.
STAND_IN = """\
import json, sys
def say(**content): print(json.dumps(content), flush=True)
place = json.loads(sys.stdin.readline())
if place["rank"] == 0: say(port=4711, torch="0.0")
else: assert place["port"] == 4711
say(ready=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["collective"] != "all_reduce": say(error="no such thing")
    wrong = place["rank"] == 1 and order["turn"] > 0
    if order["collective"] == "all_reduce":
        say(wrong=int(wrong), seconds=[0.001 * (place["rank"] + 1)] * order["iterations"])
"""


def interpreter(folder: Path, program: str) -> str:
    """An executable that ignores its arguments and runs the program."""
    (folder / "program.py").write_text(program)
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'program.py'}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def measured(comm: Communicator, python: str, options: Options) -> Outcome:
    peer = Peer(comm, python)
    try:
        return measure(comm, options, lambda text: None, peer)
    finally:
        peer.close()


def test_the_slowest_rank_counts_and_wrong_elements_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_contest, "BLOCKS", 2)
    python = interpreter(tmp_path, STAND_IN)
    options = Options(("all_reduce", "all_gather"), (4096,), ("auto",), iterations=4)
    for outcome in run_threads(3, measured, python, options):
        (row,) = [row for row in outcome.rows if row.algorithm == bench_peer.NAME]
        assert row.time == pytest.approx(3000) and row.iterations == 4 and row.placing == "in-place"
        assert row.wrong == 2  # one in each block
        assert outcome.notes == ["all_gather, gloo: no such thing"]


def test_its_number_of_iterations_follows_from_its_time(tmp_path):
    options = Options(("all_reduce",), (4096,), ("auto",))
    (row,) = [
        row
        for row in run_threads(2, measured, interpreter(tmp_path, STAND_IN), options)[0].rows
        if row.algorithm == "gloo"
    ]
    assert row.iterations == 5 * int(options.seconds / 5 / 0.002)


@pytest.mark.parametrize(
    ("program", "message"),
    [("import no_such_package", "No module named 'no_such_package'.*pip install"), ("", "ended without a word")],
)
def test_an_interpreter_without_pytorch_is_told_on_all_ranks(tmp_path, program, message):
    python = interpreter(tmp_path, program)

    def work(comm: Communicator) -> None:
        with pytest.raises(UserError, match=message):
            Peer(comm, python)

    run_threads(2, work)


def test_no_interpreter_at_all(tmp_path):
    def work(comm: Communicator) -> None:
        with pytest.raises(UserError, match=r"--peer torch: .*none cannot run PyTorch's Gloo: .*No such file"):
            Peer(comm, str(tmp_path / "none"))

    run_threads(2, work)


def test_a_peer_that_dies_on_the_way_does_not_hang(tmp_path):
    python = interpreter(tmp_path, STAND_IN.replace("order = json.loads(line)", "sys.exit('out of luck')"))

    def work(comm: Communicator) -> None:
        with pytest.raises(bench_peer.PeerError, match="out of luck"):
            measured(comm, python, Options(("all_reduce",), (4096,), ("auto",)))

    run_threads(2, work)


def test_it_imports_nothing_of_ours():
    source = (Path(bench_peer.__file__).parent / "peers" / "torch_collectives.py").read_text()
    names = [name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names]
    assert "torch" in [name.name for name in names] and "dtrain" not in source.replace("`dtrain", "").split()


def test_gloo_is_right(monkeypatch):
    python = os.environ.get("DTRAIN_TEST_TORCH_PYTHON")
    if not python:
        pytest.skip("DTRAIN_TEST_TORCH_PYTHON is not set: no interpreter with PyTorch")
    monkeypatch.setattr(bench_contest, "BLOCKS", 2)
    collectives = tuple(bench_collectives.COLLECTIVES)
    for op in ("sum", "max"):
        options = Options(collectives, (4096, 70_000), ("auto",), op=op, iterations=2)
        outcome = run_threads(3, measured, python, options)[0]
        rows = [row for row in outcome.rows if row.algorithm == bench_peer.NAME]
        assert {row.collective for row in rows} == set(collectives) - {"scan", "exscan"}, outcome.notes
        assert "scan, gloo: PyTorch has no scan" in outcome.notes
        assert [row for row in rows if row.wrong] == []
