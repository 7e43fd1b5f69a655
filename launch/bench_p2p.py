"""`dtrain bench p2p`: what a message costs on each class of link, alpha + beta x bytes.

    one-way      rank a ──n──► rank b ──n──► rank a      half of the round trip
    both-ways    rank a ◄──n──► rank b                   each sends and receives at once: the slower of the two

A link class is the smallest unit that holds both ranks (`bench_links.py`): a core, a cache, a socket, a node, the
network between nodes; one pair stands for its class while all others wait. alpha (the latency) and beta (seconds per
byte) are the least squares fit of the relative errors: of the plain errors only the longest messages would count.
Hockney, Parallel Computing 20 (1994).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtrain.collectives import Array, Communicator
from dtrain.launch import bench_latency, bench_links, bench_table
from dtrain.launch.bench_cases import Pattern, count_wrong, fill
from dtrain.launch.bench_collectives import Options, Tell, dtype_of
from dtrain.launch.bench_contest import BLOCKS, ITERATIONS, SECONDS
from dtrain.launch.bench_memory import Memory
from dtrain.launch.bench_table import BOTH_WAYS, ONE_WAY, Row

LATENCY_BYTES = 8  # always measured: long messages say nothing about alpha


@dataclass
class Link:
    """One class of links."""

    name: str
    pair: tuple[int, int]
    rows: list[Row] = field(default_factory=list)

    def fit(self) -> dict[str, Any]:
        """Alpha in us, beta in ns per byte, and the largest relative error of each direction."""
        result: dict[str, Any] = {"link": self.name, "ranks": list(self.pair)}
        for direction in (ONE_WAY, BOTH_WAYS):
            rows = [row for row in self.rows if row.placing == direction]
            alpha, beta, error = fit([row.size for row in rows], [row.time for row in rows])
            result[direction] = {"alpha_us": alpha, "beta_ns_per_byte": beta * 1e3, "largest_error": error}
        return result


def fit(sizes: list[int], times: list[float]) -> tuple[float, float, float]:
    """Alpha, beta of times ~ alpha + beta * sizes, in the units of times; and the largest relative error."""
    size, seconds = np.array(sizes, np.float64), np.array(times, np.float64)
    rows = np.stack([1 / seconds, size / seconds], axis=1)
    scale = np.abs(rows).max(0)  # one column is 1e6 times the other: scaled, none is lost as noise
    found = np.linalg.lstsq(rows / scale, np.ones(len(seconds)), rcond=None)[0] / scale
    error = float(np.abs(rows @ found - 1).max())
    return float(found[0]), float(found[1]), error


def links(where: Sequence[bench_links.Place]) -> list[Link]:
    """A pair of ranks for each class of links that there is between ranks at these places."""
    return [Link(name, pair) for name, pair in bench_links.pairs(where).items()]


def constants(found: Iterable[Link]) -> dict[str, tuple[float, float]]:
    """Class -> alpha in seconds, beta in seconds per byte, one way."""
    fits = {link.name: link.fit()[ONE_WAY] for link in found}
    return {name: (row["alpha_us"] * 1e-6, row["beta_ns_per_byte"] * 1e-9) for name, row in fits.items()}


def cluster_text(comm: Communicator, found: Iterable[Link], name: str) -> tuple[str, list[str]]:
    """The file for `dtrain show collective --simulate`, and what it leaves out. Collective."""
    description, left_out = bench_links.cluster(
        bench_links.places(comm), constants(found), bench_links.gamma(), f"{name}, as measured"
    )
    return bench_links.as_yaml(description), left_out


def measure(comm: Communicator, options: Options, tell: Tell) -> list[Link]:
    """Measure all link classes, telling the rows as they come. Collective; all ranks return the same."""
    dtype = dtype_of(options.dtype)
    sizes = sorted({max(LATENCY_BYTES, dtype.itemsize), *options.sizes})
    memory = Memory(comm, max(sizes), dtype, False, options.private)
    pattern = Pattern(dtype, "", comm.size)
    found = links(bench_links.places(comm))
    if not found:
        tell("# p2p: one rank has no link")
    for link in found:
        tell(f"# p2p: rank {link.pair[0]} and rank {link.pair[1]}, {link.name}")
        for text in bench_table.titles((ONE_WAY, BOTH_WAYS)):
            tell(text)
        for size in sizes:
            count = max(1, size // dtype.itemsize)
            source, target = memory.slots(count)[0]
            rows = [
                _measure(comm, options, link, pattern, source, target, direction) for direction in (ONE_WAY, BOTH_WAYS)
            ]
            link.rows += rows
            tell(bench_table.line(rows))
        for text in _told(link.fit()):
            tell(text)
    if options.latency:
        for text in bench_latency.tables([row for link in found for row in link.rows]):
            tell(text)
    return found


def _told(found: dict[str, Any]) -> list[str]:
    lines = []
    for direction in (ONE_WAY, BOTH_WAYS):
        alpha, beta = found[direction]["alpha_us"], found[direction]["beta_ns_per_byte"]
        speed = f"{1 / beta:.2f} GB/s" if beta > 0 else "no limit seen"
        lines.append(
            f"# {found['link']}, {direction}: alpha {alpha:.2f} us, beta {beta:.4f} ns/B ({speed}), "
            f"largest error of the fit {found[direction]['largest_error']:.0%}"
        )
    return lines


def _measure(
    comm: Communicator,
    options: Options,
    link: Link,
    pattern: Pattern,
    source: Array,
    target: Array,
    direction: str,
) -> Row:
    wrong, seconds = 0, []
    iterations = 0 if options.iterations is None else -(-options.iterations // BLOCKS)
    part = _Part(comm, link.pair, source, target, direction) if comm.rank in link.pair else None
    for turn in range(BLOCKS):
        comm.barrier()
        if part is not None:
            wrong += part.checked(pattern, turn)
            for _ in range(options.warmup - 1):
                part.exchange()
        if iterations == 0:
            mine = 0.0 if part is None else min(part.timed(2))
            slowest = float(comm.all_gather(np.array([mine])).max())
            iterations = max(ITERATIONS[0], min(ITERATIONS[1], int(SECONDS / BLOCKS / max(slowest, 1e-7))))
        seconds += [0.0] * iterations if part is None else part.timed(iterations)
    everyone = comm.all_gather(np.array([float(wrong), *seconds])).reshape(comm.size, -1)
    slowest_of = everyone[:, 1:].max(0).tolist()
    what = (source.nbytes, len(source), source.dtype.name, "")
    return bench_table.row("p2p", what, link.name, direction, slowest_of, int(everyone[:, 0].sum()), comm.size)


class _Part:
    """What one of the two ranks does."""

    def __init__(self, comm: Communicator, pair: tuple[int, int], source: Array, target: Array, direction: str) -> None:
        self._first = comm.rank == pair[0]
        self._peer = pair[1] if self._first else pair[0]
        self._one_way = direction == ONE_WAY
        self._arrays = source, target
        self._comm = comm
        ways: dict[tuple[bool, bool], Callable[[], object]] = {
            (True, True): self._ping,
            (True, False): self._pong,
            (False, True): self._both,
            (False, False): self._both,
        }
        self.exchange = ways[self._one_way, self._first]

    def _ping(self) -> None:
        source, target = self._arrays
        self._comm.send(source, self._peer)
        self._comm.recv(target, self._peer)

    def _pong(self) -> None:
        _, target = self._arrays
        self._comm.recv(target, self._peer)
        self._comm.send(target, self._peer)

    def _both(self) -> None:
        source, target = self._arrays
        self._comm.sendrecv(source, self._peer, target, self._peer)

    def checked(self, pattern: Pattern, turn: int) -> int:
        """One exchange of new data; how many elements came wrong."""
        source, target = self._arrays
        turn = 2 * turn + self._one_way
        fill(source, pattern.period(self._comm.rank, turn))
        self.exchange()
        echo = self._one_way and self._first
        return count_wrong(target, pattern.period(self._comm.rank if echo else self._peer, turn))

    def timed(self, iterations: int) -> list[float]:
        """Seconds of each exchange; one-way: half of the round trip, and nothing on the rank that answers."""
        seconds = []
        for _ in range(iterations):
            before = time.perf_counter()
            self.exchange()
            seconds.append(time.perf_counter() - before)
        if self._one_way:
            return [each / 2 if self._first else 0.0 for each in seconds]
        return seconds
