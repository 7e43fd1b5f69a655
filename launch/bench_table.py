"""What `dtrain bench COLLECTIVE` counts and prints: formulas, columns, files, and the comparison with an older run.

    size / time = algbw,   algbw x bus factor = busbw,   traffic x size / memory bandwidth = the memory bound

Sizes and factors are those of nccl-tests (doc/PERFORMANCE.md there): the size is the whole array of all_reduce,
broadcast, reduce and scans, and the p blocks together of all others; busbw then is what the slowest link must carry
whatever p is. GB = 1e9 bytes; K, M, G in sizes are powers of 1024. One row is one algorithm at one size, in place or
not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.errors import UserError

OUT_OF_PLACE, IN_PLACE = "out-of-place", "in-place"
ONE_WAY, BOTH_WAYS = "one-way", "both-ways"
BOUND_FROM = 64 * 1024  # bytes; below, a NumPy call costs more than the memory it touches


class Formula(NamedTuple):
    """What is known of a collective on p ranks, per byte of its size."""

    summary: str
    bus: Callable[[int], float]
    """busbw / algbw."""
    traffic: Callable[[int, int], float]
    """Bytes that all ranks together at least read and write: every input once, every result once. The second argument
    is 1 in place, where a rank's own block or array stays where it is, else 0."""
    reduces: bool = False


# fmt: off
COLLECTIVES: dict[str, Formula] = {
    "all_reduce":     Formula("the sum on every rank", lambda p: 2 * (p - 1) / p, lambda p, i: 2 * p, True),
    "reduce_scatter": Formula("the sum, a block on each rank", lambda p: (p - 1) / p, lambda p, i: p + 1, True),
    "all_gather":     Formula("the blocks of all ranks on every rank", lambda p: (p - 1) / p, lambda p, i: p + 1 - i),
    "all_to_all":     Formula("a block from each rank to each rank", lambda p: (p - 1) / p, lambda p, i: 2 * p - 2 * i),
    "broadcast":      Formula("the array of rank 0 on every rank", lambda p: 1, lambda p, i: p + 1 - i),
    "reduce":         Formula("the sum on rank 0", lambda p: 1, lambda p, i: p + 1, True),
    "gather":         Formula("the blocks of all ranks on rank 0", lambda p: (p - 1) / p, lambda p, i: 2 - 2 * i / p),
    "scatter":        Formula("a block of rank 0 on each rank", lambda p: (p - 1) / p, lambda p, i: 2 - 2 * i / p),
    "scan":           Formula("the sum up to each rank", lambda p: 1, lambda p, i: 2 * p, True),
    "exscan":         Formula("the sum before each rank", lambda p: 1, lambda p, i: 2 * (p - 1), True),
    "barrier":        Formula("everybody waits for everybody", lambda p: 0, lambda p, i: 0),
}
# fmt: on


def traffic(collective: str, algorithm: str, placing: str, ranks: int) -> float:
    """Least memory traffic per byte of the size; one result for all ranks needs fewer writes."""
    return ranks + 1 if algorithm == "shared" else COLLECTIVES[collective].traffic(ranks, int(placing == IN_PLACE))


@dataclass(frozen=True)
class Row:
    """One algorithm at one size. Times in microseconds, bandwidths in GB/s."""

    collective: str
    size: int
    count: int
    dtype: str
    op: str
    algorithm: str
    placing: str
    time: float
    """Median over iterations; each is the maximum over ranks."""
    p10: float
    p90: float
    iterations: int
    algbw: float
    busbw: float
    wrong: int
    """Wrong elements, of all ranks and checks together."""
    bound: float | None = None
    """The time that memory alone would take; None where it is not known."""
    avg: float | None = None
    """Of the means of the ranks; `fastest` and `slowest`: the least and the most of them (`bench_latency.py`)."""
    fastest: float | None = None
    slowest: float | None = None


