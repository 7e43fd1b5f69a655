"""Pictures of a schedule: ranks down, steps across, an arrow for each message; as SVG and as text.

    all_reduce ring, 3 ranks        step 0                step 1
    rank 0                          →1 c0  ←2 +c2         →1 c2  ←2 +c1
    rank 1                          →2 c1  ←0 +c0         ...

An arrow starts at the sender before the step and ends at the receiver after it: blue where the chunk is copied, orange
where it is added. A local fold is a square.
"""

from collections.abc import Sequence
from html import escape

from dtrain.collectives.schedules.schedule import Schedule, Step, chunk_list

COPY, ADD, FOLD, INK, GRID = "#2f6fb5", "#d9662b", "#6b7280", "#1f2937", "#e5e7eb"
ROW, LEFT, TOP = 46, 84, 64
MOST_MESSAGES = 4000


def draw_text(schedule: Schedule, width: int = 110) -> str:
    """The schedule as a table, cut into blocks of steps that fit into `width` characters."""
    programs = [schedule.of(rank) for rank in range(schedule.size)]
    steps = max(map(len, programs))
    cells = [[_cell(program[t]) if t < len(program) else "" for t in range(steps)] for program in programs]
    names = [f"rank {rank}" for rank in range(schedule.size)]
    first = max(map(len, names))
    blocks, t = [], 0
    while t < steps:
        columns: list[list[str]] = []
        used = first
        while t < steps:
            column = [f"step {t}", *(row[t] for row in cells)]
            wide = max(map(len, column))
            if columns and used + 3 + wide > width:
                break
            columns.append([text.ljust(wide) for text in column])
            used += 3 + wide
            t += 1
        lines = [
            " │ ".join(parts).rstrip() for parts in zip(["".ljust(first), *_left(names, first)], *columns, strict=True)
        ]
        blocks.append("\n".join([lines[0], "─" * min(used, width), *lines[1:]]))
    return "\n\n".join([_title(schedule, steps), *blocks])


def draw_svg(schedule: Schedule) -> str:
    """The text of an SVG file; ValueError where there would be too many arrows to see anything."""
    programs = [schedule.of(rank) for rank in range(schedule.size)]
    steps = max(map(len, programs))
    count = sum(len(step.sends) for program in programs for step in program)
    if count > MOST_MESSAGES:
        raise ValueError(f"{count} messages are too many for a picture; allowed: {MOST_MESSAGES}, so fewer ranks")
    crowded = any(len(step.sends) > 2 for program in programs for step in program)
    longest = max(
        (len(chunk_list(s.chunks)) for program in programs for step in program for s in step.sends), default=0
    )
    column = 96 if crowded else max(96, 60 + 7 * longest)
    title = _title(schedule, steps)
    width, height = max(LEFT + column * steps + 40, 32 + 8 * len(title)), TOP + ROW * schedule.size + 30

    def x(t: int) -> float:
        return LEFT + column * t

    def y(rank: int) -> float:
        return TOP + ROW * rank + ROW / 2

    parts = [
        _head(width, height),
        f'<text x="16" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    for t in range(steps):
        if t % 2 == 0:
            parts.append(
                f'<rect x="{x(t)}" y="{TOP - 20}" width="{column}" height="{height - TOP - 4}" fill="#f6f7f9"/>'
            )
        parts.append(f'<text x="{x(t) + column / 2}" y="{TOP - 6}" text-anchor="middle" fill="{FOLD}">step {t}</text>')
    for rank, program in enumerate(programs):
        parts.append(f'<path d="M{LEFT} {y(rank)}H{x(steps)}" stroke="{GRID}" stroke-width="2"/>')
        parts.append(f'<text x="16" y="{y(rank) + 4}">rank {rank}</text>')
        parts += [f'<circle cx="{x(t)}" cy="{y(rank)}" r="3" fill="{INK}"/>' for t in range(steps + 1)]
        parts += [
            f'<rect x="{x(t + 1) - 5}" y="{y(rank) - 5}" width="10" height="10" fill="{FOLD}">'
            f"<title>{escape('; '.join(map(str, step.folds)))}</title></rect>"
            for t, step in enumerate(program)
            if step.folds
        ]
    for t in range(steps):
        for rank, program in enumerate(programs):
            for receive in program[t].receives if t < len(program) else ():
                start, end = (x(t) + 5, y(receive.peer)), (x(t + 1) - 6, y(rank))
                label = "" if crowded else chunk_list(receive.chunks)
                parts.append(_arrow(start, end, ADD if receive.reduce else COPY, label))
    numbers = "" if crowded else "  numbers are chunks"
    parts.append(
        f'<text x="16" y="{height - 10}" fill="{FOLD}" font-size="11">'
        f'<tspan fill="{COPY}">→ copied</tspan>  <tspan fill="{ADD}">→ added</tspan>{numbers}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _title(schedule: Schedule, steps: int) -> str:
    cost, parameters = schedule.cost, ", ".join(f"{key}={value}" for key, value in schedule.parameters.items())
    title = f"{schedule.collective} {schedule.name}{f' ({parameters})' if parameters else ''}: {schedule.size} ranks, "
    title += f"{schedule.parts} chunks, {steps} steps"
    if cost.alpha == cost.alpha:  # a formula is known
        terms = [(cost.alpha, "α"), (cost.beta, "nβ"), (cost.gamma, "nγ")]
        title += "; " + (" + ".join(f"{factor:.4g}{unit}" for factor, unit in terms if factor) or "no time")
    return title


def _cell(step: Step) -> str:
    texts = [f"→{s.peer}{_chunks(s.chunks)}" for s in step.sends]
    texts += [f"←{r.peer}{_chunks(r.chunks, '+' if r.reduce else '')}" for r in step.receives]
    if len(texts) > 6:
        texts = [*texts[:5], f"and {len(texts) - 5} more"]
    return "  ".join([*texts, *map(str, step.folds)])


def _chunks(chunks: Sequence[int], sign: str = "") -> str:
    return f" {sign}c{chunk_list(chunks)}" if chunks else ""


def _left(names: Sequence[str], width: int) -> list[str]:
    return [name.ljust(width) for name in names]


def _head(width: float, height: float) -> str:
    markers = "".join(
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for colour in (COPY, ADD)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">\n<defs>{markers}</defs>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], colour: str, label: str) -> str:
    (x0, y0), (x1, y1) = start, end
    arrow = (
        f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{colour}" stroke-width="1.5" '
        f'marker-end="url(#{colour[1:]})"/>'
    )
    if not label:
        return arrow
    at = 0.28 if abs(y1 - y0) <= ROW else 0.16  # near the sender: long arrows cross in the middle
    lx, ly = x0 + at * (x1 - x0), y0 + at * (y1 - y0)
    text = f'<text x="{lx:.1f}" y="{ly - 4:.1f}" text-anchor="middle" font-size="11" '
    # Twice, for a white rim: not every viewer knows the order of painting (paint-order).
    return f'{arrow}\n{text}stroke="white" stroke-width="3">{label}</text>\n{text}fill="{colour}">{label}</text>'
