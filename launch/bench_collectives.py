"""`dtrain bench all_reduce|...|all`: times of collectives, their algorithms side by side within one run.

    for each size:   block 1   A  B  C        each: new data, one checked run, then timed iterations
                     block 2   C  B  A        so that a busy moment of the machine falls on all contestants
                     ...

Timing rule: all ranks leave a barrier, each takes the time of its own call, the maximum over ranks is the time of the
iteration, the median over iterations is the result. The triad beside them (x[:n/2] += x[n/2:] on the same memory, by
all ranks at once) gives the memory bandwidth at this size, and with it the least time that memory allows.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dtrain.collectives import Array, Communicator
from dtrain.collectives.dtypes import dtype_from_name
from dtrain.collectives.schedules.own import is_own
from dtrain.collectives.waiting import CHECKED
from dtrain.errors import UserError
from dtrain.launch import bench_cases, bench_memory, bench_peer, bench_table
from dtrain.launch.bench_cases import Pattern, Place, Run
from dtrain.launch.bench_memory import Memory
from dtrain.launch.bench_peer import Peer
from dtrain.launch.bench_table import BOUND_FROM, COLLECTIVES, IN_PLACE, OUT_OF_PLACE, Row

BLOCKS = 5
SECONDS = 0.15  # per contestant and size, where the number of iterations is not given
DEFAULT = ("auto", "native", "bare", "shared")
ITERATIONS = (2, 100)  # per block: least and most, where it is not given

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is asked for; the same on all ranks."""

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    algorithms: tuple[str, ...] = ()
    """() is DEFAULT; ("all",) is every one that there is."""
    dtype: str = "float32"
    op: str = "sum"
    placings: tuple[str, ...] = (OUT_OF_PLACE, IN_PLACE)
    iterations: int | None = None
    """Of each contestant; None: as many as fit into `seconds`."""
    seconds: float = SECONDS
    warmup: int = 1
    """Runs before the timed ones of each block; the first of them is checked."""
    private: bool = False
    cold: bool = False


@dataclass
class Contestant:
    """One algorithm at one size, in place or not."""

    algorithm: str
    place: Place
    runs: list[Run]
    """One per place in memory; the first is the one that is checked. Empty for a peer, which has its own memory."""
    iterations: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    peer: Peer | None = None
    places: int = 1
    """In memory, of a peer."""


@dataclass(frozen=True)
class Outcome:
    """What was measured."""

    rows: list[Row]
    bandwidths: dict[int, float]
    """Size in bytes -> bytes per second of all ranks together."""
    notes: list[str]


def measure(comm: Communicator, options: Options, tell: Tell, peer: Peer | None = None) -> Outcome:
    """Measure all that `options` ask for, and `peer` beside it, telling the rows as they come. Collective."""
    check(comm, options)
    outcome = Outcome([], {}, [])
    settle(comm)
    dtype = dtype_of(options.dtype)
    memory = Memory(comm, max(options.sizes), dtype, options.cold, options.private)
    for collective in options.collectives:
        tell(f"# {collective}: {COLLECTIVES[collective].summary}")
        for name in filter(is_own, options.algorithms):
            tell(f"# {bench_cases.described(collective, name, comm.size)}")
        for text in bench_table.titles(_placings(options, collective)):
            tell(text)
        for size in options.sizes if collective != "barrier" else (0,):
            for text in _measure_size(comm, options, memory, collective, size, outcome, peer):
                tell(text)
    for note in outcome.notes:
        tell(f"# {note}")
    return outcome


def settle(comm: Communicator) -> None:
    """Let the first collectives of a communicator pass, which are compared one by one."""
    for _ in range(CHECKED):
        comm.barrier()


def check(comm: Communicator, options: Options) -> None:
    """Refuse algorithms that no collective has, and more memory than there is: UserError."""
    known: dict[str, None] = {}
    for collective in options.collectives:
        known |= dict.fromkeys(bench_cases.names(collective, comm.size))
    for name in options.algorithms:
        if is_own(name):
            continue  # proven when its turn comes
        if not bench_cases.is_known(name, tuple(known)) and name != "all":
            where = f"{', '.join(options.collectives)} on {comm.size} rank{'s' * (comm.size > 1)}"
            raise UserError(f"--algorithms {name}: not an algorithm of {where}; allowed: all, {', '.join(known)}")
    bench_memory.check_room(comm, max(options.sizes), options.cold, options.private)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a name; bfloat16 is not NumPy's own."""
    return dtype_from_name(name) if name == "bfloat16" else np.dtype(name)


# --- one size ---------------------------------------------------------------------------------------------------------


