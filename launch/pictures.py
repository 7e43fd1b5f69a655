"""The loss curve of a run: an SVG file, drawn without any library, and a small one of braille dots for the log.

    metrics.jsonl ──loss_curve──► loss.svg       training and validation loss over steps, the reference as a dashed line
                  ──terminal_curve──► ⠑⠢⢄⣀       2 x 4 dots per character

An SVG is text of a few kilobytes, sharp at every size, and every browser shows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 52, 56
TRAIN, VALIDATION, REFERENCE, INK, GRID = "#2f6fb5", "#d9662b", "#6b7280", "#1f2937", "#e5e7eb"
FONT = "font-family=\"'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif\""

COLOURS = ("#2f6fb5", "#d9662b", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b")

Point = tuple[float, float]


def loss_curve(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    reference: float | None = None,
    title: str = "",
    reference_label: str = "unigram entropy",
) -> Path:
    """Write the curve of `metrics` (rows with step, loss, maybe validation_loss) as SVG to `path`; return the path.

    Losses that are no finite numbers are left out: a run that diverged still gets its picture.
    """
    train = _points(metrics, "loss")
    validation = _points(metrics, "validation_loss")
    path.write_text(_svg(train, validation, reference, title, reference_label), encoding="utf-8")
    return path


def curves(named: Mapping[str, Sequence[Point]], title: str) -> str:
    """Several loss curves (points of step and loss by name) in one SVG."""
    losses = [loss for points in named.values() for _, loss in points]
    loss_ticks = ticks(min(losses, default=0.0), max(losses, default=1.0))
    last_step = max((step for points in named.values() for step, _ in points), default=1.0)
    low, high, bottom = loss_ticks[0], loss_ticks[-1], HEIGHT - BOTTOM
    parts = _head(title)
    for tick in loss_ticks:
        y = TOP + (high - tick) / (high - low) * (bottom - TOP)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick, loss_ticks)}</text>')
    for tick in (each for each in ticks(0.0, last_step) if each <= last_step and each == int(each)):
        x = LEFT + tick / last_step * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>')
    legend = []
    for (name, points), colour in zip(named.items(), itertools.cycle(COLOURS)):
        places = [
            (LEFT + step / last_step * (WIDTH - LEFT - RIGHT), TOP + (high - loss) / (high - low) * (bottom - TOP))
            for step, loss in points
        ]
        parts.append(_line(places, colour))
        legend.append((colour, f"{name} {points[-1][1]:.3f}", ""))
    return "\n".join([*parts, *_legend(legend), "</svg>", ""])


def histogram(counts: Mapping[int, int], title: str, label: str, unit: str) -> str:
    """Bars of `counts` (whole number -> how often) as SVG; `label` stands below, `unit` at the side."""
    low, high = min(counts, default=0), max(counts, default=0)
    count_ticks = ticks(0.0, max(counts.values(), default=1))
    wide = (WIDTH - LEFT - RIGHT) / (high - low + 1)
    bottom = HEIGHT - BOTTOM
    parts = _head(title)
    for tick in count_ticks:
        y = bottom - tick / count_ticks[-1] * (bottom - TOP)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick, count_ticks)}</text>')
    every = max(1, (high - low + 1) // 20)
    for value in range(low, high + 1):
        x, tall = LEFT + (value - low) * wide, counts.get(value, 0) / count_ticks[-1] * (bottom - TOP)
        bar = f'x="{x + 0.1 * wide:.1f}" y="{bottom - tall:.1f}" width="{0.8 * wide:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect {bar} fill="{TRAIN}"><title>{value}: {counts.get(value, 0)}</title></rect>')
        if (value - low) % every == 0:
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{bottom + 20}" text-anchor="middle">{value}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="{INK}"/>')
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(label)}</text>')
    upright = f'transform="translate(18 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {upright}>{escape(unit)}</text>")
    return "\n".join([*parts, "</svg>", ""])


def terminal_curve(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """`losses` (one value per logged step) as `height` lines of braille dots, `width` characters of curve, labels left.

    Each column of dots shows the mean of the values that fall into it, columns between two values the line.
    """
    values = [value for value in losses if math.isfinite(value)]
    if not values:
        return ""
    columns = _resampled(values, 2 * width)
    low, high = min(columns), max(columns)
    rows = 4 * height
    cells = [[0] * width for _ in range(height)]
    before = None
    for x, value in enumerate(columns):
        y = round((high - value) / (high - low) * (rows - 1)) if high > low else rows // 2
        # A steep curve fills the dots between neighbours, half of the way on each side.
        first, last = (y, y) if before is None else (min(y, before), max(y, before))
        for dot in range(first, last + 1):
            cells[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        before = y
    labels = {0: f"{high:.3f}", height - 1: f"{low:.3f}"} if high > low else {height // 2: f"{high:.3f}"}
    indent = max(map(len, labels.values()))
    lines = ["".join(chr(0x2800 + dots) for dots in row).rstrip("\u2800") for row in cells]
    return "\n".join(f"{labels.get(i, ''):>{indent}} ┤{line}" for i, line in enumerate(lines))


# Bit of the dot in row 0..3 and column 0..1 of a braille character.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    rows = [(float(row["step"]), float(row[key])) for row in metrics if row.get(key) is not None]
    return [(step, value) for step, value in rows if math.isfinite(value)]


def _resampled(values: Sequence[float], count: int) -> list[float]:
    """`count` values: means where there are more, straight lines between them where there are fewer."""
    if len(values) >= count:
        edges = [i * len(values) // count for i in range(count + 1)]
        return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    out = []
    for i in range(count):
        place = i * (len(values) - 1) / max(1, count - 1)
        below = min(int(place), len(values) - 1)
        above = min(below + 1, len(values) - 1)
        out.append(values[below] + (place - below) * (values[above] - values[below]))
    return out


# --- SVG --------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _svg(train: list[Point], validation: list[Point], reference: float | None, title: str, reference_label: str) -> str:
    points = train + validation
    losses = [loss for _, loss in points] + ([] if reference is None else [reference])
    loss_ticks = ticks(min(losses, default=0.0), max(losses, default=1.0))
    last_step = max((step for step, _ in points), default=1.0)
    step_ticks = [tick for tick in ticks(0.0, last_step) if tick <= last_step and tick == int(tick)]
    low, high = loss_ticks[0], loss_ticks[-1]

    def x(step: float) -> float:
        return LEFT + step / last_step * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = _head(title)
    for tick in loss_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_label(tick, loss_ticks)}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in step_ticks:
        parts.append(f'<path d="M{x(tick):.1f} {bottom}v5" stroke="{INK}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 20}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">step</text>')
    parts.append(
        f'<text transform="translate(18 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        "loss, nats per target</text>"
    )
    legend = []
    if reference is not None:
        parts.append(
            f'<path d="M{LEFT} {y(reference):.1f}H{WIDTH - RIGHT}" stroke="{REFERENCE}" stroke-width="1.5" '
            'stroke-dasharray="6 4"/>'
        )
        legend.append((REFERENCE, f"{reference_label} {reference:.4g}", "6 4"))
    if validation:
        parts.append(_line([(x(step), y(loss)) for step, loss in validation], VALIDATION))
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="{VALIDATION}"/>' for s, v in validation]
        legend.append((VALIDATION, f"validation {validation[-1][1]:.4g}", ""))
    if train:
        parts.append(_line([(x(step), y(loss)) for step, loss in train], TRAIN))
        legend.append((TRAIN, f"training {train[-1][1]:.4g}", ""))
    parts += _legend(legend[::-1])
    return "\n".join([*parts, "</svg>", ""])


def _head(title: str) -> list[str]:
    """The frame that all pictures share."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'{FONT} font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    if title:
        parts.append(f'<text x="{LEFT}" y="26" font-size="15" font-weight="600">{escape(title)}</text>')
    return parts


def _line(points: list[Point], colour: str) -> str:
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'


def _legend(entries: list[tuple[str, str, str]]) -> list[str]:
    """Right-aligned at the top: a curve that falls leaves that corner free."""
    parts = []
    for row, (colour, label, dashes) in enumerate(entries):
        py, px = TOP + 14 + 20 * row, WIDTH - RIGHT - 190
        if row == 0:
            box = f'x="{px - 10}" y="{TOP + 2}" width="198" height="{20 * len(entries) + 6}"'
            parts.append(f'<rect {box} rx="4" fill="white" fill-opacity="0.85"/>')
        parts.append(
            f'<path d="M{px} {py}h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes or "none"}"/>'
        )
        parts.append(f'<text x="{px + 34}" y="{py + 4}">{escape(label)}</text>')
    return parts


def _label(tick: float, all_ticks: list[float]) -> str:
    """As many decimals as the distance of the ticks needs."""
    step = all_ticks[1] - all_ticks[0]
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-9 * max(1.0, abs(step))), 6)
    return f"{tick:,.{decimals}f}"
