"""One call of a collective, in the flat form in which the algorithms get it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dtrain.collectives import cross_memory
from dtrain.collectives.arena import Place
from dtrain.collectives.dtypes import Array

if TYPE_CHECKING:
    from dtrain.collectives.counters import Volume
    from dtrain.collectives.levels import Levels
    from dtrain.collectives.node import Node
    from dtrain.collectives.scheduled import Channel
    from dtrain.collectives.transport import Transport


@dataclass(slots=True)
class Call:
    """Source and target are flat and contiguous, the same memory or disjoint; but on one node, or in the window, the
    source of an `all_gather` or `gather` may be this rank's block of the target, and the target of a `reduce_scatter`
    this rank's block of the source.
    """

    transport: "Transport"
    node: "Node | None"  # None: several nodes, or no shared memory
    source: Array
    target: Array
    op: str = ""
    counts: Sequence[int] = ()  # elements per rank
    out_counts: Sequence[int] = ()  # all_to_all: elements from each rank
    root: int = 0
    place: Place | None = None  # of the source (broadcast: of the target) in the arena, which all ranks have there
    target_place: Place | None = None  # on the root of reduce and gather
    in_place: bool = False  # target is the source's memory
    alike: bool = False  # all_to_all: all ranks have the same counts
    levels: "Callable[[], Levels | None] | None" = None  # None: one node, or one rank on every node
    channel: "Callable[[], Channel] | None" = None  # for schedules
    moved: "Volume | None" = None  # by a schedule, once it is started

    @property
    def at_root(self) -> bool:
        """Whether this rank is the root."""
        return self.transport.rank == self.root

    @property
    def apart(self) -> Array:
        """The source, in memory of its own: MPI takes no message from where it delivers one."""
        return self.source.copy() if np.may_share_memory(self.source, self.target) else self.source

    @property
    def window(self) -> tuple["Node", Place]:
        """The shared memory, and the place of the source there."""
        assert self.node is not None and self.place is not None
        return self.node, self.place

    @property
    def home(self) -> tuple["Node", Place]:
        """The shared memory, and the place of the source there, or else in the memory of this process."""
        assert self.node is not None
        return self.node, self.place or cross_memory.private(self.source)

    @property
    def both_levels(self) -> "Levels":
        """The levels, which there are; the first call is collective."""
        levels = None if self.levels is None else self.levels()
        assert levels is not None
        return levels

    @property
    def stage(self) -> "Node":
        """The shared memory, which is there."""
        assert self.node is not None
        return self.node

    def met(self, name: str, algorithm: str, alike: bool = True) -> "Transport":
        """The transport, once all ranks of the node have come to this collective with the same arguments.

        Inside the MPI library nobody computes the slices that a peer may wait for, so all go in together; and ranks
        that do different things are told here instead of hanging there. alike: all arrays have one length and dtype.
        """
        if self.node is not None:
            number = self.node.note(name, algorithm, self.op, self.source if alike else None, self.extra(name))
            self.node.await_arrived(number)
        return self.transport

    def noted(self, name: str, alike: bool = True) -> "Transport":
        """The transport, after telling the peers that something is started there."""
        if self.node is not None:
            # In MPI, what is started matches no blocking call: another number than there.
            self.node.note(name, "native", self.op, self.source if alike else None, -1 - self.extra(name))
        return self.transport

    def extra(self, name: str) -> int:
        """What else must be equal on all ranks: the root, the counts."""
        if name in ("broadcast", "reduce"):
            return self.root
        if name == "all_to_all" and not self.alike:
            return 0
        return hash((self.root, *self.counts))
