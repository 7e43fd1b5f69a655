"""The machine of a plan: how fast a core computes, what a message costs at each level, what memory a rank may use.

    node: ranks share cores and memory ── network: nodes share links        levels as of a cluster file, inside out

Over a network a collective of n bytes over p ranks costs what a ring costs, steps·α + factor·n·β, at the outermost
level that the group reaches over (all_reduce: 2(p-1) steps, factor 2(p-1)/p; all_gather, reduce_scatter, all_to_all:
half of it; a broadcast, one of several from all ranks in turn: log p steps, factor (p-1)/p). In a node it is one call
in shared memory, whatever p: its Python, two meetings (α), the same bytes, and for each rank more than one on a core a
change of who runs (SWITCH). All that is work of the cores, so ranks that share them share its time as well (`crowd`).

Two cores are not always twice one: threads of one core, or cores that slow down together, do less at once (`together`).
Reference: Hockney, Parallel Computing 20 (1994); the algorithms: `dtrain show collective`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.collectives.schedules.simulator import Cluster, Level

# Memory shared within a node, and Ethernet of 10 Gb/s: what is assumed without a cluster file.
NODE = Level("node", 10e-6, 0.2e-9)
NETWORK = Level("network", 40e-6, 0.8e-9)
SWITCH = 25e-6  # seconds of a core's work in every call, for each rank more than one on a core: docs/plan.md
# An exchange of uneven blocks goes through the MPI library, and who waits there looks seldom: measured 1 ms with a
# core for each rank, 1.2 with two ranks on a core, 4 to 5 with four.
LIBRARY = 0.7e-3
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
    per_head: float = 5e-6
    """Seconds of an attention for each head of each sample, however few its tokens: products of small matrices."""
    per_score: float = 2e-9
    """Seconds of an attention for each pair of a query and a key, beyond its FLOPs."""
    together: float = 1.0
    """What a core does while all are busy, of what it does alone."""
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
        """How many ranks' work a node does at once, at the speed of one alone."""
        return min(self.per_node, self.cores / self.threads() * self.together)

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
        """(seconds, whether cores of the node do it) of one call over `size` ranks that lie `stride` apart.

        kind "exchange": an all_to_all of blocks that may be uneven.
        """
        if size == 1:
            return 0.0, True
        level, inside = self.level(stride * (size - 1) + 1)
        moved = (2 if kind == "all_reduce" else 1) * (size - 1) * nbytes / size * level.beta
        if inside:
            alpha = LIBRARY if kind == "exchange" else level.alpha
            return self.per_op + alpha + self._switches() + moved, inside
        steps = {"all_reduce": 2 * (size - 1), "broadcast": math.ceil(math.log2(size))}.get(kind, size - 1)
        # Groups that lie beside one another send at once, over the same links.
        crowd = 1.0 if not level.links else max(1.0, min(stride, self.per_node) / level.links)
        return steps * level.alpha + moved * crowd, inside

    def message(self, stride: int, nbytes: float) -> float:
        """Seconds of one message to the rank that is `stride` farther."""
        level, inside = self.level(stride + 1)
        return level.alpha + (self._switches() if inside else 0.0) + nbytes * level.beta

    def _switches(self) -> float:
        return SWITCH * max(0.0, self.per_node / self.cores - 1)
