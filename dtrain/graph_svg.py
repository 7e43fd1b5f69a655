"""The picture of a graph: layers from top to bottom, modules as frames, skip connections in a gutter at the left.

      gutter   lane 0              lane 1
              ┌─ blocks.0 ──────────────────────┐
        ╭─────│ [layer_norm]                    │     a box per op: name, output shape, parameters, FLOP, bytes
        │     │      │                          │     row  = longest path from a source
        │     │ [linear]──────────[linear]      │     lane = that of the input it continues, if still free
        ╰─────│►[bias_residual]                 │     the bar at the bottom of a box: its share of the FLOP
              └─────────────────────────────────┘

Invariant: a direct edge never runs through a box: where the way is not clear it takes the gutter, in which two edges
share a track only where they do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from dtrain.graph import Graph, Leaf, Line, short

WIDTH, HEIGHT, GAP, LANE_GAP, TRACK, PAD, LABEL = 280, 46, 20, 36, 12, 8, 14

COLOURS = {  # fill by kind of op
    "#fde2c8": ("matmul", "linear", "attention", "packed_attention"),
    "#d7e8fb": ("layer_norm", "rms_norm", "softmax", "log_softmax"),
    "#dff3da": ("embedding", "gather"),
    "#f9d5dc": ("cross_entropy",),
    "#efefef": ("reshape", "permute", "index", "broadcast_to", "concat", "stack", "astype"),
}
FILL = {op: colour for colour, ops in COLOURS.items() for op in ops}
ELSE = "#f5f0d8"


def draw(graph: Graph) -> str:
    """The text of an SVG file."""
    rows, lanes = _place(graph)
    frames = _frames(graph)
    tops, height = _heights(graph, rows, frames)
    straight, detours = _route(graph, rows, lanes)
    tracks = _tracks(detours, rows)
    left = 30 + TRACK * (1 + max(tracks.values(), default=0)) + PAD * _depth(frames)
    x = [float(left + lane * (WIDTH + LANE_GAP)) for lane in lanes]
    y = [tops[row] for row in rows]
    width = max(max(x) + WIDTH + 30 + PAD * _depth(frames), 620)  # the summary needs some room

    parts = [_frame(scope, members, frames, x, y) for scope, members in frames.items()]
    for a, b in straight:
        parts.append(_edge(x[a] + WIDTH / 2, y[a] + HEIGHT, x[b] + WIDTH / 2, y[b]))
    for a, b in detours:
        parts.append(_detour((x[a], y[a], lanes[a]), (x[b], y[b], lanes[b]), 24 + TRACK * tracks[a, b]))
    peak = max([line.flops for line in graph.lines] + [1])
    parts += [_box(line, x[line.number], y[line.number], line.flops / peak) for line in graph.lines]
    summary = (
        f"{len(graph.lines)} ops · {short(graph.flops)} FLOP forward · {short(graph.bytes, 1024)}B of outputs · "
        f"{graph.num_parameters:,} parameters"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="11">\n'
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 6 3 0 6z" fill="#666"/></marker></defs>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="20" y="26" font-size="15">{summary}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _place(graph: Graph) -> tuple[list[int], list[int]]:
    """The row and the lane of every line."""
    rows: list[int] = []
    lanes: list[int] = []
    last_use = list(range(len(graph.lines)))
    for line in graph.lines:
        for source in _sources(line):
            last_use[source] = line.number
    ends: dict[int, int] = {}  # lane -> the newest line in it
    for line in graph.lines:
        sources = _sources(line)
        row = 1 + max([rows[s] for s in sources], default=-1)
        continued = sorted([lanes[s] for s in sources if ends[lanes[s]] == s])
        if continued:
            lane = continued[0]
        else:  # a lane whose newest line is above this row and no longer waited for
            lane = 0
            while lane in ends and (rows[ends[lane]] >= row or last_use[ends[lane]] > line.number):
                lane += 1
        rows.append(row)
        lanes.append(lane)
        ends[lane] = line.number
    return rows, lanes


def _sources(line: Line) -> list[int]:
    return sorted({source for source in line.inputs if isinstance(source, int)})


def _frames(graph: Graph) -> dict[str, list[int]]:
    """Scope -> its lines, outer scopes first; of scopes with the same lines the innermost, and no scope of one line."""
    members: dict[str, list[int]] = {}
    for line in graph.lines:
        parts = line.scope.split(".") if line.scope else []
        for depth in range(1, len(parts) + 1):
            members.setdefault(".".join(parts[:depth]), []).append(line.number)
    framed = {}
    for scope, lines in members.items():
        inner = [other for other in members if other.startswith(scope + ".")]
        is_list = inner and all([other[len(scope) + 1 :].split(".")[0].isdigit() for other in inner])
        if len(lines) > 1 and not is_list and not any([members[other] == lines for other in inner]):
            framed[scope] = lines
    return dict(sorted(framed.items(), key=lambda item: item[0].count(".")))


def _inside(scope: str, frames: Iterable[str]) -> int:
    return sum([scope.startswith(other + ".") for other in frames])


def _depth(frames: dict[str, list[int]]) -> int:
    return max([1 + _inside(scope, frames) for scope in frames], default=0)


def _heights(graph: Graph, rows: list[int], frames: dict[str, list[int]]) -> tuple[list[float], float]:
    """The y of every row: room for the labels of the frames that begin there and the borders that end above."""
    count = max(rows) + 1
    begin, end = [0] * count, [0] * count
    for line in graph.lines:
        around = [[rows[m] for m in members] for members in frames.values() if line.number in members]
        row = rows[line.number]
        begin[row] = max(begin[row], sum([min(spread) == row for spread in around]))
        end[row] = max(end[row], sum([max(spread) == row for spread in around]))
    tops, y = [], 50.0
    for row in range(count):
        y += begin[row] * (PAD + LABEL)
        tops.append(y)
        y += HEIGHT + GAP + end[row] * PAD
    return tops, y + 10


def _route(graph: Graph, rows: list[int], lanes: list[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All edges, divided into those with a clear way and those that take the gutter."""
    taken = {(rows[i], lanes[i]) for i in range(len(rows))}
    straight: list[tuple[int, int]] = []
    detours: list[tuple[int, int]] = []
    for line in graph.lines:
        for source in _sources(line):
            a, b = rows[source], rows[line.number]
            # down in the lane of the source, then over to the lane of the target in the gap above it
            clear = not any([(row, lanes[source]) in taken for row in range(a + 1, b)])
            (straight if clear else detours).append((source, line.number))
    return straight, detours


