"""Contestants that take turns: each is checked and timed in every block, so that a busy moment falls on all of them.

    block 1   A  B  C        each: new data, one checked run, then timed iterations
    block 2   C  B  A
    ...

Timing rule: all ranks leave a barrier, each takes the time of its own call, the maximum over ranks is the time of the
iteration, the median over iterations is the result.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dtrain.collectives import Array, Communicator
from dtrain.launch import bench_cases, bench_memory
from dtrain.launch.bench_cases import Pattern, Place, Run
from dtrain.launch.bench_peer import Peer

if TYPE_CHECKING:
    from dtrain.launch.bench_collectives import Options

BLOCKS = 5
SECONDS = 0.15  # per contestant and size, where the number of iterations is not given
ITERATIONS = (2, 100)  # per block: least and most, where it is not given


@dataclass
class Contestant:
    """One algorithm at one size, in place or not."""

    algorithm: str
    place: Place
    runs: list[Run]
    """One per place in memory; the first is the one that is checked. Empty for a peer, which has its own memory."""
    iterations: int = 0
    seconds: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    """Of the calls of each rank."""
    wrong: int = 0
    peer: Peer | None = None
    places: int = 1
    """In memory, of a peer."""


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
        each.means = everyone[:, 1:].mean(1).tolist()
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


def peer_impossible(collective: str, each: Contestant) -> str:
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
