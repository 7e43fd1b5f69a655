"""What a search over layers found: a row per op, what is moved between them, and the sum beside that of other plans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dtrain.graph import short
from dtrain.launch.plan.layers.problem import Assignment
from dtrain.launch.plan.layers.runnable import module
from dtrain.launch.plan.layers.states import told
from dtrain.launch.plan.report import seconds

Row = tuple[str, ...]
TITLES: Row = ("layer", "op", "cut", "output", "compute", "sums + update", "moved into it (forward | backward)")


def table(found: Assignment, explain: bool) -> Iterator[str]:
    """A row per op; without `explain` blocks that are alike are one."""
    groups: list[tuple[int, int, list[Row]]] = []  # first and last block, or -1; the rows
    for row in _rows(found):
        block = re.match(r"blocks\.(\d+)\.?", row[0])
        number = int(block[1]) if block else -1
        if not groups or groups[-1][0] != number:
            groups.append((number, number, []))
        groups[-1][2].append((row[0][block.end() :] if block else row[0], *row[1:]))
    if not explain:
        joined: list[tuple[int, int, list[Row]]] = []
        for first, last, rows in groups:
            if joined and first >= 0 and joined[-1][1] == first - 1 and joined[-1][2] == rows:
                joined[-1] = (joined[-1][0], last, rows)
            else:
                joined.append((first, last, rows))
        groups = joined
    lines = [TITLES]
    for first, last, rows in groups:
        where = f"blocks.{first}." if first == last else f"blocks.{first}-{last}."
        lines += [((where * (first >= 0) + row[0]).rstrip("."), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _rows(found: Assignment) -> Iterator[Row]:
    problem = found.problem
    into: dict[int, list[str]] = {}
    for edge in problem.edges:
        source, target = found.ends(edge)
        steps = problem.devices.steps(edge.bytes, source, target)
        if source != target and steps:
            ways = [
                [f"{s.kind} {short(round(s.bytes), 1024)}B" for s in steps if s.backward is b] for b in (False, True)
            ]
            calls = " | ".join("+".join(way) or "-" for way in ways)
            into.setdefault(edge.target, []).append(f"{told(source)} -> {told(target)}: {calls}")
    for number, (variable, choice) in enumerate(zip(problem.variables, found.choices, strict=True)):
        moved = "; ".join(into.get(number, []))
        costs = tuple(seconds(value) if value else "-" for value in (choice.seconds, choice.parameters))
        if variable.line is None:
            assert variable.leaf is not None
            yield (variable.leaf.name, "(parameter)", "", told(choice.output), *costs, moved)
        elif variable.waits:
            if moved:
                yield (variable.line.scope, "(waits)", "", told(choice.output), "", "", moved)
        else:
            yield (
                module(variable.line),
                variable.line.op,
                " x ".join(choice.names),
                told(choice.output),
                *costs,
                moved,
            )


def totals(named: Sequence[tuple[str, Assignment]]) -> Iterator[str]:
    """Seconds in parts, and bytes, of some plans."""
    width = max(len(name) for name, _ in named)
    yield f"{'':<{width}}{'step':>11}{'compute':>11}{'sums':>11}{'moved':>11}{'memory':>10}"
    for name, each in named:
        times = (each.seconds, each.compute, each.parameters, each.moved)
        cells = "".join(f"{seconds(value):>11}" for value in times)
        yield f"{name:<{width}}{cells}{short(round(each.memory), 1024) + 'B':>10}"