def _tracks(detours: list[tuple[int, int]], rows: list[int]) -> dict[tuple[int, int], int]:
    """Interval colouring: short edges near the boxes (high tracks are at the right)."""
    used: list[list[tuple[int, int]]] = []
    chosen = {}
    for a, b in sorted(detours, key=lambda edge: rows[edge[1]] - rows[edge[0]]):
        span = (rows[a], rows[b])
        track = 0
        while track < len(used) and any([s < span[1] and span[0] < t for s, t in used[track]]):
            track += 1
        if track == len(used):
            used.append([])
        used[track].append(span)
        chosen[a, b] = track
    return {edge: len(used) - 1 - track for edge, track in chosen.items()}


def _edge(x1: float, y1: float, x2: float, y2: float) -> str:
    if x1 == x2:
        way = f"M{x1:.0f} {y1:.0f}V{y2:.0f}"
    else:
        bend = y2 - GAP
        way = f"M{x1:.0f} {y1:.0f}V{bend:.0f}C{x1:.0f} {y2:.0f} {x2:.0f} {bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{way}" fill="none" stroke="#666" marker-end="url(#tip)"/>'


def _detour(start: tuple[float, float, int], end: tuple[float, float, int], gutter: float) -> str:
    """Through the gutter. Lane 0 is left and entered at the side, other lanes by the gaps between the rows."""
    (x1, y1, lane1), (x2, y2, lane2) = start, end
    r = 6
    if lane1:
        way, y1 = f"M{x1 + 40:.0f} {y1 + HEIGHT:.0f}v{r}", y1 + HEIGHT + r
    else:
        way, y1 = f"M{x1:.0f} {y1 + HEIGHT * 0.7:.0f}", y1 + HEIGHT * 0.7
    arrival, entry = (y2 - 10, f"H{x2 + 40:.0f}V{y2:.0f}") if lane2 else (y2 + HEIGHT * 0.3, f"H{x2:.0f}")
    way += (
        f"H{gutter + r:.0f}Q{gutter:.0f} {y1:.0f} {gutter:.0f} {y1 + r:.0f}"
        f"V{arrival - r:.0f}Q{gutter:.0f} {arrival:.0f} {gutter + r:.0f} {arrival:.0f}{entry}"
    )
    return f'<path d="{way}" fill="none" stroke="#2f6fb5" marker-end="url(#tip)"/>'


