"""Pictures of a timeline, planned or measured: a row per rank, time to the right; as text and as SVG.

    rank 0  0 1 2 3       0───0 1───1 2───2 3───3
    rank 1    0 1 2 0───0 3 1───1 2───2 3───3

The number is the microbatch; F is blue, B green, I light green, W grey; a rank's later chunks are darker.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dtrain.strategies.pipeline.timeline import Span

COLOURS = {
    "F": ("#7fb2e5", "#2f6fb5"),
    "B": ("#8fcf9a", "#3a8a4b"),
    "I": ("#c3e6c9", "#7dbb88"),
    "W": ("#d5d8dc", "#9aa0a8"),
}
NAMES = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}
STYLES = {"F": "black on bright_blue", "B": "black on green", "I": "black on bright_green", "W": "black on white"}
INK, GRID = "#1f2937", "#e5e7eb"
LEFT, TOP, ROW, WIDTH = 70, 46, 30, 1040.0

Cells = list[list[tuple[str, str]]]


def cells(spans: Sequence[Span], ranks: int, width: int) -> Cells:
    """For each rank its (text, kind) runs from left to right, `width` characters in all; kind "" is idle."""
    begin, length = _extent(spans)
    shortest = min(span.stop - span.start for span in spans)
    digits = max(len(str(span.action.microbatch)) for span in spans)
    # Of the shortest action; a whole number, so that of equal actions none looks longer.
    columns = min(digits + 1, int(shortest * width / length))
    unit = shortest / columns if columns else length / width
    rows: Cells = []
    for rank in range(ranks):
        runs: list[tuple[str, str]] = []
        at = 0
        for span in sorted((s for s in spans if s.rank == rank), key=lambda s: s.start):
            start, stop = round((span.start - begin) / unit), round((span.stop - begin) / unit)
            start = max(start, at)
            if start > at:
                runs.append((" " * (start - at), ""))
            if stop > start:
                runs.append((f"{span.action.microbatch}"[: stop - start].ljust(stop - start), span.action.kind))
                at = stop
            else:
                at = start
        rows.append(runs)
    return rows


def draw_text(spans: Sequence[Span], ranks: int, width: int = 100) -> str:
    """The rows as plain text: F as its number, a backward with a line behind it (B ─, I ·, W =)."""
    marks = {"F": " ", "B": "─", "I": "·", "W": "=", "": " "}
    names = [f"rank {rank}" for rank in range(ranks)]
    wide = max(map(len, names)) + 2
    lines = [
        name.ljust(wide) + "".join(text.rstrip().ljust(len(text), marks[kind]) if kind else text for text, kind in runs)
        for name, runs in zip(names, cells(spans, ranks, width - wide), strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)


def draw_svg(rows: Sequence[tuple[str, Sequence[Span]]], ranks: int) -> str:
    """The text of an SVG file: one panel for each (title, spans), such as planned and measured, one below the other."""
    panel = TOP + ROW * ranks + 14
    height = panel * len(rows) + 26
    total = LEFT + WIDTH + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {height}" width="{total:.0f}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{total:.0f}" height="{height}" fill="white"/>',
    ]
    used = {span.action.kind for _, spans in rows for span in spans}
    stages = 1 + max(span.action.stage for _, spans in rows for span in spans)
    for index, (title, spans) in enumerate(rows):
        top = index * panel
        parts.append(f'<text x="16" y="{top + 26}" font-size="15" font-weight="600">{escape(title)}</text>')
        begin, length = _extent(spans)
        scale = WIDTH / (length or 1.0)
        for rank in range(ranks):
            y = top + TOP + ROW * rank
            parts.append(f'<text x="16" y="{y + 18}">rank {rank}</text>')
            parts.append(f'<rect x="{LEFT}" y="{y + 2}" width="{WIDTH:.0f}" height="{ROW - 4}" fill="{GRID}"/>')
        for span in spans:
            x, wide = LEFT + (span.start - begin) * scale, (span.stop - span.start) * scale
            y = top + TOP + ROW * span.rank + 2
            colour = COLOURS[span.action.kind][int(span.action.stage >= ranks and stages > ranks)]
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(wide, 0.3):.2f}" height="{ROW - 4}" fill="{colour}" '
                f'stroke="white" stroke-width="0.7">'
                f"<title>{span.action}: {span.start:.6g} to {span.stop:.6g}</title></rect>"
            )
            if wide > 7 * len(str(span.action.microbatch)):
                parts.append(
                    f'<text x="{x + wide / 2:.2f}" y="{y + 17}" text-anchor="middle" font-size="11">'
                    f"{span.action.microbatch}</text>"
                )
    legend = "  ".join(f'<tspan fill="{COLOURS[kind][1]}">■ {NAMES[kind]}</tspan>' for kind in NAMES if kind in used)
    parts.append(f'<text x="16" y="{height - 10}">{legend}  grey: idle</text>')
    return "\n".join([*parts, "</svg>", ""])


def _extent(spans: Sequence[Span]) -> tuple[float, float]:
    begin = min(span.start for span in spans)
    return begin, max(span.stop for span in spans) - begin
