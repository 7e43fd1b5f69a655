"""The crossover plot: time over size by algorithm, both logarithmic, and which algorithm is the fastest where.

The fastest is the thick line at the bottom edge of all curves; where it changes, a dashed line says at which size.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 76, 210, 48, 58
INK, GRID, SOFT = "#1f2937", "#e5e7eb", "#6b7280"
COLOURS = (
    "#2f6fb5", "#d9662b", "#3b8f5a", "#8457b0", "#c23b5a", "#8a6d3b", "#d17fb5", "#5f6b7a", "#a8a32b", "#2ba3a8"
)  # fmt: skip


def crossovers(sizes: Sequence[float], times: Mapping[str, Sequence[float]]) -> list[tuple[float, str]]:
    """From which size on which algorithm is the fastest: (size, name), the first one from sizes[0] on.

    Between two sizes the curves are taken as straight lines, as α-β-γ costs are. Of equal ones the first wins.
    """
    found: list[tuple[float, str]] = []
    for i, size in enumerate(sizes):
        best = min(times, key=lambda name: times[name][i])
        if not found:
            found.append((size, best))
        elif found[-1][1] != best and times[best][i] < times[found[-1][1]][i]:
            before = found[-1][1]
            a = times[best][i - 1] - times[before][i - 1]
            b = times[before][i] - times[best][i]
            found.append((sizes[i - 1] + (size - sizes[i - 1]) * (a / (a + b) if a > 0 else 0.0), best))
    return found


def plot(title: str, sizes: Sequence[float], times: Mapping[str, Sequence[float]]) -> str:
    """The text of an SVG file. sizes in bytes, ascending and positive; times in seconds, one sequence per algorithm."""
    values = [t for row in times.values() for t in row if t > 0] or [1e-6, 1e-5]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)
    first, last = math.log2(sizes[0]), max(math.log2(sizes[-1]), math.log2(sizes[0]) + 1)

    def x(size: float) -> float:
        return LEFT + (math.log2(size) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(seconds: float) -> float:
        at = (math.log10(max(seconds, 10.0**low)) - low) / (high - low)
        return HEIGHT - BOTTOM - at * (HEIGHT - TOP - BOTTOM)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {y(10.0**power):.1f}H{right}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">{seconds_text(10.0**power)}</text>'
        )
    exponents = range(math.ceil(first), math.floor(last) + 1)
    for exponent in exponents[:: max(1, math.ceil(len(exponents) / 12))]:
        at = x(2.0**exponent)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="{INK}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{bytes_text(2.0**exponent)}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="{INK}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">bytes</text>')
    for number, (name, row) in enumerate(times.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashes = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        path = "L".join(f"{x(size):.1f} {y(time):.1f}" for size, time in zip(sizes, row, strict=True))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>')
        parts.append(
            f'<path d="M{right + 14} {TOP + 10 + 20 * number}h24" stroke="{colour}" stroke-width="2"{dashes}/>'
        )
        parts.append(f'<text x="{right + 44}" y="{TOP + 14 + 20 * number}">{escape(name)}</text>')
    best = [min(row[i] for row in times.values()) for i in range(len(sizes))]
    path = "L".join(f"{x(size):.1f} {y(time):.1f}" for size, time in zip(sizes, best, strict=True))
    parts.append(f'<path d="M{path}" fill="none" stroke="{INK}" stroke-opacity="0.18" stroke-width="9"/>')
    for number, (size, name) in enumerate(crossovers(sizes, times)):
        if number:
            parts.append(f'<path d="M{x(size):.1f} {TOP}V{bottom}" stroke="{SOFT}" stroke-dasharray="3 4"/>')
        text = f"{name} from {bytes_text(size)}"
        spot = f'transform="translate({x(size) + 14:.1f} {TOP + 4}) rotate(90)"'
        parts.append(f'<text {spot} fill="{SOFT}" font-size="11">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def bytes_text(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """0.0015 -> "1.5 ms"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor * 0.9999:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
