"""The two levels of a communicator over several nodes: shared memory within a node, messages between nodes.

    node 0   ranks 0 1 2 3         lane 0: ranks 0 4      lane 1: ranks 1 5
    node 1   ranks 4 5             lane 2: ranks 2 4      lane 3: ranks 3 5

There are as many lanes as the largest node has ranks. In each node one rank drives a lane, and moves that share of the
data between the nodes; where nodes are uneven, a rank drives several. Ranks may lie on the nodes in any order. The
order of nodes is that of their lowest ranks, everywhere.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dtrain.collectives.conveyor import SLOTS, Conveyor, Portion, Steps
from dtrain.collectives.dtypes import Array
from dtrain.collectives.node import Node
from dtrain.collectives.progress import Progress
from dtrain.collectives.records import Record
from dtrain.collectives.transport import Transport
from dtrain.collectives.waiting import Patience

if TYPE_CHECKING:
    from dtrain.collectives.communicator import Communicator

SLOT_BYTES = 1 << 20  # of each rank, per portion: long enough for bandwidth, short enough that the wire starts early


def has_levels(transport: Transport) -> bool:
    """Several nodes, of which one has several ranks of the communicator."""
    return transport.shares and 1 < len(set(transport.nodes)) < transport.size


class Levels:
    """One rank's view of both levels."""

    def __init__(
        self,
        transport: Transport,
        patience: Patience,
        together: Progress,
        split: "Callable[[int], Communicator]",
        name: str,
    ) -> None:
        """Collective. `split`: the communicator of the ranks with my color."""
        places = list(dict.fromkeys(transport.nodes))
        self.nodes = [[rank for rank, node in enumerate(transport.nodes) if node == place] for place in places]
        self.here = places.index(transport.nodes[transport.rank])
        self.rank = transport.rank
        self.members = self.nodes[self.here]
        self.local = self.members.index(transport.rank)
        self.lanes = max(map(len, self.nodes))
        self.mine = range(self.local, self.lanes, len(self.members))
        """The lanes that this rank drives."""
        self._node_of = {rank: node for node, ranks in enumerate(self.nodes) for rank in ranks}
        self._split = split
        self._inner: Communicator | None = None
        self._lane: Communicator | None = None
        home, wires = transport.split(self.here, transport.rank), transport.split(0, transport.rank)
        assert home is not None and wires is not None
        self._home = home
        self._wires = wires  # of its own: these messages meet no others, and may use all tags
        self.sent = 0
        """Bytes that this rank has sent to other nodes for collectives of both levels, ever."""
        self.node = Node(home, patience, together)
        self.stage = self.node.arena.allocate((SLOTS * SLOT_BYTES,), np.dtype(np.uint8))
        place = self.node.arena.place(self.stage)
        assert place is not None
        self._stage_place = place
        self.conveyor = Conveyor(self.node, together, patience.timeout, name)

    @property
    def inner(self) -> "Communicator":
        """The ranks of my node. The first access is collective over the whole communicator."""
        if self._inner is None:
            self._inner = self._split(self.here)
        return self._inner

    @property
    def lane(self) -> "Communicator":
        """The ranks that are number `local` of their nodes, as I am. The first access is collective as above."""
        if self._lane is None:
            self._lane = self._split(self.local)
        return self._lane

    def driver(self, lane: int, node: int) -> int:
        """The rank that drives a lane in a node."""
        return self.nodes[node][lane % len(self.nodes[node])]

    def node_of(self, rank: int) -> tuple[int, int]:
        """The node of a rank, and its number there."""
        node = self._node_of[rank]
        return node, self.nodes[node].index(rank)

    def slots(self, slot: int, dtype: np.dtype[np.generic]) -> list[Array]:
        """A slot of the staging: the parts of all ranks of my node."""
        place = (self._stage_place[0], self._stage_place[1] + slot * SLOT_BYTES)
        octets = self.node.arena.parts(place, SLOT_BYTES, np.dtype(np.uint8))
        return [part[: SLOT_BYTES // dtype.itemsize * dtype.itemsize].view(dtype) for part in octets]

    def send(self, array: Array, rank: int, tag: int) -> Steps[None]:
        """Send, contiguous; started by the first step."""
        self.sent += array.nbytes
        request = self._wires.start_send(array, rank, tag)
        yield
        yield from self.conveyor.until(request.test, f"rank {rank} to receive")

    def receive(self, array: Array, rank: int, tag: int) -> Steps[None]:
        """Receive; started by the first step."""
        request = self._wires.start_recv(array, rank, tag)
        yield
        yield from self.conveyor.until(request.test, f"a message of rank {rank}")

    def close(self) -> None:
        """Collective: give everything back; nothing is under way."""
        self.conveyor.close()
        del self.stage  # a segment with living arrays would stay mapped
        self.node.close()
        self._home.close()
        self._wires.close()
        for part in (self._inner, self._lane):
            if part is not None:
                part.close()


class LevelsPortion(Portion):
    """A portion of a collective of both levels: `hierarchy.py` and `hierarchy_moves.py` say what is done in it."""

    def __init__(self, levels: Levels, record: Record, staged: bool = True) -> None:
        super().__init__(record, staged)
        self.levels = levels

    def tag(self, piece: int, phase: int = 0) -> int:
        """Of a message; no two that are under way between two ranks have the same."""
        return self.sequence % 32 * 1024 + piece % 512 * 2 + phase

    def slots(self, dtype: np.dtype[np.generic]) -> list[Array]:
        """My slot of the staging, of all ranks of the node."""
        return self.levels.slots(self.slot, dtype)
