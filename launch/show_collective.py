"""`dtrain show collective`: a collective's algorithms proven, drawn, and timed on a described cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dtrain.collectives.schedules import ALGORITHMS, Algorithm, Schedule, bind, own, schedule
from dtrain.collectives.schedules.crossover import bytes_text, crossovers, plot, seconds_text
from dtrain.collectives.schedules.drawing import draw_svg, draw_text
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.simulator import Cluster, cluster_from, simulate
from dtrain.collectives.schedules.specification import PROMISES
from dtrain.errors import UserError
from dtrain.launch.bench_table import parse_sizes

MOST_PROVEN = 1 << 20  # messages; above, a proof takes longer than one likes to wait
MOST_MESSAGES = 1 << 22  # in one step, or of an algorithm that is written rank by rank


def show_collective(
    collective: str,
    algorithm: str,
    ranks: int,
    parameters: dict[str, int],
    root: int = 0,
    cluster_path: Path | None = None,
    sizes: str = "1K:1G",
    output: Path | None = None,
) -> None:
    """Print (and write to `output`) the schedule of one algorithm, or with a cluster the times of several.

    algorithm: a name or file.py:NAME, with a cluster several by commas, or "all".
    """
    if collective not in ALGORITHMS:
        raise UserError(f"{collective}: not a collective; allowed: {', '.join(ALGORITHMS)}")
    rows = dict(ALGORITHMS[collective])
    names = list(rows) if algorithm == "all" else algorithm.split(",")
    for name in filter(own.is_own, names):
        try:
            row = own.load(name)
            rows[name] = row if isinstance(row, Algorithm) else bind(collective, name, row, ranks).algorithm
        except ValueError as error:
            raise UserError(f"--algorithm {error}") from None
    if root and not (PROMISES[collective].rooted and root < ranks):
        allowed = f"0 to {ranks - 1}" if PROMISES[collective].rooted else f"none, {collective} has no root"
        raise UserError(f"--root {root}: not a rank that can be the root; allowed: {allowed}")
    if unknown := [name for name in names if name not in rows]:
        raise UserError(f"--algorithm: {unknown[0]}: not an algorithm of {collective}; allowed: {', '.join(rows)}")
    try:
        if cluster_path is not None:
            chosen = {name: rows[name] for name in names}
            cluster = read_cluster(cluster_path)
            _simulate(collective, chosen, ranks, parameters, root, cluster, parse_sizes(sizes), output)
        elif algorithm == "all" and len(rows) > 1:
            if output is not None:
                raise UserError("--output: one algorithm can be drawn: --algorithm NAME; or several timed: --simulate")
            print("\n".join(_costs(collective, ranks)))
        elif len(names) > 1:
            raise UserError(f"--algorithm {algorithm}: one can be drawn; several need --simulate")
        else:
            name = getattr(rows[names[0]].steps, "__name__", names[0]) if own.is_own(names[0]) else names[0]
            _draw(bind(collective, name, rows[names[0]], ranks, root, **parameters), output)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from None


def _costs(collective: str, ranks: int) -> list[str]:
    """All algorithms with what they cost."""
    lines = [f"{collective} between {ranks} ranks; --algorithm NAME draws one", ""]
    for name, row in ALGORITHMS[collective].items():
        if row.sizes(ranks):
            alpha, beta, gamma = schedule(collective, name, ranks).cost
            lines.append(f"{name:20} {alpha:8.4g} α {beta:8.4g} nβ {gamma:8.4g} nγ")
        else:
            lines.append(f"{name:20} {(row.sizes.__doc__ or '').strip()}")
    return lines


def _draw(picture: Schedule, output: Path | None) -> None:
    if output is None:
        print(draw_text(picture))
    else:
        _write(output, draw_svg(picture))
    messages = picture.cost.alpha * picture.size
    if messages > MOST_PROVEN:
        print("not proven: too many messages")
        return
    proof = prove(picture)
    print(
        f"proven: {proof.steps} steps, {proof.messages} messages; per rank at most {proof.sent.max():.4g} n sent, "
        f"{proof.added.max():.4g} n added"
        + ("; the order of the ranks is kept" if proof.ordered and picture.specification.reduces else "")
        + ("" if proof.equal_bits else "; the results of the ranks may differ in their last bits")
    )


def _simulate(
    collective: str,
    algorithms: dict[str, Algorithm],
    ranks: int,
    parameters: dict[str, int],
    root: int,
    cluster: Cluster,
    sizes: Sequence[int],
    output: Path | None,
) -> None:
    times: dict[str, list[float]] = {}
    for name, row in algorithms.items():
        if len(algorithms) > 1 and not row.sizes(ranks):
            print(f"{name}: left out: {(row.sizes.__doc__ or '').strip()}")
            continue
        given = {key: value for key, value in parameters.items() if key in row.parameters or len(algorithms) == 1}
        node = cluster.levels[0].ranks
        if "local" in row.parameters and node and ranks % node == 0:
            given.setdefault("local", node)
        plan = bind(collective, name, row, ranks, root, **given)
        in_one_step, one_by_one = name == "direct", not row.regular
        if ranks * max(ranks * in_one_step, plan.cost.alpha * one_by_one) > MOST_MESSAGES:
            print(f"{name}: left out: too many messages between {ranks} ranks to simulate each")
            continue
        times[name] = [float(seconds) for seconds in simulate(plan, cluster, sizes)]
    if not times:
        raise UserError(f"{collective}: no algorithm left for {ranks} ranks")
    title = f"{collective}, {ranks} ranks, {cluster.name}"
    print(title)
    print("\n".join(_table(sizes, times)))
    changes = crossovers(sizes, times)
    print("fastest: " + ", ".join(f"{name} from {bytes_text(size)}" for size, name in changes))
    if output is not None:
        _write(output, plot(title, sizes, times))


def _table(sizes: Sequence[int], times: dict[str, list[float]]) -> list[str]:
    columns = [["bytes", *map(bytes_text, sizes)]]
    for name, row in times.items():
        best = [min(other[i] for other in times.values()) for i in range(len(sizes))]
        marks = ["*" if time == low else " " for time, low in zip(row, best, strict=True)]
        columns.append([name, *(seconds_text(time) + mark for time, mark in zip(row, marks, strict=True))])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def read_cluster(path: Path, option: str = "--simulate") -> Cluster:
    """The cluster of a YAML file."""
    try:
        description: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("must have the keys levels and maybe name, gamma")
        return cluster_from(description)
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{option}: {path}: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {path}: cannot be written: {error.strerror}") from None
    print(f"{path}: written")