def _measure_size(
    comm: Communicator,
    options: Options,
    memory: Memory,
    collective: str,
    size: int,
    outcome: Outcome,
    peer: Peer | None,
) -> Iterator[str]:
    count = max(1, size // memory.dtype.itemsize // comm.size) * comm.size if size else 0
    size = count * memory.dtype.itemsize
    reduces = COLLECTIVES[collective].reduces
    op = options.op if reduces else ""
    slots = memory.slots(count)
    contestants = []
    for algorithm in _chosen(comm, options, collective):
        reasons = []
        for placing in _placings(options, collective):
            places = [Place(comm, count, op, placing, *slot) for slot in slots]
            runs = [bench_cases.call(collective, algorithm, place) for place in places]
            contestant = Contestant(bench_cases.algorithm_name(algorithm), places[0], runs)
            reason = impossible(contestant)
            if not reason:
                contestants.append(contestant)
            reasons.append(reason)
        if all(reasons) and (note := f"{collective}, {algorithm}: {reasons[0]}") not in outcome.notes:
            outcome.notes.append(note)
    if peer is not None and (where := bench_peer.placing(collective)) in _placings(options, collective):
        place = Place(comm, count, op, where, *slots[0])
        contestant = Contestant(bench_peer.NAME, place, [], peer=peer, places=len(slots))
        if reason := _peer_impossible(collective, contestant):
            if (note := f"{collective}, {reason}") not in outcome.notes:
                outcome.notes.append(note)
        else:
            contestants.append(contestant)
    triads = [source for source, _ in slots] if _has_bound(comm, size) else []
    pattern = Pattern(memory.dtype, op, comm.size)
    bandwidths = run_blocks(comm, options, collective, contestants, pattern, triads)
    bandwidth = statistics.median(bandwidths) if bandwidths else None
    if bandwidth is not None:
        outcome.bandwidths[size] = bandwidth
    rows = [
        bench_table.row(
            collective,
            (size, count, memory.dtype.name, op),
            each.algorithm,
            each.place.placing,
            each.seconds,
            each.wrong,
            comm.size,
            bandwidth,
        )
        for each in contestants
    ]
    outcome.rows.extend(rows)
    native = bench_table.native_time(rows)
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        found = {row.placing: row for row in rows if row.algorithm == algorithm}
        yield bench_table.line([found.get(placing) for placing in _placings(options, collective)], native)


def _placings(options: Options, collective: str) -> tuple[str, ...]:
    return options.placings if collective != "barrier" else (OUT_OF_PLACE,)


def _has_bound(comm: Communicator, size: int) -> bool:
    return size >= BOUND_FROM and comm.local_size == comm.size


def _chosen(comm: Communicator, options: Options, collective: str) -> list[str]:
    known = bench_cases.names(collective, comm.size)
    if "all" in options.algorithms:
        return [*known, *filter(is_own, options.algorithms)]
    return [name for name in dict.fromkeys(options.algorithms or DEFAULT) if bench_cases.is_known(name, known)]


def impossible(contestant: Contestant) -> str:
    """Run it once; return why it cannot run at all, or nothing. The answer is the same on all ranks."""
    try:
        contestant.runs[0]()
    except ValueError as error:
        return str(error)
    return ""


def run_blocks(
    comm: Communicator,
    options: Options,
    collective: str,
    contestants: list[Contestant],
    pattern: Pattern,
    triads: Sequence[Array],
) -> list[float]:
    """Fill in the seconds and wrong elements of all contestants; return memory bandwidths in bytes/s."""
    bandwidths = []
    turn = 0
    for block in range(BLOCKS):
        if triads:
            bandwidths.append(bench_memory.triad(comm, triads))
        for each in contestants[:: -1 if block % 2 else 1]:
            turn += 1
            if each.peer is not None:
                _peer_turn(comm, options, collective, each, turn)
                continue
            each.wrong += _checked_run(collective, each, pattern, turn)
            for run in each.runs if options.cold and block == 0 else each.runs[:1] * (options.warmup - 1):
                run()
            if each.iterations == 0:
                each.iterations = _agreed_iterations(comm, options, partial(timed, comm, each.runs, 2))
            each.seconds += timed(comm, each.runs, each.iterations)
    for each in contestants:
        # The last word over all ranks: the slowest of each iteration, all wrong elements.
        mine = np.array([float(each.wrong), *each.seconds])
        everyone = comm.all_gather(mine).reshape(comm.size, -1)
        each.wrong = int(everyone[:, 0].sum())
        each.seconds = everyone[:, 1:].max(0).tolist()
    return bandwidths


def _checked_run(collective: str, each: Contestant, pattern: Pattern, turn: int) -> int:
    """Run once on new data; return how many elements of this rank's result are wrong."""
    place = each.place
    if not place.count:
        each.runs[0]()
        return 0
    source, _ = bench_cases.arrays(collective, place)
    bench_cases.fill(source, pattern.period(place.comm.rank, turn))
    result = each.runs[0]()
    return bench_cases.wrong_elements(collective, result, place, pattern, turn)


def _peer_impossible(collective: str, each: Contestant) -> str:
    """As `impossible`, for a peer."""
    assert each.peer is not None
    try:
        each.peer.turn(collective, each.place, each.place.first.dtype.name, 0, each.places, 1, 1)
    except ValueError as error:
        return str(error)
    return ""


def _peer_turn(comm: Communicator, options: Options, collective: str, each: Contestant, turn: int) -> None:
    """A block of a peer: checked and timed in its own processes, while the ranks sleep."""
    assert each.peer is not None
    what = (collective, each.place, each.place.first.dtype.name, turn, each.places, options.warmup)
    if each.iterations == 0:
        each.iterations = _agreed_iterations(comm, options, lambda: each.peer.turn(*what, 2)[1])  # type: ignore[union-attr]
    wrong, seconds = each.peer.turn(*what, each.iterations)
    each.wrong += wrong
    each.seconds += seconds


def _agreed_iterations(comm: Communicator, options: Options, two: Callable[[], list[float]]) -> int:
    """Iterations per block, the same on all ranks; `two` times two of them."""
    if options.iterations is not None:
        return -(-options.iterations // BLOCKS)
    mine = min(two())
    slowest = float(comm.all_gather(np.array([mine])).max())
    low, high = ITERATIONS
    return max(low, min(high, int(options.seconds / BLOCKS / max(slowest, 1e-7))))


def timed(comm: Communicator, runs: Sequence[Run], iterations: int) -> list[float]:
    """Seconds of this rank's calls, all ranks starting together; the places in memory take turns."""
    clock, seconds = time.perf_counter, []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for iteration in range(iterations):
            run = runs[iteration % len(runs)]
            comm.barrier()
            comm.barrier()  # who waited long in the first one sleeps there and leaves late; not so here
            before = clock()
            run()
            seconds.append(clock() - before)
    finally:
        if collecting:
            gc.enable()
    return seconds
