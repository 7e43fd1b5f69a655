"""`dtrain bench all_reduce|...|all`: times of collectives, their algorithms side by side within one run.

    for each collective, each size:   the algorithms, in place and not, and a peer, if any ──► run_blocks ──► a row each

How they take turns and are timed: `bench_contest.py`. The triad beside them (x[:n/2] += x[n/2:] on the same memory, by
all ranks at once) gives the memory bandwidth at this size, and with it the least time that memory allows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtrain.collectives import Array, Communicator
from dtrain.collectives.dtypes import dtype_from_name
from dtrain.collectives.schedules.own import is_own
from dtrain.collectives.waiting import CHECKED
from dtrain.errors import UserError
from dtrain.launch import bench_cases, bench_latency, bench_memory, bench_peer, bench_table, bench_wire
from dtrain.launch.bench_cases import Pattern, Place
from dtrain.launch.bench_contest import SECONDS, Contestant, impossible, peer_impossible, run_blocks
from dtrain.launch.bench_memory import Memory
from dtrain.launch.bench_peer import Peer
from dtrain.launch.bench_table import BOUND_FROM, COLLECTIVES, IN_PLACE, OUT_OF_PLACE, Row

DEFAULT = ("auto", "native", "bare", "shared")

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
    latency: bool = False
    """Tell the columns of the OSU microbenchmarks too."""
    wire: float | None = None
    """Over several nodes: bytes per second that a node can send; the bound is that of the wire."""


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
    if options.latency:
        for text in bench_latency.tables(outcome.rows):
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
    op = options.op if COLLECTIVES[collective].reduces else ""
    slots = memory.slots(count)
    contestants = _contestants(comm, options, collective, (count, op), slots, outcome.notes, peer)
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
            each.means,
        )
        for each in contestants
    ]
    nodes = len(set(comm.transport.nodes))
    if options.wire is not None and size and nodes > 1:
        least = bench_wire.bound(collective, size, nodes, comm.size, options.wire)
        rows = [replace(each, bound=least) for each in rows]
    outcome.rows.extend(rows)
    native = bench_table.native_time(rows)
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        found = {row.placing: row for row in rows if row.algorithm == algorithm}
        yield bench_table.line([found.get(placing) for placing in _placings(options, collective)], native)


def _contestants(
    comm: Communicator,
    options: Options,
    collective: str,
    what: tuple[int, str],
    slots: list[tuple[Array, Array]],
    notes: list[str],
    peer: Peer | None,
) -> list[Contestant]:
    """Who can do `what` (elements, operation) in each placing; why the others cannot is noted, once."""
    count, op = what
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
        if all(reasons) and (note := f"{collective}, {algorithm}: {reasons[0]}") not in notes:
            notes.append(note)
    if peer is not None and (where := bench_peer.placing(collective)) in _placings(options, collective):
        place = Place(comm, count, op, where, *slots[0])
        contestant = Contestant(bench_peer.NAME, place, [], peer=peer, places=len(slots))
        if reason := peer_impossible(collective, contestant):
            if (note := f"{collective}, {reason}") not in notes:
                notes.append(note)
        else:
            contestants.append(contestant)
    return contestants


def _placings(options: Options, collective: str) -> tuple[str, ...]:
    return options.placings if collective != "barrier" else (OUT_OF_PLACE,)


def _has_bound(comm: Communicator, size: int) -> bool:
    return size >= BOUND_FROM and comm.local_size == comm.size


def _chosen(comm: Communicator, options: Options, collective: str) -> list[str]:
    known = bench_cases.names(collective, comm.size)
    if "all" in options.algorithms:
        return [*known, *filter(is_own, options.algorithms)]
    return [name for name in dict.fromkeys(options.algorithms or DEFAULT) if bench_cases.is_known(name, known)]
