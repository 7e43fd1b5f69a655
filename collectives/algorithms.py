"""Which algorithms exist for each collective, and which one `auto` takes: the first row that is possible and preferred.

A row runs on flat contiguous arrays; source and target are the same memory or disjoint. What `possible` and
`preferred` look at is the same on all ranks of a correct program (size, nodes, count, dtype, whether the arrays lie
in the shared window), so all ranks choose alike; on one node a difference is noticed and reported
(`CollectiveMismatch`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtrain.collectives import exchange, staged, window, window_moves
from dtrain.collectives.arena import Place
from dtrain.collectives.dtypes import Array

if TYPE_CHECKING:
    from dtrain.collectives.node import Node
    from dtrain.collectives.transport import Transport


@dataclass(slots=True)
class Call:
    """One call of a collective, in flat form."""

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
    in_place: bool = False  # target is source
    alike: bool = False  # all_to_all: all ranks have the same counts

    @property
    def apart(self) -> Array:
        """The source, in memory of its own: MPI takes no message from where it delivers one."""
        return self.source.copy() if np.may_share_memory(self.source, self.target) else self.source

    @property
    def at_root(self) -> bool:
        """Whether this rank is the root."""
        return self.transport.rank == self.root

    def met(self, name: str, algorithm: str, alike: bool = True) -> "Transport":
        """The transport, once all ranks of the node have come to this collective with the same arguments.

        Inside the MPI library nobody computes the slices that a peer may wait for, so all go in together; and ranks
        that do different things are told here instead of hanging there. alike: all arrays have one length and dtype.
        """
        if self.node is not None:
            number = self.node.note(name, algorithm, self.op, self.source if alike else None)
            self.node.await_arrived(number)
        return self.transport


class Algorithm(NamedTuple):
    """One way to do a collective."""

    run: Callable[[Call], None]
    possible: Callable[[Call], bool]
    preferred: Callable[[Call], bool] = lambda call: True


# Arrays from elsewhere: up to here through the staging, above by the MPI library. Measured with MPICH 5.0 and Open
# MPI 5.0 at 2 and 8 ranks on 2 cores: the staging wins up to 128-512 KiB for what is reduced or gathered, to 1-4 MiB
# for broadcast.
STAGED_BYTES = 256 * 1024
STAGED_BROADCAST_BYTES = 1 << 20

# Arrays in the window: above this length straight from there.
WINDOW_BYTES = 4096


def _alone(call: Call) -> bool:
    return call.transport.size == 1


def _on_node(call: Call) -> bool:
    return call.node is not None


def _in_window(call: Call) -> bool:
    return call.place is not None


def _even_on_node(call: Call) -> bool:
    """All blocks of all ranks are equally long."""
    return call.node is not None and call.alike and call.counts[0] == call.counts[-1]


def _long(call: Call) -> bool:
    """Worth a second synchronisation: the staging needs only one, and for what is this short, less time."""
    return max(call.source.nbytes, call.target.nbytes) > WINDOW_BYTES


def _long_gather(call: Call) -> bool:
    return sum(call.counts) * call.source.itemsize > WINDOW_BYTES


def _long_all_to_all(call: Call) -> bool:
    """What is cut unevenly has no other way through shared memory, and its length is known to one rank alone."""
    return not _even_on_node(call) or _long_gather(call)


def _short(call: Call) -> bool:
    """Through the staging: what is short, and what the MPI library cannot reduce."""
    return call.source.nbytes <= STAGED_BYTES or not call.transport.reduces(call.op, call.source)


def _short_gather(call: Call) -> bool:
    return sum(call.counts) * call.source.itemsize <= STAGED_BYTES


def _short_broadcast(call: Call) -> bool:
    return call.target.nbytes <= STAGED_BROADCAST_BYTES


def _reduces(call: Call) -> bool:
    return call.transport.size > 1 and call.transport.reduces(call.op, call.source)


def _several(call: Call) -> bool:
    return call.transport.size > 1


def _copy(call: Call) -> None:
    np.copyto(call.target, call.source)


def _node(call: Call) -> "Node":
    assert call.node is not None
    return call.node


def _window_all_reduce(call: Call) -> None:
    assert call.place is not None
    window.start_all_reduce(_node(call), call.source, call.place, call.op).wait()


def _window_reduce_scatter(call: Call) -> None:
    assert call.place is not None
    window.start_reduce_scatter(_node(call), call.source, call.place, call.target, call.counts, call.op).wait()


def _window_reduce(call: Call) -> None:
    assert call.place is not None
    target = call.target if call.at_root else None
    window.start_reduce(_node(call), call.source, call.place, target, call.target_place, call.op, call.root).wait()


def _window_all_gather(call: Call) -> None:
    assert call.place is not None
    window_moves.start_all_gather(_node(call), call.source, call.place, call.target, call.counts).wait()


def _window_all_to_all(call: Call) -> None:
    assert call.place is not None
    window_moves.start_all_to_all(
        _node(call), call.source, call.place, call.target, call.counts, call.out_counts, call.alike
    ).wait()


def _window_broadcast(call: Call) -> None:
    assert call.place is not None
    window_moves.start_broadcast(_node(call), call.target, call.place, call.root).wait()


def _window_gather(call: Call) -> None:
    place, target = (call.target_place, call.target) if call.at_root else (call.place, None)
    window_moves.start_gather(_node(call), call.source, place, target, call.counts, call.root).wait()


def _window_scatter(call: Call) -> None:
    source = call.source if call.at_root else None
    window_moves.start_scatter(_node(call), source, call.place, call.target, call.counts, call.root).wait()


def _native_all_reduce(call: Call) -> None:
    call.met("all_reduce", "native").all_reduce(call.source, call.target, call.op)


def _native_reduce_scatter(call: Call) -> None:
    call.met("reduce_scatter", "native").reduce_scatter(call.source, call.target, call.counts, call.op)


def _native_all_gather(call: Call) -> None:
    call.met("all_gather", "native", alike=False).all_gather(call.apart, call.target, call.counts)


def _native_gather(call: Call) -> None:
    call.met("gather", "native", alike=False).gather(
        call.apart, call.target if call.at_root else None, call.counts, call.root
    )


def _native_scatter(call: Call) -> None:
    call.met("scatter", "native", alike=False).scatter(
        call.apart if call.at_root else None, call.target, call.counts, call.root
    )


def _staged_gather(call: Call) -> None:
    staged.all_gather(_node(call), call.source, call.target if call.at_root else None, call.counts, call.root)


def _staged_all_to_all(call: Call) -> None:
    staged.all_to_all(_node(call), call.source, call.target, call.counts[0])


def _native_all_to_all(call: Call) -> None:
    call.met("all_to_all", "native", alike=False).all_to_all(call.apart, call.target, call.counts, call.out_counts)


def _native_reduce(call: Call) -> None:
    transport = call.met("reduce", "native")
    transport.reduce(call.source, call.target if call.at_root else None, call.op, call.root)


def _exchange_reduce(call: Call) -> None:
    transport = call.met("reduce", "exchange")
    exchange.reduce(transport, call.source, call.target if call.at_root else None, call.op, call.root)


def _native_broadcast(call: Call) -> None:
    call.met("broadcast", "native").broadcast(call.target, call.root)


def _exchange_all_reduce(call: Call) -> None:
    exchange.all_reduce(call.met("all_reduce", "exchange"), call.source, call.target, call.op)


def _exchange_reduce_scatter(call: Call) -> None:
    transport = call.met("reduce_scatter", "exchange")
    exchange.reduce_scatter(transport, call.source, call.target, call.counts, call.op)


ALL_REDUCE: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_all_reduce, lambda call: call.place is not None and call.in_place),
    "staged": Algorithm(lambda c: staged.all_reduce(_node(c), c.source, c.target, c.op), _on_node, _short),
    "native": Algorithm(_native_all_reduce, _reduces),
    "exchange": Algorithm(_exchange_all_reduce, _several),
}

REDUCE_SCATTER: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_reduce_scatter, lambda call: call.place is not None),
    "staged": Algorithm(
        lambda c: staged.reduce_scatter(_node(c), c.source, c.target, c.counts, c.op), _on_node, _short
    ),
    "native": Algorithm(_native_reduce_scatter, _reduces),
    "exchange": Algorithm(_exchange_reduce_scatter, _several),
}

ALL_GATHER: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_all_gather, _in_window, _long_gather),
    "staged": Algorithm(lambda c: staged.all_gather(_node(c), c.source, c.target, c.counts), _on_node, _short_gather),
    "native": Algorithm(_native_all_gather, _several),
}

BROADCAST: dict[str, Algorithm] = {
    "copy": Algorithm(lambda call: None, _alone),
    "window": Algorithm(_window_broadcast, _in_window, _long),
    "staged": Algorithm(lambda c: staged.broadcast(_node(c), c.target, c.root), _on_node, _short_broadcast),
    "native": Algorithm(_native_broadcast, _several),
}

REDUCE: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_reduce, _in_window, _long),
    "staged": Algorithm(lambda c: staged.all_reduce(_node(c), c.source, c.target, c.op, c.root), _on_node, _short),
    "native": Algorithm(_native_reduce, _reduces),
    "exchange": Algorithm(_exchange_reduce, _several),
}

ALL_TO_ALL: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_all_to_all, _in_window, _long_all_to_all),
    "staged": Algorithm(_staged_all_to_all, _even_on_node, _short_gather),
    "native": Algorithm(_native_all_to_all, _several),
}

GATHER: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_gather, _in_window, _long_gather),
    "staged": Algorithm(_staged_gather, _on_node, _short_gather),
    "native": Algorithm(_native_gather, _several),
}

SCATTER: dict[str, Algorithm] = {
    "copy": Algorithm(_copy, _alone),
    "window": Algorithm(_window_scatter, _in_window),
    "native": Algorithm(_native_scatter, _several),
}


def run(table: dict[str, Algorithm], name: str, call: Call) -> None:
    """Do the call by the row called `name`, or for "auto" by the first that is possible and preferred.

    ValueError for what cannot be.
    """
    if name == "auto":
        next(row for row in table.values() if row.possible(call) and row.preferred(call)).run(call)
        return
    if name not in table:
        raise ValueError(f"algorithm={name!r}: not an algorithm; allowed: auto, {', '.join(table)}")
    if _alone(call):
        name = "copy"
    if not table[name].possible(call):
        possible = ", ".join(other for other, row in table.items() if row.possible(call))
        raise ValueError(
            f"algorithm={name!r}: not possible for {call.op} of {call.source.dtype} in this memory between "
            f"{call.transport.size} ranks; possible here: auto, {possible}"
        )
    table[name].run(call)
