"""The picture of `dtrain bench COLLECTIVE --plot`: time and bus bandwidth over size, with the limit of memory or wire.

    one row per collective     time, both axes logarithmic  |  bus bandwidth  |  legend

Solid lines are out of place, dashed ones in place; grey is what the memory, or between nodes the wire alone would
allow; where that is far above the axis of bandwidths, the legend has the number. An SVG is text: drawn without any
library, sharp at every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from dtrain.launch.bench_table import BOTH_WAYS, IN_PLACE, Row
from dtrain.launch.pictures import FONT, GRID, INK, REFERENCE, ticks

PANEL, HEIGHT, LEFT, GAP, TOP, LEGEND, ROW = 330, 240, 70, 76, 70, 190, 340
LINE, LETTER = 18, 7  # of the legend
FAR = 4  # times the highest measured bandwidth: up to here the axis reaches a limit
COLOURS = ("#2f6fb5", "#d9662b", "#3a8f5c", "#8a4fb0", "#b8892b", "#c23b6b", "#3aa0a8", "#5c6b2f", "#7a4a2b", "#4a4ad0")

Point = tuple[float, float]


def svg(result: dict[str, Any]) -> str:
    """The picture of a result (config, header, rows), as text."""
    rows: list[Row] = [row for row in result["rows"] if row.size]
    groups = dict.fromkeys(row.collective for row in rows)
    limit = "memory limit" if result["config"].get("wire") is None else "wire limit"
    legends = {name: _legend([row for row in rows if row.collective == name], limit) for name in groups}
    longest = max((len(label) for legend in legends.values() for label in legend), default=0)
    width = LEFT + 2 * PANEL + GAP + max(LEGEND, 46 + LETTER * longest)
    heights = [max(ROW, 52 + LINE * len(legend)) for legend in legends.values()]
    height = TOP + (sum(heights) or ROW)
    header = result["header"]
    title = f"{header['ranks']} ranks, {header['cores']} cores, {header['mpi']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'{FONT} font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14" font-weight="600">dtrain bench</text>',
        f'<text x="{LEFT}" y="42" fill="{REFERENCE}">{escape(title)}</text>',
    ]
    for position, collective in enumerate(groups):
        chosen = [row for row in rows if row.collective == collective]
        parts += _collective(collective, chosen, TOP + sum(heights[:position]), limit)
    return "\n".join([*parts, "</svg>", ""])


def _collective(name: str, rows: Sequence[Row], top: float, limit: str) -> list[str]:
    """Two panels and a legend."""
    algorithms = list(dict.fromkeys(row.algorithm for row in rows))
    curves = {}
    for key in dict.fromkeys((row.algorithm, row.placing) for row in rows):
        curves[key] = sorted((row for row in rows if (row.algorithm, row.placing) == key), key=lambda row: row.size)
    styles = {key: (COLOURS[algorithms.index(key[0]) % len(COLOURS)], _dashes(key[1])) for key in curves}
    limits = _limits(rows, limit)
    parts = [f'<text x="{LEFT}" y="{top + 8}" font-size="14" font-weight="600">{escape(name)}</text>']
    second = LEFT + PANEL + GAP
    for left, unit, value in ((LEFT, "time, µs", _time), (second, "bus bandwidth, GB/s", _busbw)):
        lines = [(_points(chosen, value), *styles[key]) for key, chosen in curves.items()]
        lines += [(_points(chosen, value), REFERENCE, "2 3") for chosen in limits.values()]
        parts += _panel(left, top + 22, unit, lines, logarithmic=value is _time)
    looks = [*styles.values(), *[(REFERENCE, "2 3") for _ in limits]]
    for row_number, (label, (colour, dashes)) in enumerate(zip(_legend(rows, limit), looks, strict=True)):
        x, y = second + PANEL + 16, top + 34 + LINE * row_number
        parts.append(f'<path d="M{x} {y}h24" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(label)}</text>')
    return parts


def _legend(rows: Sequence[Row], limit: str) -> list[str]:
    """What the curves are called, in their order."""
    curves = dict.fromkeys(f"{row.algorithm}, {row.placing}" for row in rows)
    fastest = max((row.busbw for row in rows), default=0.0)
    limits = [
        label + (f", above: {found[-1].busbw:.3g} GB/s" if found[-1].busbw > FAR * fastest else "")
        for label, found in _limits(rows, limit).items()
    ]
    return [*curves, *limits]


def _points(rows: Sequence[Row], value: Callable[[Row], float]) -> list[Point]:
    return [(float(row.size), value(row)) for row in rows]


def _time(row: Row) -> float:
    return row.time


def _busbw(row: Row) -> float:
    return row.busbw


def _dashes(placing: str) -> str:
    return "6 4" if placing in (IN_PLACE, BOTH_WAYS) else "none"


def _limits(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """Rows as they would be if memory, or the wire, were the only cost: one per size, others for one shared result."""
    limits: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.bound is not None and row.bound > 0:
            label = name + (", shared" if row.algorithm == "shared" else "")
            values = {**row.__dict__, "time": row.bound, "busbw": row.busbw * row.time / row.bound}
            limits.setdefault(label, {})[row.size] = Row(**values)
    return {label: [found[size] for size in sorted(found)] for label, found in limits.items()}


def _panel(
    left: float, top: float, unit: str, lines: Sequence[tuple[list[Point], str, str]], logarithmic: bool
) -> list[str]:
    """Axes and curves; sizes are on a logarithmic axis."""
    points = [point for line, _, _ in lines for point in line]
    sizes = sorted({size for size, _ in points})
    values = [value for _, value in points]
    measured = [value for line, colour, _ in lines if colour != REFERENCE for _, value in line]
    if logarithmic:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        marks = [(float(power), _decimal(power)) for power in range(low, max(high, low + 1) + 1)]
        scale: Callable[[float], float] = math.log10
    else:
        limits = [line[-1][1] for line, colour, _ in lines if colour == REFERENCE]  # at the longest, not in caches
        near = [1.05 * limit for limit in limits if limit <= FAR * max(measured)]
        round_ones = ticks(0.0, max([1.3 * max(measured), *near]) or 1.0, 5)
        marks = [(tick, f"{tick:g}") for tick in round_ones]
        scale = float
    first, last = marks[0][0], marks[-1][0]
    begin, end = math.log2(sizes[0]), math.log2(sizes[-1])

    def x(size: float) -> float:
        return left + (PANEL * (math.log2(size) - begin) / (end - begin) if end > begin else PANEL / 2)

    def y(place: float) -> float:
        return top + HEIGHT * (last - place) / (last - first)

    bottom = top + HEIGHT
    parts = []
    for place, label in marks:
        parts.append(f'<path d="M{left} {y(place):.1f}h{PANEL}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(place) + 4:.1f}" text-anchor="end">{label}</text>')
    shown = -math.inf
    for size in sizes:
        if x(size) - shown >= 40:
            shown = x(size)
            parts.append(f'<path d="M{shown:.1f} {bottom}v5" stroke="{INK}"/>')
            parts.append(f'<text x="{shown:.1f}" y="{bottom + 19}" text-anchor="middle">{_bytes(size)}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}h{PANEL}" fill="none" stroke="{INK}"/>')
    middle = f"translate({left - 50} {top + HEIGHT / 2}) rotate(-90)"
    parts.append(f'<text transform="{middle}" text-anchor="middle">{escape(unit)}</text>')
    parts.append(f'<text x="{left + PANEL / 2}" y="{bottom + 37}" text-anchor="middle">size, bytes</text>')
    # A frame of its own cuts off what lies beyond the axes: the limit, where caches are much faster than the calls.
    parts.append(
        f'<svg x="{left}" y="{top}" width="{PANEL + 4}" height="{HEIGHT}" viewBox="{left} {top} {PANEL + 4} {HEIGHT}">'
    )
    for line, colour, dashes in lines:
        drawn = [(x(size), y(scale(value))) for size, value in line]
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{colour}"/>' for px, py in drawn]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in drawn)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
    return [*parts, "</svg>"]


def _decimal(power: int) -> str:
    return f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:g}"


def _bytes(size: float) -> str:
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g}{unit}"
    return f"{size:g}"