def row(
    collective: str,
    what: tuple[int, int, str, str],
    algorithm: str,
    placing: str,
    seconds: Sequence[float],
    wrong: int,
    ranks: int,
    memory_bandwidth: float | None = None,
    means: Sequence[float] = (),
) -> Row:
    """The row of `seconds`, one value per iteration; what: size in bytes, count, dtype, op; bandwidth in bytes/s.

    means: seconds, of the calls of each rank.
    """
    size, count, dtype, op = what
    median, p10, p90 = (percentile(seconds, part) for part in (0.5, 0.1, 0.9))
    algbw = size / median / 1e9
    if placing in (ONE_WAY, BOTH_WAYS):
        factor = 2.0 if placing == BOTH_WAYS else 1.0
    else:
        factor = COLLECTIVES[collective].bus(ranks)
    bound = None
    if memory_bandwidth is not None and size >= BOUND_FROM:
        bound = traffic(collective, algorithm, placing, ranks) * size / memory_bandwidth * 1e6
    times = (median * 1e6, p10 * 1e6, p90 * 1e6, len(seconds))
    means = means or [sum(seconds) / len(seconds)]
    of_ranks = (1e6 * sum(means) / len(means), 1e6 * min(means), 1e6 * max(means))
    return Row(
        collective, size, count, dtype, op, algorithm, placing, *times, algbw, algbw * factor, wrong, bound, *of_ranks
    )  # fmt: skip


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of all values lie, on a straight line between two; 0.5 is the median."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# --- sizes ------------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_sizes(text: str, factor: float = 2.0) -> tuple[int, ...]:
    """Bytes of `1K:64M` (times `factor` from the first up to the last), `1K,3M` or both; ascending; UserError."""
    if not factor > 1:
        raise UserError(f"--factor {factor:g}: must be more than 1")
    sizes: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.partition(":")
        low, high = _bytes(first, text), _bytes(last if colon else first, text)
        if high < low:
            raise UserError(f"--sizes {text}: {first} is more than {last}")
        exact = float(low)
        while exact <= high * (1 + 1e-9):
            sizes.add(round(exact))
            exact *= factor
    return tuple(sorted(sizes))


