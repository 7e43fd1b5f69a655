"""Classes of links on machines that are folders, and the file of a cluster that the simulator reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dtrain.collectives.schedules.simulator import Level, cluster_from
from dtrain.launch import bench_links
from dtrain.launch.bench_links import cluster, link_class, pairs, place


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two sockets of two caches of two cores of two threads: cpu c is thread 0 of core c, cpu c + 8 thread 1."""
    for cpu in range(16):
        core = cpu % 8
        cache = [c for c in range(16) if c % 8 // 2 == core // 2]
        socket = [c for c in range(16) if c % 8 // 4 == core // 4]
        for name, cpus in (
            ("topology/core_cpus_list", [core, core + 8]),
            ("cache/index3/shared_cpu_list", cache),
            ("topology/package_cpus_list", socket),
        ):
            file = tmp_path / f"cpu{cpu}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(",".join(map(str, cpus)) + "\n")
    return tmp_path


def test_the_class_is_the_smallest_unit_that_holds_both(machine):
    def at(*cpus, node=0):
        return place(node, cpus, machine)

    assert link_class(at(0), at(8)) == "same-core"
    assert link_class(at(0), at(1)) == "same-cache"
    assert link_class(at(1), at(2)) == "same-socket"
    assert link_class(at(3), at(4)) == "same-node"
    assert link_class(at(0), at(0, node=1)) == "other-node"
    assert link_class(at(0, 1), at(1)) == "same-cache"  # a rank on two cores is on neither of them
    assert link_class(at(0, 7), at(7)) == "same-node"
    assert link_class(at(*range(16)), at(*range(16))) == "same-node"
    nowhere = place(0, (0,), machine / "none")
    assert nowhere == ("", "", "", "0") and link_class(nowhere, nowhere) == "same-node"


def test_a_pair_for_each_class_the_nearest_first(machine):
    where = [place(node, (cpu,), machine) for node in (0, 1) for cpu in (0, 1, 2, 4)]
    assert list(pairs(where).items()) == [
        ("same-cache", (0, 1)),
        ("same-socket", (0, 2)),
        ("same-node", (0, 3)),
        ("other-node", (0, 4)),
    ]


def test_levels_that_are_no_runs_of_neighbours_are_left_out(machine):
    constants = {"same-socket": (1e-6, 1e-10), "same-node": (2e-6, 2e-10), "other-node": (9e-6, 8e-9)}
    neighbours = [place(node, (cpu,), machine) for node in (0, 1) for cpu in (0, 2, 4, 6)]
    description, left_out = cluster(neighbours, constants, 5e-11, "two nodes")
    assert [(row["name"], row["ranks"]) for row in description["levels"]] == [
        ("socket", 2),
        ("node", 4),
        ("network", 0),
    ]
    assert left_out == []
    in_turns = [place(node, (cpu,), machine) for node in (0, 1) for cpu in (0, 4, 2, 6)]
    description, left_out = cluster(in_turns, constants, 5e-11, "two nodes")
    assert [row["name"] for row in description["levels"]] == ["node", "network"] and "same-socket" in left_out[0]
    uneven = neighbours[:7]
    description, left_out = cluster(uneven, constants, 5e-11, "uneven")
    assert [row["name"] for row in description["levels"]] == ["network"] and len(left_out) == 2


def test_the_simulator_reads_what_was_measured(machine, tmp_path):
    """Also through the command: the time of a ring on this file is the formula with these constants."""
    where = [place(0, (cpu,), machine) for cpu in (0, 1, 2, 3)]
    constants = {"same-cache": (1.5e-6, 2.5e-10), "same-socket": (-1e-9, 4e-10)}
    text = bench_links.as_yaml(cluster(where, constants, 1.25e-10, 'a "chip"')[0])
    found = cluster_from(yaml.safe_load(text))
    assert found.levels == (Level("cache", 1.5e-6, 2.5e-10, 2, 1), Level("socket", 0.0, 4e-10, 0, 1))
    assert found.gamma == 1.25e-10 and found.name == "a 'chip'"
    uniform = tmp_path / "uniform.yaml"
    uniform.write_text(bench_links.as_yaml(cluster(where, {"other-node": (2e-6, 3e-10)}, 1e-10, "n")[0]))
    words = ["show", "collective", "all_reduce", "--algorithm", "ring", "--ranks", "4", "--sizes", "1M"]
    ended = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", *words, "--simulate", uniform],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    seconds = 6 * 2e-6 + 2 * 3 / 4 * (1 << 20) * 3e-10 + 3 / 4 * (1 << 20) * 1e-10
    assert f"{seconds * 1e6:.4g} µs" in ended.stdout


def test_gamma_is_a_speed_of_this_world():
    assert 1e-12 < bench_links.gamma() < 1e-7
