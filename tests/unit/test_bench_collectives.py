"""`dtrain bench COLLECTIVE`: data that shows what is wrong, the measuring itself between threads, and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.collectives.dtypes import accumulator
from dtrain.collectives.schedules.catalogue import ALGORITHMS
from dtrain.errors import UserError
from dtrain.launch import bench_cases, bench_collectives, bench_memory, bench_p2p, bench_report
from dtrain.launch.bench_cases import PERIOD, Pattern
from dtrain.launch.bench_collectives import Options
from dtrain.launch.bench_table import COLLECTIVES


@pytest.mark.parametrize("op", ["sum", "prod", "max", "min"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int8", "uint64"])
def test_totals_are_exact_in_any_order(op, name):
    dtype, size, turn = bench_collectives.dtype_of(name), 9, 3
    pattern = Pattern(dtype, op, size)
    arrays = [np.empty(2 * PERIOD + 17, dtype) for _ in range(size)]
    for rank, array in enumerate(arrays):
        bench_cases.fill(array, pattern.period(rank, turn))
    rows = np.stack([array.astype(accumulator(dtype)) for array in arrays])
    ufunc = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}[op]
    with np.errstate(all="ignore"):
        backwards = ufunc.reduce(rows[::-1], axis=0).astype(dtype)
    assert bench_cases.count_wrong(backwards, pattern.total(turn)) == 0
    assert bench_cases.count_wrong(backwards[5:], pattern.total(turn, 5)) == 0
    backwards[[0, PERIOD, 2 * PERIOD + 16]] += np.ones(3, dtype)
    assert bench_cases.count_wrong(backwards, pattern.total(turn)) == 3


def test_other_ranks_turns_and_displacements_are_wrong():
    pattern = Pattern(np.dtype(np.float32), "", 4)
    array = np.empty(1000, np.float32)
    bench_cases.fill(array, pattern.period(1, 1))
    assert bench_cases.count_wrong(array, pattern.period(1, 1)) == 0
    for other in (pattern.period(2, 1), pattern.period(1, 2), pattern.period(1, 1, 1)):
        assert bench_cases.count_wrong(array, other) > 900


def test_all_collectives_between_threads():
    """Any transport will do: here one without shared memory."""
    options = Options(tuple(COLLECTIVES), (64, 20000), ("all",), iterations=5, latency=True)

    def work(comm):
        lines = []
        outcome = bench_collectives.measure(comm, options, lines.append)
        links = bench_p2p.measure(comm, options, lines.append)
        return outcome.rows + links[0].rows, outcome.notes, lines

    for rows, notes, lines in run_threads(3, work):
        assert {row.collective for row in rows} == {*COLLECTIVES, "p2p"}
        assert sum(row.wrong for row in rows) == 0 and {row.size for row in rows} == {0, 8, 60, 64, 19992, 20000}
        ran = {row.algorithm for row in rows if row.collective == "all_reduce"}
        assert ran >= {"auto", "native", "exchange", "bare", *ALGORITHMS["all_reduce"]} and "staged" not in ran
        assert any(note.startswith("all_reduce, window: ") for note in notes)
        assert len([line for line in lines if not line.startswith("#")]) > 40
        start = lines.index("# scan, chain, in-place")
        assert lines[start + 1].split()[1:6] == ["Size", "Avg", "Latency(us)", "Min", "Latency(us)"]
        size, *latencies, iterations = map(float, lines[start + 2].split())
        assert size == 60 and iterations == 5 and latencies[1] <= latencies[0] <= latencies[2]


def test_cold_arrays_are_apart_and_more_than_twice_the_cache(monkeypatch):
    monkeypatch.setattr(bench_memory, "last_level_cache", lambda: 100_000)
    memory = bench_memory.Memory(single(), 1000, np.dtype(np.float32), cold=True, private=True)
    slots = memory.slots(250)
    starts = [source.ctypes.data for source, _ in slots]
    assert min(np.diff(starts)) >= 1000 and max(starts) - min(starts) > 150_000 and len(slots) >= 49
    assert len({source.ctypes.data for source, _ in memory.slots(10)} & set(starts)) == len(starts)
    assert len(bench_memory.Memory(single(), 1000, np.dtype(np.int8), False, True).slots(250)) == 1


def test_what_does_not_fit_is_refused_before_it_is_touched():
    with pytest.raises(UserError, match="take smaller ones"):
        bench_collectives.check(single(), Options(("all_reduce",), (1 << 45,)))


def test_algorithms_that_do_not_exist_are_told_with_those_that_do():
    def work(comm):
        with pytest.raises(UserError, match=r"not an algorithm of broadcast on 2 ranks; allowed: all, auto, .*native"):
            bench_collectives.check(comm, Options(("broadcast",), (8,), ("native", "warp")))
        bench_collectives.check(comm, Options(("broadcast", "all_reduce"), (8,), ("window",)))

    run_threads(2, work)


def test_warnings():
    header = {"crowded": True, "ranks": 8, "cores": 2, "cma": "a filter", "mpi": "MPICH 5, thread level multiple"}
    told = list(bench_report.warnings(header))
    assert len(told) == 3 and "8 ranks on 2 cores" in told[0] and "a filter: " in told[1]
    assert not list(bench_report.warnings(header | {"crowded": False, "cma": "", "mpi": "Open MPI"}))
    assert ["one rank: nothing" in text for text in bench_report.warnings(header | {"ranks": 1})] == [True]
    assert bench_report.cma() in ("", "process_vm_readv is refused") or "ptrace_scope" in bench_report.cma()


def command(*arguments):
    program = [sys.executable, "-m", "dtrain.launch", "bench", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)


def test_the_command_prints_and_writes(tmp_path):
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.svg")]
    asked = ["all_reduce", "--sizes", "1K:64K", "--iterations", 5, "--dtype", "int32", "--in-place"]
    done = command(*asked, "--json", files[0], "--csv", files[1], "--plot", files[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert "Wrong values: 0 OK" in done.stdout and sorted(tmp_path.iterdir()) == sorted(files)
    assert json.loads(files[0].read_text())["config"]["sizes"] == [1024, 4096, 16384, 65536]
    again = command(*asked, "--compare", files[0])
    assert "median of 4 ratios" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["all_reduce", "--sizes", "1Q"], "--sizes 1Q: '1Q' is no size"),
        (
            ["all_reduce", "--algorithms", "warp"],
            "--algorithms warp: not an algorithm of all_reduce on 1 rank; allowed: all, auto",
        ),
        (["reduce", "--op", "mean"], "'mean' is not one of"),
        (["broadcast", "--op", "sum"], "No such option"),
        (["p2p", "--compare", "/nowhere.json"], "--compare /nowhere.json: cannot be read"),
        (["barrier", "--json", "/nowhere/a.json"], "/nowhere/a.json: cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_message(arguments, told):
    done = command(*arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
