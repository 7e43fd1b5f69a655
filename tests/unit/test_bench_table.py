"""`dtrain bench COLLECTIVE`: formulas against numbers worked out by hand, sizes, table, files, comparison, picture."""

import csv
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.collectives.dtypes import accumulator
from dtrain.collectives.schedules.catalogue import ALGORITHMS
from dtrain.errors import UserError
from dtrain.launch import bench_cases, bench_collectives, bench_memory, bench_p2p, bench_plot, bench_report, bench_table
from dtrain.launch.bench_cases import PERIOD, Pattern
from dtrain.launch.bench_collectives import Options
from dtrain.launch.bench_table import BOTH_WAYS, COLLECTIVES, IN_PLACE, ONE_WAY, OUT_OF_PLACE, Row, parse_sizes


def row(time=10.0, size=1 << 20, algorithm="auto", placing=IN_PLACE, **more):
    what = {"collective": "all_reduce", "count": size // 4, "dtype": "float32", "op": "sum", "p10": 9.0, "p90": 11.0}
    what |= {"iterations": 20, "algbw": 1.0, "busbw": 1.5, "wrong": 0}
    return Row(size=size, time=time, algorithm=algorithm, placing=placing, **(what | more))


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "bus_of_4", "bus_of_8"),
    [  # doc/PERFORMANCE.md of nccl-tests
        ("all_reduce", 1.5, 1.75),
        ("reduce_scatter", 0.75, 0.875),
        ("all_gather", 0.75, 0.875),
        ("all_to_all", 0.75, 0.875),
        ("gather", 0.75, 0.875),
        ("scatter", 0.75, 0.875),
        ("broadcast", 1, 1),
        ("reduce", 1, 1),
    ],
)
def test_bus_factors_are_those_of_nccl_tests(collective, bus_of_4, bus_of_8):
    assert COLLECTIVES[collective].bus(4) == bus_of_4
    assert COLLECTIVES[collective].bus(8) == bus_of_8


@pytest.mark.parametrize(
    ("collective", "out", "inside"),
    [  # 4 ranks; counted on paper: arrays (or blocks / 4) read + written
        ("all_reduce", 4 + 4, 4 + 4),
        ("reduce_scatter", 4 + 1, 4 + 1),
        ("all_gather", 1 + 4, 1 + 3),
        ("all_to_all", 4 + 4, 3 + 3),
        ("broadcast", 1 + 4, 1 + 3),
        ("reduce", 4 + 1, 4 + 1),
        ("gather", 1 + 1, 0.75 + 0.75),
        ("scatter", 1 + 1, 0.75 + 0.75),
    ],
)
def test_memory_traffic(collective, out, inside):
    assert bench_table.traffic(collective, "auto", OUT_OF_PLACE, 4) == out
    assert bench_table.traffic(collective, "auto", IN_PLACE, 4) == inside


def test_a_row_worked_out_by_hand():
    # 8 MB in 2 ms on 4 ranks are 4 GB/s, on the bus 6; memory of 64 GB/s moves 2 * 4 * 8 MB in 1 ms.
    one = bench_table.row(
        "all_reduce", (8_000_000, 2_000_000, "float32", "sum"), "window", IN_PLACE, [1e-3, 2e-3, 9e-3], 3, 4, 64e9
    )
    assert one.time == pytest.approx(2000) and one.iterations == 3 and one.wrong == 3
    assert one.algbw == pytest.approx(4.0) and one.busbw == pytest.approx(6.0)
    assert one.bound == pytest.approx(1000)
    assert one.p10 == pytest.approx(1200) and one.p90 == pytest.approx(7600)
    shared = bench_table.row("all_reduce", (8_000_000, 1, "float32", "sum"), "shared", OUT_OF_PLACE, [1], 0, 4, 64e9)
    assert shared.bound == pytest.approx(625)  # 5 * 8 MB instead of 8 * 8
    small = bench_table.row("all_reduce", (1024, 256, "float32", "sum"), "window", IN_PLACE, [1], 0, 4, 64e9)
    assert small.bound is None


