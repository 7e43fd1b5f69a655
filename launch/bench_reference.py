"""Times of other programs beside ours: what IMB-MPI1 and the OSU microbenchmarks printed, and Gloo's rows of this run.

    mpirun -n 8 IMB-MPI1 Allreduce > imb.txt            # Benchmarking Allreduce    #bytes … t_max[usec]
    mpirun -n 8 osu_allreduce -f > osu.txt              # OSU MPI Allreduce …       Size … Max Latency(us)
    mpirun -n 8 dtrain bench all_reduce --sizes 4K,1M --reference imb.txt --reference osu.txt

They count bytes in their own ways: of one block where several come together or go out (all_gather, gather, scatter,
all_to_all), as MPI's counts do. Here they become the size of `bench_table`, the p blocks together. Their time is the
mean of the slowest rank, not the median of the slowest rank of each iteration: near, but not the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UserError
from dtrain.launch.bench_table import Row

# What the programs call it -> our name
NAMES = {
    "allreduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "all-to-all": "all_to_all",
    "bcast": "broadcast",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "scan": "scan",
    "exscan": "exscan",
    "barrier": "barrier",
}
BY_BLOCK = ("all_gather", "all_to_all", "gather", "scatter")

_IMB = re.compile(r"#\s*Benchmarking\s+(\S+)")
_IMB_RANKS = re.compile(r"#\s*#processes\s*=\s*(\d+)")
_OSU = re.compile(r"#\s*OSU MPI\s+(\S+)(?:\s+(?:Personalized|Exchange))*\s+Latency Test")


@dataclass(frozen=True)
class Reference:
    """Times of one collective from one program."""

    source: str
    """Told to the user: file and program."""
    collective: str
    ranks: int
    times: dict[int, float]
    """Size in bytes, as `bench_table` counts it -> microseconds."""


def read(path: Path, ranks: int) -> list[Reference]:
    """What the file has for so many ranks; UserError when it has nothing, or nothing that is known here."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--reference {path}: cannot be read: {error.strerror}") from None
    found = list(_tables(path, lines, ranks))
    if not found:
        raise UserError(
            f"--reference {path}: no table of IMB-MPI1 or of the OSU microbenchmarks in it, of {', '.join(set(NAMES))}"
        )
    fitting = [table for table in found if table.ranks == ranks]
    if not fitting:
        there = ", ".join(map(str, sorted({table.ranks for table in found})))
        raise UserError(f"--reference {path}: measured on {there} ranks, and this run has {ranks}")
    return fitting


def _tables(path: Path, lines: Sequence[str], ranks: int) -> Iterator[Reference]:
    """Every table of the file; OSU does not tell the number of ranks, so it is taken for this run's."""
    collective, program, of, column, first = "", "", ranks, -1, 0
    times: dict[int, float] = {}

    def table() -> Iterator[Reference]:
        if collective and times:
            factor = of if collective in BY_BLOCK else 1
            sized = {size * factor: time for size, time in times.items()}
            yield Reference(f"{path.name}: {program}", collective, of, sized)

    for line in lines:
        started = _IMB.match(line.strip()) or _OSU.match(line.strip())
        if started:
            yield from table()
            program = f"{'OSU' if 'OSU' in line else 'IMB'} {started[1]}"
            collective, of, column, times = NAMES.get(started[1].lower(), ""), ranks, -1, {}
        elif counted := _IMB_RANKS.match(line.strip()):
            of = int(counted[1])
        elif "t_max[usec]" in line:
            names = line.split()
            column, first = names.index("t_max[usec]"), names.index("#bytes") if "#bytes" in names else -1
        elif "Latency(us)" in line or "Latency (us)" in line:
            names = re.split(r"\s{2,}", line.strip().lstrip("# ").replace("Latency (us)", "Latency(us)"))
            slowest = [i for i, name in enumerate(names) if name.startswith("Max")]
            mean = [i for i, name in enumerate(names) if name.startswith("Avg")]
            column, first = (slowest or mean)[0], names.index("Size") if "Size" in names else -1
        else:
            words = line.split()
            if column >= 0 and len(words) > column and all(_is_number(word) for word in words):
                times[int(words[first]) if first >= 0 else 0] = float(words[column])
    yield from table()


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[\d.]+", word) is not None


# --- beside ours ------------------------------------------------------------------------------------------------------


def beside(
    rows: Iterable[Row], collective: str, name: str, times: Mapping[int, float], ours: Sequence[str]
) -> list[str]:
    """A table: for each size the other's time, and for each of our algorithms the faster placing and the ratio."""
    mine = [row for row in rows if row.collective == collective]
    algorithms = [each for each in ours if any(row.algorithm == each for row in mine)]
    lines = [f"# {collective}, {name}: time in us; of ours, and theirs / ours (above 1: ours is faster)"]
    lines.append("#" + f"{'size':>11} {'theirs':>11}" + "".join(f" {each:>11} {'':>8}" for each in algorithms))
    for size in sorted({row.size for row in mine} & set(times)):
        cells = f" {size:>11} {times[size]:>11.2f}"
        for each in algorithms:
            time = min((row.time for row in mine if row.size == size and row.algorithm == each), default=None)
            cells += f" {'-':>11} {'':>8}" if time is None else f" {time:>11.2f} {times[size] / time:>7.2f}x"
        lines.append(cells)
    if len(lines) == 2:
        told = ", ".join(map(str, sorted(times)[:6]))
        return [f"# {collective}, {name}: none of its sizes was measured here; it has {told}, …"]
    return lines


def times_of(rows: Iterable[Row], collective: str, algorithm: str) -> dict[int, float]:
    """Size -> time of one of this run's rows, the faster placing."""
    times: dict[int, float] = {}
    for row in rows:
        if row.collective == collective and row.algorithm == algorithm:
            times[row.size] = min(row.time, times.get(row.size, row.time))
    return times
