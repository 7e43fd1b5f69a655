"""Results of `dtrain bench`: formulas against numbers worked out by hand, sizes, table, files, comparison, picture."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dtrain.errors import UserError
from dtrain.launch import bench_latency, bench_p2p, bench_plot, bench_table, bench_wire
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
        ("scan", 4 + 4, 4 + 4),
        ("exscan", 3 + 3, 3 + 3),
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


def test_latencies_are_means_of_the_ranks():
    """By hand: ranks with 1, 2 and 6 us on average; each iteration takes as long as its slowest rank."""
    row = bench_table.row(
        "all_reduce", (8, 2, "float32", "sum"), "ring", IN_PLACE, [6e-6, 6e-6], 0, 3, None, [1e-6, 2e-6, 6e-6]
    )
    line = list(bench_latency.tables([row]))[2].split()
    assert line == ["8", "3.00", "1.00", "6.00", "2"]


def test_what_the_wire_must_carry():
    """Bytes that one of two nodes must send, counted on paper: p = 8 ranks, n = 1000."""
    least = {
        "all_reduce": 1000, "reduce_scatter": 500, "all_gather": 500, "all_to_all": 4 * 500, "broadcast": 1000,
        "reduce": 1000, "gather": 500, "scatter": 500, "scan": 1000, "exscan": 1000, "barrier": 0,
    }  # fmt: skip
    assert {name: 1e-6 * bench_wire.bound(name, 1000, 2, 8, 1.0) for name in COLLECTIVES} == least
    assert bench_wire.bound("all_reduce", 1000, 4, 8, 1e6) == 1500  # a ring of 4 nodes: 2 * 3 / 4
    assert bench_wire.parse_rate("1gbit") == 125e6 and bench_wire.parse_rate("100Mbit") == 12.5e6
    for text in ("1", "gbit", "-1gbit", "0gbit", "nangbit", "1gbyte"):
        with pytest.raises(UserError, match=f"--wire {text}: no rate; such as 100mbit"):
            bench_wire.parse_rate(text)


def test_the_limit_is_in_the_picture_or_in_the_legend():
    near, far = (row(2.0, bound=bound, busbw=1.0) for bound in (1.0, 0.1))
    assert "memory limit<" in bench_plot.svg(result(near)) and "above" not in bench_plot.svg(result(near))
    assert "memory limit, above: 20 GB/s" in bench_plot.svg(result(far))
    wire = result(near)
    wire["config"]["wire"] = 1.25e8
    assert "wire limit<" in bench_plot.svg(wire)


# --- links ------------------------------------------------------------------------------------------------------------


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