def test_both_ways_carry_twice():
    one, both = (
        bench_table.row("p2p", (1000, 250, "float32", ""), "same-node", way, [1e-6], 0, 2)
        for way in (ONE_WAY, BOTH_WAYS)
    )
    assert one.busbw == pytest.approx(1.0) and both.busbw == pytest.approx(2.0) and both.algbw == pytest.approx(1.0)


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).lognormal(size=37).tolist()
    for part in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert bench_table.percentile(values, part) == pytest.approx(np.quantile(values, part))
    assert bench_table.percentile([3.0], 0.9) == 3.0


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "factor", "sizes"),
    [
        ("1K:16K", 2, (1024, 2048, 4096, 8192, 16384)),
        ("1K:20K", 4, (1024, 4096, 16384)),
        ("8", 2, (8,)),
        ("64k,1M,4KiB", 2, (4096, 65536, 1 << 20)),
        ("1K:4K,1M,2K", 2, (1024, 2048, 4096, 1 << 20)),
        ("0.5K:1KB", 2, (512, 1024)),
        ("1G", 2, (1 << 30,)),
        ("1M:3M", 1.5, (1 << 20, 1572864, 2359296)),
    ],
)
def test_sizes(text, factor, sizes):
    assert parse_sizes(text, factor) == sizes


@pytest.mark.parametrize("text", ["", "1K:", "abc", "1X", "0", "-4", "4M:1M", "1.5", "nan", "inf", "9999999G"])
def test_sizes_that_are_none_are_told(text):
    with pytest.raises(UserError, match=r"--sizes"):
        parse_sizes(text, 2)


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, math.nan])
def test_a_factor_that_never_ends_is_told(factor):
    with pytest.raises(UserError, match="--factor"):
        parse_sizes("1K:1M", factor)


# --- table ------------------------------------------------------------------------------------------------------------


def test_every_value_stands_under_its_title():
    titles = bench_table.titles((OUT_OF_PLACE, IN_PLACE))
    line = bench_table.line([None, row(time=12.5, bound=5.0, wrong=7)], native=50.0)
    assert {len(text) for text in [*titles, line]} == {len(line)}
    ends = {}
    for found in re.finditer(r"[a-z#][a-z0-9]+", titles[1]):
        ends.setdefault(found.group(), []).append(found.end())
    cells = {word: [line[:end].split()[-1] for end in places] for word, places in ends.items()}
    assert cells["time"] == ["-", "12.50"] and cells["#wrong"] == ["-", "7"]
    assert cells["bound"] == ["-", "40%"] and cells["native"] == ["-", "4.00x"]
    assert cells["size"] == ["1048576"] and cells["algorithm"] == ["auto"] and cells["busbw"] == ["-", "1.50"]


def test_native_is_the_fastest_call_of_the_library():
    rows = [row(5.0, algorithm="native"), row(3.0, algorithm="native", placing=OUT_OF_PLACE), row(1.0)]
    assert bench_table.native_time(rows) == 3.0
    assert bench_table.native_time([*rows, row(4.0, algorithm="bare")]) == 3.0
    assert bench_table.native_time([*rows, row(2.0, algorithm="bare")]) == 2.0
    assert bench_table.native_time([row(1.0)]) is None


def test_the_footer_counts_wrong_values():
    assert bench_table.footer([row(), row()]) == ["# Wrong values: 0 OK", "# Average bus bandwidth: 1.500 GB/s"]
    assert bench_table.footer([row(wrong=2), row(wrong=1)])[0] == "# Wrong values: 3 WRONG"
    assert bench_table.footer([])[1].endswith("0.000 GB/s")


# --- files and comparison ---------------------------------------------------------------------------------------------


def result(*rows, ranks=2, mpi="MPICH 5"):
    config = {"ranks": ranks, "memory": "window", "cold": False}
    header = {"mpi": mpi, "processor": "p", "cores": 2, "ranks": ranks}
    return {"config": config, "header": header, "rows": list(rows)}