def _frame(scope: str, members: list[int], frames: dict[str, list[int]], x: list[float], y: list[float]) -> str:
    inner = max([1 + _inside(other, frames) for other in frames if other.startswith(scope + ".")], default=0)
    margin = PAD * (1 + max(inner - _inside(scope, frames) - 1, 0))
    starting = [other for other in frames if other.startswith(scope + ".") and min(frames[other]) == min(members)]
    left = min([x[m] for m in members]) - margin
    right = max([x[m] for m in members]) + WIDTH + margin
    top = min([y[m] for m in members]) - PAD - LABEL * (1 + len(starting)) - PAD * len(starting) + 4
    bottom = max([y[m] for m in members]) + HEIGHT + margin
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{right - left:.0f}" height="{bottom - top:.0f}" rx="6" '
        f'fill="#000" fill-opacity="0.03" stroke="#bbb"/>'
        f'<text x="{left + 6:.0f}" y="{top + 12:.0f}" fill="#777">{escape(scope)}</text>'
    )


def _box(line: Line, x: float, y: float, share: float) -> str:
    shape = "×".join(map(str, line.shape)) or "scalar"
    leaves = [s for s in line.inputs if isinstance(s, Leaf)]
    names = ", ".join([f"{leaf.label} {_shape(leaf)}" for leaf in leaves])
    inputs = ", ".join(["×".join(map(str, s)) or "scalar" for s in line.input_shapes])
    cost = f"{short(line.flops)} FLOP · {short(line.bytes, 1024)}B" if line.flops else f"{short(line.bytes, 1024)}B"
    where = f" in {line.scope}" if line.scope else ""
    title = f"#{line.number} {line.op}({inputs}) -> {shape} {line.dtype}{where}"
    return (
        f'<g><title>{escape(title)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
        f'fill="{FILL.get(line.op, ELSE)}" stroke="#888"/>'
        f'<rect x="{x + 1:.0f}" y="{y + HEIGHT - 4:.0f}" width="{(WIDTH - 2) * share:.1f}" height="3" fill="#d9822b"/>'
        f'<text x="{x + 8:.0f}" y="{y + 16:.0f}" font-weight="bold">{escape(line.op)}</text>'
        f'<text x="{x + WIDTH - 8:.0f}" y="{y + 16:.0f}" text-anchor="end">{escape(shape)}</text>'
        f'<text x="{x + 8:.0f}" y="{y + 33:.0f}" fill="#555" font-size="10">{escape(_fit(names))}</text>'
        f'<text x="{x + WIDTH - 8:.0f}" y="{y + 33:.0f}" fill="#555" font-size="10" text-anchor="end">{cost}</text></g>'
    )


def _shape(leaf: Leaf) -> str:
    return "×".join(map(str, leaf.shape)) or "scalar"


def _fit(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
