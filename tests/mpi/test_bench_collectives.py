"""`dtrain bench COLLECTIVE` on any number of ranks: nothing is wrong, and what is wrong is counted."""

import time
from pathlib import Path

import numpy as np
import pytest

from dtrain.collectives import Array, Communicator, algorithms
from dtrain.collectives.algorithms import Algorithm, Call
from dtrain.launch import bench_contest, bench_memory, bench_p2p, bench_report, bench_table
from dtrain.launch.bench_collectives import Options, measure
from dtrain.launch.bench_table import COLLECTIVES, IN_PLACE, OUT_OF_PLACE, Row

BLOCKS = 2


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ranks on few cores take their time: fewer turns for each algorithm."""
    monkeypatch.setattr(bench_contest, "BLOCKS", BLOCKS)
    monkeypatch.setattr(bench_p2p, "BLOCKS", BLOCKS)


def rows_of(comm: Communicator, options: Options) -> list[Row]:
    return measure(comm, options, lambda text: None).rows


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_algorithm_is_right(comm: Communicator, collective: str) -> None:
    rows = rows_of(comm, Options((collective,), (8, 20_000), ("all",), iterations=1))
    assert [row for row in rows if row.wrong] == []
    assert all(row.time > 0 and row.iterations == BLOCKS for row in rows)
    placings = {OUT_OF_PLACE, IN_PLACE} if collective != "barrier" else {OUT_OF_PLACE}
    assert {row.placing for row in rows if row.algorithm == "auto"} == placings
    if comm.size > 1:
        assert {row.placing for row in rows if row.algorithm == "bare"} >= {OUT_OF_PLACE}
    if comm.node is not None and collective == "all_reduce":
        assert {row.placing for row in rows if row.algorithm == "window"} == {IN_PLACE}
        assert {row.placing for row in rows if row.algorithm == "shared"} == {OUT_OF_PLACE}


@pytest.mark.parametrize(("dtype", "op"), [("bfloat16", "sum"), ("int8", "prod"), ("float64", "max"), ("uint8", "min")])
def test_dtypes_and_operations(comm: Communicator, dtype: str, op: str) -> None:
    other = ["exchange"] if comm.size > 1 else []
    rows = rows_of(comm, Options(tuple(COLLECTIVES), (600,), ("auto", *other), dtype, op, iterations=1, warmup=2))
    assert [row for row in rows if row.wrong] == []
    assert {row.op for row in rows} == {op, ""}


@pytest.mark.parametrize("private", [False, True])
def test_cold_and_private_arrays(comm: Communicator, private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "last_level_cache", lambda: 200_000)
    names = ("all_reduce", "all_gather", "scatter")
    rows = rows_of(comm, Options(names, (4096,), iterations=1, private=private, cold=True))
    assert [row for row in rows if row.wrong] == [] and len(rows) >= 2 * len(names)


def _broken(call: Call) -> None:
    call.transport.all_reduce(call.source, call.target, call.op)
    if call.transport.rank == call.transport.size - 1:
        call.target[-1] += 1


def _idle(call: Call) -> None:
    pass


def _late(call: Call) -> None:
    call.transport.all_reduce(call.source, call.target, call.op)
    if call.transport.rank == call.transport.size - 1:
        time.sleep(0.02)


def test_wrong_algorithms_are_counted(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    if comm.size == 1:
        pytest.skip("one rank has no algorithms")
    for name, run in (("broken", _broken), ("idle", _idle)):
        monkeypatch.setitem(algorithms.ALL_REDUCE, name, Algorithm(run, lambda call: True, lambda call: False))
    rows = rows_of(comm, Options(("all_reduce",), (40_000,), ("broken", "idle", "native"), iterations=5))
    wrong = {(row.algorithm, row.placing): row.wrong for row in rows}
    assert wrong["broken", IN_PLACE] == wrong["broken", OUT_OF_PLACE] == BLOCKS  # one element of one rank in each check
    assert wrong["native", IN_PLACE] == wrong["native", OUT_OF_PLACE] == 0
    every = BLOCKS * comm.size * 40_000 // 4
    # What others left in the result a moment ago is wrong too, but for the few numbers that happen to be equal.
    assert wrong["idle", OUT_OF_PLACE] > 0.5 * every and wrong["idle", IN_PLACE] > 0.5 * every


def test_the_slowest_rank_counts(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    if comm.size == 1:
        pytest.skip("one rank has no algorithms")
    monkeypatch.setitem(algorithms.ALL_REDUCE, "late", Algorithm(_late, lambda call: True, lambda call: False))
    for row in rows_of(comm, Options(("all_reduce",), (4000,), ("late",), iterations=5)):
        assert row.p10 > 20_000 and row.wrong == 0


def test_all_ranks_return_the_same(comm: Communicator) -> None:
    rows = rows_of(comm, Options(("all_gather",), (4000, 70_000), seconds=0.01))  # the number of iterations is measured
    mine = bench_table.as_csv(rows)
    assert comm.all_gather_object(mine) == [mine] * comm.size
    assert all((row.bound is None) == (row.size < 65536 or comm.local_size < comm.size) for row in rows)


def test_links(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options((), (1024, 100_000), iterations=5)
    links = bench_p2p.measure(comm, options, lambda text: None)
    names = [link.name for link in links]
    assert ("other-node" in names) == (comm.local_size < comm.size)
    assert bool({"same-core", "same-cache", "same-socket", "same-node"} & set(names)) == (comm.local_size > 1)
    for link in links:
        assert [row.size for row in link.rows] == [8, 8, 1024, 1024, 100_000, 100_000]
        assert all(row.wrong == 0 and row.time > 0 for row in link.rows)
        assert np.isfinite([link.fit()[way]["alpha_us"] for way in ("one-way", "both-ways")]).all()

    receive = comm.recv

    def damaged(out: Array, source: int, tag: int = 0) -> Array:
        receive(out, source, tag)
        out[0] += 1
        return out

    monkeypatch.setattr(comm, "recv", damaged)
    for link in bench_p2p.measure(comm, options, lambda text: None):
        assert {row.wrong for row in link.rows} == {2 * BLOCKS}


def test_rank_0_prints_and_writes(comm: Communicator, tmp_path: Path) -> None:
    if comm.transport.name != "mpi":
        pytest.skip("the command measures the ranks of mpirun")
    lines: list[str] = []
    options = Options(("all_reduce", "barrier"), (4000,), iterations=5)
    paths = [tmp_path / name for name in ("new.json", "new.csv", "new.svg")]
    result = bench_report.bench(options, True, *paths, tell=lines.append)
    assert result["wrong"] == 0 and result["header"]["ranks"] == comm.size
    if comm.rank == 0:
        old = bench_table.read(paths[0])
        assert old["rows"] == result["rows"] and old["config"]["ranks"] == comm.size
        assert lines[0].startswith("# dtrain") and paths[1].exists() and paths[2].exists()
    else:
        assert lines == [] and not any(path.exists() for path in paths)
