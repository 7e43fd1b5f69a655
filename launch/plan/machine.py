"""The machine of a plan: how fast a core computes, what a message costs at each level, what memory a rank may use.

    node: ranks share cores and memory ── network: nodes share links        levels as of a cluster file, inside out

A collective of n bytes over p ranks costs what a ring costs, steps·α + factor·n·β, at the outermost level that the
group reaches over (all_reduce: 2(p-1) steps, factor 2(p-1)/p; all_gather, reduce_scatter, all_to_all: half of it).
Where more ranks than cores share a node, a call waits for ranks that have no core at the moment: α counts that many
times, and to every call comes a time slice of the system for each rank more than one on a core (SLICE).
Reference: Hockney, Parallel Computing 20 (1994); the algorithms: `dtrain show collective`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dtrain.collectives.schedules.simulator import Cluster, Level

# Memory shared within a node, and Ethernet of 10 Gb/s: what is assumed without a cluster file.
NODE = Level("node", 10e-6, 0.15e-9)
NETWORK = Level("network", 40e-6, 0.8e-9)
# Seconds that a call waits for each rank more than one on a core. They count as work of the rank, which shares its core
# too: with 4 ranks on 2 cores 5 ms in all; measured were 4 to 7 (docs/plan.md).
SLICE = 2.5e-3
PROGRAM = 100 << 20  # bytes: Python, NumPy, MPI and the kernels of a rank, before there is a model


@dataclass(frozen=True)
class Machine:
    """All of it per node; nodes are alike."""

    cluster: Cluster | None = None
    """None: NODE and NETWORK."""
    flops: float = 30e9
    """FLOP/s of one core in matrix products."""
    bandwidth: float = 5e9
    """Bytes of outputs per second that one core makes in ops that are no products."""
    per_op: float = 20e-6
    """Seconds that any op takes, however small it is."""
    cores: int = 8
    per_node: int = 8
    """Ranks on a node."""
    memory: float = float("inf")
    """Bytes that a rank may use."""
    measured: bool = False

    def levels(self) -> tuple[Level, ...]:
        """From the inside out; the first is the node."""
        return (NODE, NETWORK) if self.cluster is None else self.cluster.levels

    def threads(self) -> int:
        """Cores that a rank computes on, while others wait."""
        return max(1, self.cores // self.per_node)

    def node_capacity(self) -> float:
        """How many ranks' work a node does at once."""
        return min(self.per_node, self.cores / self.threads())

    def crowd(self) -> float:
        """How many times longer work takes when all ranks of a node do it, and cores are fewer."""
        return self.per_node / self.node_capacity()

    def level(self, reach: int) -> tuple[Level, bool]:
        """The level that joins ranks 0 .. reach - 1, and whether it is inside a node."""
        first, *outer = self.levels()
        if reach <= self.per_node or not outer:
            return first, True
        return next((level for level in outer if not level.ranks or reach <= level.ranks), outer[-1]), False

    def collective(self, kind: str, size: int, stride: int, nbytes: float) -> tuple[float, bool]:
        """(seconds, whether cores of the node do it) of one call over `size` ranks that lie `stride` apart."""
        if size == 1:
            return 0.0, True
        level, inside = self.level(stride * (size - 1) + 1)
        rounds = 2 if kind == "all_reduce" else 1
        alpha = level.alpha * max(1.0, self.per_node / self.cores) if inside else level.alpha
        # Groups that lie beside one another send at once, over the same links.
        crowd = 1.0 if inside or not level.links else max(1.0, min(stride, self.per_node) / level.links)
        waiting = SLICE * max(0.0, self.per_node / self.cores - 1) if inside else 0.0
        return waiting + rounds * (size - 1) * (alpha + nbytes / size * level.beta * crowd), inside

    def message(self, stride: int, nbytes: float) -> float:
        """Seconds of one message to the rank that is `stride` farther."""
        level, inside = self.level(stride + 1)
        return level.alpha * (max(1.0, self.per_node / self.cores) if inside else 1.0) + nbytes * level.beta


def measure(dtype: np.dtype[np.generic], threads: int) -> tuple[float, float]:
    """Of one core (of `threads` that BLAS uses here): FLOP/s of products, bytes per second of a GELU. About 0.1 s."""
    from dtrain import kernels

    wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    a, b, c = (np.ones((256, 256), wide) for _ in range(3))
    x = np.ones((256, 1024), wide)
    gelu = kernels.of(x).gelu

    def fastest(call: Callable[[], object], least: int = 5, budget: float = 0.05) -> float:
        times: list[float] = []
        while len(times) < least or sum(times) < budget:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    products = 2 * 256**3 / fastest(lambda: np.matmul(a, b, out=c)) / threads
    return products, x.nbytes / fastest(lambda: gelu(x, None, True))
