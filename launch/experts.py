"""What a run with mixtures of experts tells of them: a line in the log, and a picture of the loads over the steps.

experts  load 0.62 to 1.41 of the even share, entropy 2.01 of 2.08, dropped 3.1 %, without expert 3.1 %

experts.svg   a panel per mixture; a row per expert, a column per logged step    ░ few ▒ even ▓ many tokens
              and below it the share of dropped choices
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dtrain.launch.pictures import FONT

WIDTH, LEFT, ROW, GAP, DROPS = 760, 64, 14, 34, 40
INK, DROPPED = "#1f2937", "#d9662b"


def line(details: Mapping[str, Any]) -> str:
    """The extremes and means over all mixtures, of one step."""
    loads = [share * len(load) for load in details["load"] for share in load]

    def mean(key: str) -> float:
        return float(sum(details[key]) / len(details[key]))

    return (
        f"experts  load {min(loads):.2f} to {max(loads):.2f} of the even share, entropy {mean('entropy'):.2f} of "
        f"{math.log(len(details['load'][0])):.2f}, dropped {100 * mean('dropped'):.1f} %, without expert "
        f"{100 * mean('without_expert'):.1f} %"
    )


def picture(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path | None:
    """Write experts.svg from the rows of metrics.jsonl; None where they tell of no experts."""
    rows = [row for row in metrics if "experts" in row]
    if not rows:
        return None
    mixtures, experts = len(rows[0]["experts"]["load"]), len(rows[0]["experts"]["load"][0])
    panel = GAP + ROW * experts + DROPS
    height, column = 70 + panel * mixtures, (WIDTH - LEFT - 24) / len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'{FONT} font-size="11" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="{LEFT}" y="42">white: no tokens; blue: the even share; darker: twice as many and more</text>',
    ]
    for mixture in range(mixtures):
        top = 46 + panel * mixture + GAP
        parts.append(f'<text x="{LEFT}" y="{top - 6}">mixture {mixture + 1} of {mixtures}: load of each expert</text>')
        for expert in range(experts):
            parts.append(f'<text x="{LEFT - 8}" y="{top + ROW * expert + 11}" text-anchor="end">{expert}</text>')
            for i, row in enumerate(rows):
                load = row["experts"]["load"][mixture][expert] * experts
                place = f'x="{LEFT + i * column:.2f}" y="{top + ROW * expert}" width="{column + 0.3:.2f}"'
                parts.append(
                    f'<rect {place} height="{ROW - 1}" fill="{_shade(load)}"><title>step {row["step"]}: {load:.2f}'
                    "</title></rect>"
                )
        base = top + ROW * experts + DROPS - 14
        points = [
            (LEFT + (i + 0.5) * column, base - (DROPS - 18) * row["experts"]["dropped"][mixture])
            for i, row in enumerate(rows)
        ]
        told = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        last = rows[-1]["experts"]["dropped"][mixture]
        parts.append(f'<path d="M{LEFT} {base}H{WIDTH - 24}" stroke="#e5e7eb"/>')
        parts.append(f'<path d="M{told}" fill="none" stroke="{DROPPED}" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT}" y="{base + 11}" fill="{DROPPED}">dropped, at the end {100 * last:.1f} %</text>')
    first, end = rows[0]["step"], rows[-1]["step"]
    parts.append(f'<text x="{WIDTH - 24}" y="{height - 8}" text-anchor="end">steps {first} to {end}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
    return path


def _shade(load: float) -> str:
    """From white (0) over blue (1) to dark blue (2 and more)."""
    ends = ((255, 255, 255), (96, 150, 205)) if load <= 1 else ((96, 150, 205), (16, 42, 90))
    part = load if load <= 1 else min(load, 2.0) - 1
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))
