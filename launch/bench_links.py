"""Which kinds of links there are between the ranks of a job, and the cluster that they make, as a file.

    a unit inside the next     core ⊂ L3 cache ⊂ socket ⊂ node ⊂ network

The class of a pair of ranks is the smallest unit that holds both. Below the node a rank has a place only where the
launcher bound it: a rank that may run on two sockets is on neither. The file is what `dtrain show collective
--simulate` reads: one level per class, α and β as measured, γ from adding two arrays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.collectives import Communicator

UNITS = ("core", "cache", "socket", "node")
CLASSES = ("same-core", "same-cache", "same-socket", "same-node", "other-node")
CPUS = Path("/sys/devices/system/cpu")
ADDED = 1 << 20  # bytes of the arrays that are added for γ

Place = tuple[str, str, str, str]  # the unit of each kind, inside out; "" where it is not known


def place(node: int, cpus: Sequence[int] | None = None, root: Path = CPUS) -> Place:
    """Where this process may run; cpus: its affinity mask by default."""
    if cpus is None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    files = ("topology/core_cpus_list", "cache/index3/shared_cpu_list", "topology/package_cpus_list")
    found = []
    for name in files:
        try:
            units = {(root / f"cpu{cpu}" / name).read_text().strip() for cpu in cpus}
        except OSError:  # no such file: another system, or no third cache
            units = set()
        found.append(f"{node}: {units.pop()}" if len(units) == 1 else "")
    return found[0], found[1], found[2], str(node)


def places(comm: Communicator) -> list[Place]:
    """The places of all ranks. Collective."""
    mine = place(comm.transport.nodes[comm.rank])
    return [(core, cache, socket, node) for core, cache, socket, node in comm.all_gather_object(list(mine))]


def link_class(a: Place, b: Place) -> str:
    """The smallest unit that holds both."""
    for name, mine, yours in zip(CLASSES, a, b, strict=False):
        if mine and mine == yours:
            return name
    return "other-node"


def pairs(where: Sequence[Place]) -> dict[str, tuple[int, int]]:
    """The first pair of ranks of each class that there is, the nearest class first."""
    found: dict[str, tuple[int, int]] = {}
    for a in range(len(where)):
        for b in range(a + 1, len(where)):
            found.setdefault(link_class(where[a], where[b]), (a, b))
    return {name: found[name] for name in CLASSES if name in found}


def gamma() -> float:
    """Seconds per byte of adding one float32 array to another, the median of some runs."""
    a, b = np.ones(ADDED // 4, np.float32), np.ones(ADDED // 4, np.float32)
    seconds = []
    for _ in range(15):
        before = time.perf_counter()
        np.add(a, b, out=b)
        seconds.append(time.perf_counter() - before)
    return float(np.median(seconds)) / ADDED


def cluster(
    where: Sequence[Place], constants: Mapping[str, tuple[float, float]], gamma: float, name: str
) -> tuple[dict[str, Any], list[str]]:
    """The description of a cluster, and what it leaves out. constants: class -> α in s, β in s per byte.

    A level joins ranks r … r + n - 1 for one n; a class whose units are not so (uneven, or ranks dealt out in turns)
    cannot be one.
    """
    levels: list[dict[str, Any]] = []
    left_out = []
    for class_name, (alpha, beta) in constants.items():
        number = CLASSES.index(class_name)
        size = len(where) if class_name == "other-node" else _even([row[number] for row in where])
        if not size:
            left_out.append(f"{class_name}: its ranks are not neighbours in equal groups")
        else:
            unit = "network" if class_name == "other-node" else UNITS[number]
            levels.append({"name": unit, "ranks": size, "alpha": max(0.0, alpha), "beta": max(0.0, beta), "links": 1})
    if levels:
        levels[-1]["ranks"] = 0  # the last level joins all, so that larger clusters of this kind can be simulated
    return {"name": name, "gamma": gamma, "levels": levels}, left_out


def _even(units: Sequence[str]) -> int:
    """Ranks in a unit, where all units are runs of neighbours of one length; else 0."""
    first = next((i for i, unit in enumerate(units) if unit != units[0]), len(units))
    blocks = [units[i : i + first] for i in range(0, len(units), first)]
    even = all(len(block) == first and len(set(block)) == 1 and block[0] for block in blocks)
    return first if even and len({block[0] for block in blocks}) == len(blocks) else 0


def as_yaml(description: Mapping[str, Any]) -> str:
    """The text of the file."""
    head = (
        "# dtrain show collective all_reduce --algorithm all --ranks 64 --simulate THIS_FILE\n"
        "# Measured by dtrain bench p2p --write-cluster. alpha: seconds per message, beta: seconds per byte, both one "
        "way;\n"
        "# gamma: seconds per byte added. links: one message at a time from each unit at full speed is assumed, not "
        "measured.\n"
    )
    rows = [
        f"  - {{name: {row['name']}, ranks: {row['ranks']}, alpha: {row['alpha']:.4e}, beta: {row['beta']:.4e}, "
        f"links: {row['links']}}}\n"
        for row in description["levels"]
    ]
    name = str(description["name"]).replace('"', "'")
    return f'{head}name: "{name}"\ngamma: {description["gamma"]:.4e}\nlevels:\n{"".join(rows)}'
