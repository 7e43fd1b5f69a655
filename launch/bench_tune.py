"""`dtrain bench tune`: which algorithm is the fastest on this machine; the answer is what `auto` goes by from then on.

    for each group of ranks (all of them, halves, quarters, … pairs, all groups of a kind at once, as in a mesh)
      for arrays in the window and elsewhere, each collective, each length:
        all algorithms, a few runs each       ─►  those near the best, many runs      ─►  an order, in the table

The machinery is that of `dtrain bench COLLECTIVE`: contestants take turns in blocks, every block begins with a checked
run, an iteration takes as long as its slowest rank, the median counts. An algorithm with a wrong element is told and
left out. The built-in choice stays where nothing is faster by more than MARGIN: noise shall not decide. What an earlier
run measured for other groups and lengths stays in the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain import __version__
from dtrain.cache import write_atomic
from dtrain.collectives import Communicator, tuning
from dtrain.collectives.tuning import Measured, Table
from dtrain.errors import UserError
from dtrain.launch import bench_cases, bench_collectives, bench_contest, bench_memory, bench_table, environment
from dtrain.launch.bench_cases import Pattern, Place
from dtrain.launch.bench_collectives import Options, Tell
from dtrain.launch.bench_contest import BLOCKS, Contestant
from dtrain.launch.bench_memory import Memory
from dtrain.launch.bench_table import COLLECTIVES, IN_PLACE, OUT_OF_PLACE

CHOOSABLE = tuple(name for name in COLLECTIVES if name != "barrier")
MARGIN = 1.05  # times faster than the built-in choice
NEAR = 1.5  # times slower than the best of the first runs: measured again, longer
QUICK_SECONDS = 0.03


@dataclass
class Progress:
    """What has been measured on this group."""

    measured: list[Measured] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def tune(
    collectives: Sequence[str], sizes: Sequence[int], quick: bool = False, path: Path | None = None, tell: Tell = print
) -> Table:
    """Measure on all ranks of the job, write the table on rank 0; the same table on all ranks. Collective.

    sizes in bytes, as `dtrain bench` counts them; quick: the group of all ranks only, short runs; path: of the file.
    """
    from dtrain.collectives import mpi, world

    for name in collectives:
        if name not in CHOOSABLE:
            raise UserError(f"--collectives {name}: not a collective with algorithms; allowed: {', '.join(CHOOSABLE)}")
    comm = world(tuned=False)
    environment.check_world(comm.size)
    if comm.size == 1:
        raise UserError("bench tune: one rank has nothing to choose; mpirun -n RANKS dtrain bench tune")
    told = tell if comm.rank == 0 else (lambda text: None)
    key = tuning.key(mpi.library(), __version__)
    path = tuning.path(key) if path is None else path
    told(f"# {comm.size} ranks, {' '.join(key['mpi'].split())}, {key['processor']}; times in us")
    measured: list[Measured] = []
    for name, group in groups(comm, quick):
        told(f"# {name}")
        found = _measure(group, collectives, sizes, quick, told)
        measured += found.measured
        for text in found.wrong:
            told(f"# WRONG, left out: {text}")
        if group is not comm:
            group.close()
    table = Table.of(key, _merged(comm, path, key, measured))
    brought = comm.broadcast_object(tuning.pack(table).decode() if comm.rank == 0 else "")
    problem = ""
    if comm.rank == 0:
        try:
            write_atomic(path, table.as_json().encode())
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror}); set DTRAIN_CACHE to a folder that can"
    problem = comm.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    use = "runs on this machine use it" if path == tuning.path(key) else f"DTRAIN_TUNING={path} uses it"
    told(f"# {path}: {len(measured)} lengths measured now, {len(table.measured)} in all; {use}")
    comm.close()
    result = tuning.unpack(brought.encode())
    assert result is not None
    return result


def groups(comm: Communicator, quick: bool) -> Iterator[tuple[str, Communicator]]:
    """(what it is, this rank's communicator) of each kind of groups to measure. Collective."""
    nodes = comm.transport.nodes
    yield f"all {comm.size} ranks", comm
    if quick:
        return
    size = comm.size // 2
    while size >= 2:
        if comm.size % size == 0:
            part = comm.split(comm.rank // size)
            assert part is not None
            yield f"groups of {size} ranks, neighbours", part
        size //= 2
    if 1 < len(set(nodes)) < comm.size:
        number = nodes[: comm.rank].count(nodes[comm.rank])  # among the ranks of my node
        part = comm.split(number)
        assert part is not None
        yield f"groups of {part.size} ranks, one on each node", part


def _measure(comm: Communicator, collectives: Sequence[str], sizes: Sequence[int], quick: bool, told: Tell) -> Progress:
    """All collectives, places and lengths on one group."""
    found = Progress()
    bench_memory.check_room(comm, max(sizes), False, False)
    bench_collectives.settle(comm)
    dtype = bench_collectives.dtype_of("float32")
    for private in (False, True):
        memory = Memory(comm, max(sizes), dtype, False, private)
        if not private and comm.node is None and memory.kind != "window":
            continue
        for collective in collectives:
            for placing in (IN_PLACE, OUT_OF_PLACE) if collective == "all_reduce" and not private else (OUT_OF_PLACE,):
                place = "private" if private else "apart" if (collective, placing) == APART else "window"
                for size in sizes:
                    row, built_in = _measure_one(comm, memory, collective, placing, place, size, quick, found)
                    if row is not None:
                        found.measured.append(row)
                        told(line(row, built_in))
    return found


APART = ("all_reduce", OUT_OF_PLACE)


def _measure_one(
    comm: Communicator,
    memory: Memory,
    collective: str,
    placing: str,
    place: str,
    size: int,
    quick: bool,
    found: Progress,
) -> tuple[Measured | None, str]:
    """The row of one length, and the algorithm that the built-in rule takes."""
    count = max(1, size // memory.dtype.itemsize // comm.size) * comm.size
    op = "sum" if COLLECTIVES[collective].reduces else ""
    where = Place(comm, count, op, placing, *memory.slots(count)[0])
    bench_cases.call(collective, "auto", where)()
    assert comm.last is not None
    built_in = comm.last.algorithm
    contestants = []
    for name in bench_cases.names(collective, comm.size):
        if name in ("auto", "shared", "bare"):
            continue
        each = Contestant(name, where, [bench_cases.call(collective, name, where)])
        if not bench_contest.impossible(each):
            contestants.append(each)
    if len(contestants) < 2:
        return None, built_in
    pattern = Pattern(memory.dtype, op, comm.size)
    short = Options((collective,), (size,), iterations=BLOCKS, seconds=QUICK_SECONDS)
    bench_contest.run_blocks(comm, short, collective, contestants, pattern, [])
    times = {each.algorithm: _median(comm, each) for each in contestants}
    near = [each for each in contestants if times[each.algorithm] <= NEAR * min(times.values())]
    near += [each for each in contestants if each.algorithm in (built_in, "native") and each not in near]
    for each in near:
        each.seconds, each.iterations = [], 0
    longer = Options((collective,), (size,), seconds=QUICK_SECONDS if quick else bench_contest.SECONDS)
    bench_contest.run_blocks(comm, longer, collective, near, pattern, [])
    times |= {each.algorithm: _median(comm, each) for each in near}
    for each in contestants:
        if each.wrong:
            found.wrong.append(f"{collective}, {each.algorithm}, {place}, {count * memory.dtype.itemsize} bytes")
            del times[each.algorithm]
    nodes = len(set(comm.transport.nodes))
    nbytes = count * memory.dtype.itemsize
    return Measured(collective, comm.size, nodes, place, nbytes, times, order(times, built_in)), built_in


def _median(comm: Communicator, each: Contestant) -> float:
    """Microseconds; the iterations are those of the slowest rank already."""
    return bench_table.percentile(each.seconds, 0.5) * 1e6


def order(times: dict[str, float], built_in: str) -> tuple[str, ...]:
    """The algorithms from the best to the worst, the built-in one first where nothing is clearly faster."""
    names = sorted(times, key=lambda name: times[name])
    if built_in in times and times[built_in] <= MARGIN * times[names[0]]:
        names.sort(key=lambda name: name != built_in)
    return tuple(names)


def line(row: Measured, built_in: str) -> str:
    """What was chosen, against the MPI library and the built-in choice."""
    best = row.order[0]
    text = f"{row.collective:<15}{row.place:<9}{row.nbytes:>10}  {best:<20}{row.times[best]:>10.1f}"
    if "native" in row.times:
        text += f"  {row.times['native'] / row.times[best]:>6.2f}x native"
    if built_in != best and built_in in row.times:
        text += f"  {row.times[built_in] / row.times[best]:>6.2f}x {built_in} (built-in choice)"
    return text


def _merged(comm: Communicator, path: Path, key: dict[str, str], measured: list[Measured]) -> list[Measured]:
    """The new rows, and those of the file that were not measured again."""
    old: tuple[Measured, ...] = ()
    if comm.rank == 0:
        try:
            old = tuning.parse(path.read_text(encoding="utf-8"), key).measured
        except (OSError, ValueError):  # none, or one that is to be replaced
            old = ()

    def what(row: Measured) -> tuple[Any, ...]:
        return row.collective, row.ranks, row.nodes, row.place, row.nbytes

    rows = {what(row): row for row in (*old, *measured)}
    return [rows[each] for each in sorted(rows)]