def test_json_comes_back_and_csv_has_every_field(tmp_path):
    rows = [row(), row(2.0, bound=1.0)]
    path = tmp_path / "old.json"
    path.write_text(bench_table.as_json(result(*rows)))
    assert bench_table.read(path) == result(*rows)
    table = list(csv.DictReader(bench_table.as_csv(rows).splitlines()))
    assert [float(line["time"]) for line in table] == [10.0, 2.0]
    assert [line["bound"] for line in table] == ["", "1.0"]
    assert set(table[0]) == set(json.loads(path.read_text())["rows"][0])


def test_compare_takes_rows_that_both_have():
    old = result(row(30.0), row(8.0, size=1024), row(1.0, algorithm="native"))
    new = result(row(10.0), row(16.0, size=1024), row(1.0, placing=OUT_OF_PLACE))
    lines = bench_table.compare(old, new)
    assert [line.split()[-1] for line in lines if not line.startswith("#")] == ["3.00x", "0.50x"]
    assert lines[-1] == "# median of 2 ratios: 1.75x; lowest 0.50x"
    assert not any("then" in line for line in lines)


def test_compare_tells_other_conditions():
    lines = bench_table.compare(result(row(), ranks=4, mpi="Open MPI"), result(row(size=8)))
    assert lines[0] == "# NOT the same conditions: ranks 4 then, 2 now"
    assert lines[1] == "# mpi: Open MPI then, MPICH 5 now"
    assert lines[-1] == "# no row is in both"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"size": 1}]}', '{"rows": []}', "\x00"])
def test_files_that_are_no_results_are_told(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UserError, match="--json wrote"):
        bench_table.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        bench_table.read(tmp_path / "none.json")


def test_the_picture_is_xml_with_a_curve_per_algorithm_and_placing():
    rows = [
        row(2.0**k, 1 << k, name, placing) for k in (10, 16, 20) for name in "ab" for placing in (IN_PLACE, ONE_WAY)
    ]
    rows += [row(8.0, 1 << 20, bound=4.0), row(8.0, 1 << 20, "shared", bound=2.0), row(collective="reduce")]
    rows += [row(1.0, 0, collective="barrier")]
    root = ElementTree.fromstring(bench_plot.svg(result(*rows, mpi="<MPI & co>")))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a, in-place", "b, one-way", "memory limit", "memory limit, shared", "reduce", "64K"} <= set(texts)
    assert "barrier" not in texts
    assert ElementTree.fromstring(bench_plot.svg(result())) is not None


def test_the_legend_of_many_algorithms_is_within_the_picture():
    names = [f"an algorithm of a long name {k}" for k in range(20)]
    rows = [row(2.0, 1 << 10, name, placing, collective="reduce") for name in names for placing in (IN_PLACE, ONE_WAY)]
    root = ElementTree.fromstring(bench_plot.svg(result(*rows, row(3.0, 1 << 10))))
    texts = [(each.text, float(each.get("y", 0))) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    lowest = max(y for text, y in texts if text and text.startswith("an algorithm"))
    assert lowest < next(y for text, y in texts if text == "all_reduce") < float(root.get("height"))
    assert float(root.get("width")) > 1000


# --- data -------------------------------------------------------------------------------------------------------------


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


# --- links and measuring ----------------------------------------------------------------------------------------------


def test_the_fit_finds_alpha_and_beta():
    sizes = [8, 1024, 65536, 1 << 24]
    alpha, beta, error = bench_p2p.fit(sizes, [2.0 + 0.001 * size for size in sizes])
    assert alpha == pytest.approx(2.0) and beta == pytest.approx(0.001) and error < 1e-9


def test_a_pair_for_each_class_of_links():
    def pairs(nodes):
        return {link.name: link.pair for link in bench_p2p.links([("", "", "", str(node)) for node in nodes])}

    assert pairs([0]) == {}
    assert pairs([0, 0, 0]) == {"same-node": (0, 1)}
    assert pairs([0, 1]) == {"other-node": (0, 1)}
    assert pairs([0, 1, 1, 0]) == {"same-node": (0, 3), "other-node": (0, 1)}


def test_all_collectives_between_threads():
    """Any transport will do: here one without shared memory."""
    options = Options(tuple(COLLECTIVES), (64, 20000), ("all",), iterations=5)

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
