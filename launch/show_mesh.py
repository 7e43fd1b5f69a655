"""`dtrain show mesh`: which rank has which place on the mesh and on which host, and who communicates with whom.

    pp=0            tp ─►
           dp=0     0  1  │  host0          columns: the fastest axis; rows: the next one; a panel for each place on
           dp=1     2  3  │  host0          the others. Neighbours in a row are neighbours on a host.

The same numbers as in the log of a run, without starting one.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch.configuration import for_ranks
from dtrain.mesh import Grid

COLORS = ("#cfe3ff", "#ffe1c4", "#d7f0d0", "#f6d0e0", "#e6dcf7", "#fff2b3", "#cdeff0", "#e3e3e3")  # of hosts, in turns
CELL, GAP, LEFT, TOP = 44, 26, 64, 34
MOST_CELLS = 4096


def show_mesh(config: Config, ranks: int, per_host: int | None, output: Path | None) -> None:
    """Print the table, the picture and the groups of the mesh of `config` on `ranks` ranks; the picture to an SVG too.

    per_host: ranks on one host, host by host, as mpirun places them; default: all on one.
    """
    p = for_ranks(config, ranks).parallel
    grid = Grid(ranks, {"pp": p.pp, "dp": p.dp, "cp": p.cp, "ep": p.ep, "tp": p.tp}, p.order, p.tensor_grid())
    hosts = [f"host{rank // (per_host or ranks)}" for rank in range(ranks)]
    print("\n".join(grid.table(hosts)))
    print("\n" + "\n".join(picture(grid)))
    for axis in long_axes(grid):
        apart = sum(len({hosts[rank] for rank in group}) > 1 for group in grid.groups(axis))
        groups = grid.groups(axis)
        where = "each on one host" if not apart else f"{apart} of them on several hosts"
        print(f"{axis}: {len(groups)} group{'s' * (len(groups) > 1)} of {len(groups[0])} ranks, {where}")
    if output is not None:
        if ranks > MOST_CELLS:
            raise UserError(f"--ranks {ranks}: too many for a picture; allowed: {MOST_CELLS}")
        try:
            output.write_text(svg(grid, hosts), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {output}: cannot be written: {error.strerror}") from None
        print(f"{output}: written")


def long_axes(grid: Grid) -> list[str]:
    """The axes with more than one place, slowest first; dp where there is none."""
    return [axis for axis in grid.axes if grid.sizes[axis] > 1] or ["dp"]


def panels(grid: Grid) -> Iterator[tuple[str, list[tuple[str, list[int]]]]]:
    """(places on the slow axes, rows of (place on the second fastest axis, ranks along the fastest))."""
    axes = long_axes(grid)
    columns, rows, slow = axes[-1], axes[-2:-1], axes[:-2]
    for ranks in grid.groups(*rows, columns):
        places = grid.coordinates_of(ranks[0])
        width = grid.size(columns)
        lines = [ranks[i : i + width] for i in range(0, len(ranks), width)]
        told = [" ".join(f"{axis}={grid.coordinates_of(line[0])[axis]}" for axis in rows) for line in lines]
        yield " ".join(f"{axis}={places[axis]}" for axis in slow), list(zip(told, lines, strict=True))


def picture(grid: Grid, most: int = 256) -> Iterator[str]:
    """The panels as lines of text."""
    wide = len(str(grid.num_ranks - 1)) + 2
    shown = 0
    for title, rows in panels(grid):
        if shown >= most:
            yield f"… and {grid.num_ranks - shown} more ranks"
            return
        yield f"{title:<16} {long_axes(grid)[-1]} ─►".rstrip()
        for place, ranks in rows:
            yield f"{place:>14}   " + "".join(f"{rank:>{wide}}" for rank in ranks)
            shown += len(ranks)
        yield ""


def svg(grid: Grid, hosts: list[str]) -> str:
    """The panels as a picture: a cell for each rank, colored by host."""
    names = list(dict.fromkeys(hosts))
    parts, y, right = [], 10, 0
    for title, rows in panels(grid):
        head = f"{title}   {long_axes(grid)[-1]} →"
        parts.append(f'<text x="10" y="{y + 16}" font-weight="bold">{html.escape(head)}</text>')
        y += TOP
        for place, ranks in rows:
            parts.append(f'<text x="10" y="{y + CELL / 2 + 4}">{html.escape(place)}</text>')
            for column, rank in enumerate(ranks):
                x = LEFT + column * CELL
                color = COLORS[names.index(hosts[rank]) % len(COLORS)]
                places = " ".join(f"{axis}={at}" for axis, at in grid.coordinates_of(rank).items())
                parts.append(
                    f"<g><title>rank {rank}: {places}, {html.escape(hosts[rank])}</title>"
                    f'<rect x="{x}" y="{y}" width="{CELL - 4}" height="{CELL - 4}" fill="{color}" stroke="#666"/>'
                    f'<text x="{x + CELL / 2 - 2}" y="{y + CELL / 2 + 3}" text-anchor="middle">{rank}</text></g>'
                )
                right = max(right, x + CELL)
            y += CELL
        y += GAP
    for i, name in enumerate(names[: len(COLORS)]):
        parts.append(f'<rect x="{10 + 90 * i}" y="{y}" width="14" height="14" fill="{COLORS[i]}" stroke="#666"/>')
        parts.append(f'<text x="{30 + 90 * i}" y="{y + 12}">{html.escape(name)}</text>')
        right = max(right, 90 * (i + 1))
    sizes = f'viewBox="0 0 {right + 10} {y + 30}" width="{right + 10}" height="{y + 30}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {sizes} font-family="sans-serif" font-size="12">'
    background = f'<rect width="{right + 10}" height="{y + 30}" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])