def _bytes(text: str, whole: str) -> int:
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
    try:
        found = float(number.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        found = math.nan
    if not (1 <= found < 1 << 50) or found != int(found):
        raise UserError(f"--sizes {whole}: {text!r} is no size; such as 4096, 64K, 1M, 1K:64M or 1K,1M,16M")
    return int(found)


# --- the table --------------------------------------------------------------------------------------------------------

# Title, unit, width, value. Between the columns is one space.
_LEFT: tuple[tuple[str, str, int, Callable[[Row], str]], ...] = (
    ("size", "(B)", 11, lambda row: str(row.size)),
    ("count", "(elements)", 10, lambda row: str(row.count)),
    ("type", "", 8, lambda row: row.dtype),
    ("redop", "", 5, lambda row: row.op or "-"),
    ("algorithm", "", 10, lambda row: row.algorithm),
)
_RIGHT: tuple[tuple[str, str, int], ...] = (
    ("time", "(us)", 9),
    ("p10", "(us)", 9),
    ("p90", "(us)", 9),
    ("algbw", "(GB/s)", 7),
    ("busbw", "(GB/s)", 7),
    ("bound", "", 5),
    ("native", "", 7),
    ("#wrong", "", 6),
)


def titles(placings: Sequence[str]) -> list[str]:
    """The three lines above the rows."""
    wide = sum(width + 1 for _, _, width in _RIGHT) - 1
    left = " ".join(" " * width for _, _, width, _ in _LEFT)
    groups = [left, *(f" {placing} ".center(wide, "-") for placing in placings)]
    names = [f"{title:>{width}}" for title, _, width, _ in _LEFT]
    units = [f"{unit:>{width}}" for _, unit, width, _ in _LEFT]
    for _ in placings:
        names += [f"{title:>{width}}" for title, _, width in _RIGHT]
        units += [f"{unit:>{width}}" for _, unit, width in _RIGHT]
    return ["#" + line[1:] for line in (" ".join(groups), " ".join(names), " ".join(units))]


def line(rows: Sequence[Row | None], native: float | None = None) -> str:
    """The rows of one algorithm at one size, one per placing (None: not possible); native: time to compare with."""
    known = next(each for each in rows if each is not None)
    cells = [f"{value(known):>{width}}" for _, _, width, value in _LEFT]
    for each in rows:
        values = ["-"] * len(_RIGHT) if each is None else _values(each, native)
        cells += [f"{value:>{width}}" for value, (_, _, width) in zip(values, _RIGHT, strict=True)]
    return " ".join(cells)


def _values(row: Row, native: float | None) -> list[str]:
    return [
        *(f"{time:.2f}" if time < 1e5 else f"{time:.0f}" for time in (row.time, row.p10, row.p90)),
        f"{row.algbw:.2f}",
        f"{row.busbw:.2f}",
        "-" if row.bound is None else f"{row.bound / row.time:.0%}",
        "-" if native is None else f"{native / row.time:.2f}x",
        str(row.wrong),
    ]


def native_time(rows: Iterable[Row]) -> float | None:
    """The base of the column `native` among the rows of one size: the library's own call, the fastest way to make it.

    `native` may be slower than `bare`: with several ranks on a node it comes together first, to tell mistakes.
    """
    return min((row.time for row in rows if row.algorithm in ("native", "bare")), default=None)


def footer(rows: Sequence[Row]) -> list[str]:
    """The last lines: wrong values and the average bus bandwidth, as nccl-tests ends."""
    wrong = sum(row.wrong for row in rows)
    average = sum(row.busbw for row in rows) / len(rows) if rows else 0.0
    verdict = "OK" if wrong == 0 else "WRONG"
    return [f"# Wrong values: {wrong} {verdict}", f"# Average bus bandwidth: {average:.3f} GB/s"]


# --- files ------------------------------------------------------------------------------------------------------------


def as_json(result: dict[str, Any]) -> str:
    """Everything: config, header, rows, fits."""
    plain = {**result, "rows": [asdict(row) for row in result["rows"]]}
    return json.dumps(plain, indent=1) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line per row; the columns are the fields of Row."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read(path: Path) -> dict[str, Any]:
    """What `--json` wrote once; UserError for anything else."""
    try:
        result = json.loads(path.read_text())
        result["rows"] = [Row(**row) for row in result["rows"]]
        missing = {"config", "header"} - set(result)
    except OSError as error:
        raise UserError(f"--compare {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        missing = {"rows"}
    if missing:
        raise UserError(f"--compare {path}: not a file that dtrain bench COLLECTIVE --json wrote")
    return dict(result)


_CONDITIONS = ("ranks", "memory", "cold")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The times of both for every row that both have, and old / new: above 1 the new one is faster."""

    def key(row: Row) -> tuple[object, ...]:
        return row.collective, row.size, row.dtype, row.op, row.algorithm, row.placing

    before = {key(row): row for row in old["rows"]}
    pairs = [(before[key(row)], row) for row in new["rows"] if key(row) in before]
    lines = []
    for word in _CONDITIONS:
        then, now = old["config"].get(word), new["config"].get(word)
        if then != now:
            lines.append(f"# NOT the same conditions: {word} {then} then, {now} now")
    for word in ("mpi", "processor", "cores"):
        then, now = old["header"].get(word), new["header"].get(word)
        if then != now:
            lines.append(f"# {word}: {then} then, {now} now")
    lines.append(
        f"# {'collective':<14} {'size':>11} {'algorithm':>10} {'placing':>12} {'old (us)':>10} {'new (us)':>10} "
        f"{'old/new':>8}"
    )
    for then_row, row in pairs:
        lines.append(
            f"  {row.collective:<14} {row.size:>11} {row.algorithm:>10} {row.placing:>12} {then_row.time:>10.2f} "
            f"{row.time:>10.2f} {then_row.time / row.time:>7.2f}x"
        )
    if pairs:
        ratios = [then_row.time / row.time for then_row, row in pairs]
        lines.append(f"# median of {len(ratios)} ratios: {percentile(ratios, 0.5):.2f}x; lowest {min(ratios):.2f}x")
    else:
        lines.append("# no row is in both")
    return lines
