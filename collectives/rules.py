"""When an algorithm on shared memory or over several nodes is possible, and when `auto` prefers it: the rules of the
tables in `algorithms.py`.

They look at nothing that may differ between the ranks of a correct program: size, nodes, counts, dtype, whether the
arrays lie in the shared window, and what all ranks of a node agreed on.
"""
# ruff: noqa: D103 (names say all there is to say about most of these functions)

from typing import NamedTuple

from dtrain.collectives.call import Call
from dtrain.collectives.staged import SMALL_BYTES


class Staged(NamedTuple):
    """Arrays from elsewhere go through the staging up to so many bytes: between two ranks, up to four, or more."""

    pair: int
    few: int
    many: int

    def has(self, call: Call, nbytes: int) -> bool:
        """Whether so many bytes are few enough."""
        size = call.transport.size
        return nbytes <= (self.pair if size == 2 else self.few if size <= 4 else self.many)


# Sums go through the staging at every length; what is moved, up to here. Above, one copy by the kernel beats two: ours
# (cma), or where that is not possible the MPI library's. Where many read one block it is the other way round, and the
# copy into the staging serves all. Measured with MPICH 5.0 at 2, 4 and 8 ranks on 2 cores.
KIB, MIB = 1 << 10, 1 << 20
LONG = 64 * MIB
GATHER, GATHER_OR_READ = Staged(128 * KIB, LONG, LONG), Staged(128 * KIB, 512 * KIB, LONG)
BROADCAST, BROADCAST_OR_READ = Staged(64 * KIB, LONG, LONG), Staged(64 * KIB, MIB, MIB)
ALL_TO_ALL, ALL_TO_ALL_OR_READ = Staged(512 * KIB, MIB, MIB), Staged(128 * KIB, 256 * KIB, 256 * KIB)

# Arrays in the window: above this length straight from there. What is moved, and reduce_scatter, needs one
# synchronisation in the staging and two in the window; that costs as much as copying 64 KiB (2 and 8 ranks on 2
# cores). Longer reductions to all or to root need two in both.
WINDOW_BYTES = 64 * 1024
WINDOW_REDUCE_BYTES = SMALL_BYTES


# Over several nodes: sums to all from here by both levels, what is scattered or moved from there; below by the MPI
# library. Measured between two hosts of 4 ranks at 1 Gbit/s. all_to_all has only direct messages to gain from, which
# the library sends too: it is done by both levels where that is asked for.
HIERARCHY_BYTES = 256 * 1024
HIERARCHY_MOVE_BYTES = 1 << 20


def alone(call: Call) -> bool:
    return call.transport.size == 1


def several(call: Call) -> bool:
    return call.transport.size > 1


def on_node(call: Call) -> bool:
    return call.node is not None


def in_window(call: Call) -> bool:
    return call.node is not None and call.place is not None


def in_place_in_window(call: Call) -> bool:
    return call.node is not None and call.place is not None and call.in_place


def readable(call: Call) -> bool:
    """Every rank may read the memory of the others."""
    return call.node is not None and call.node.reads


def even_on_node(call: Call) -> bool:
    """All blocks of all ranks are equally long."""
    return call.node is not None and call.alike and call.counts[0] == call.counts[-1]


def over_nodes(call: Call) -> bool:
    return call.levels is not None


def even_over_nodes(call: Call) -> bool:
    return call.levels is not None and call.alike and call.counts[0] == call.counts[-1]


def far(call: Call) -> bool:
    return call.source.nbytes >= HIERARCHY_BYTES


def far_and_long(call: Call) -> bool:
    return max(call.source.nbytes, call.target.nbytes) >= HIERARCHY_MOVE_BYTES


def never(call: Call) -> bool:
    return False


def reduces(call: Call) -> bool:
    return call.transport.size > 1 and call.transport.reduces(call.op, call.source)


def long(call: Call) -> bool:
    return call.source.nbytes > WINDOW_BYTES


def long_reduce(call: Call) -> bool:
    return call.source.nbytes > WINDOW_REDUCE_BYTES


def long_gather(call: Call) -> bool:
    return sum(call.counts) * call.source.itemsize > WINDOW_BYTES


def long_all_to_all(call: Call) -> bool:
    """What is cut unevenly has no other way through shared memory, and its length is known to one rank alone."""
    return not even_on_node(call) or long_gather(call)


def short_reduce(call: Call) -> bool:
    """What is not very long, and what the MPI library cannot reduce."""
    return call.source.nbytes <= LONG or not call.transport.reduces(call.op, call.source)


def short_all_gather(call: Call) -> bool:
    limits = GATHER_OR_READ if readable(call) else GATHER
    return limits.has(call, sum(call.counts) * call.source.itemsize)


def short_gather(call: Call) -> bool:
    return GATHER.has(call, sum(call.counts) * call.source.itemsize)


def short_all_to_all(call: Call) -> bool:
    limits = ALL_TO_ALL_OR_READ if readable(call) else ALL_TO_ALL
    return limits.has(call, sum(call.counts) * call.source.itemsize)


def short_broadcast(call: Call) -> bool:
    limits = BROADCAST_OR_READ if readable(call) else BROADCAST
    return limits.has(call, call.target.nbytes)


def pair(call: Call) -> bool:
    return call.transport.size == 2


def more(call: Call) -> bool:
    """More than two ranks: the library moves between them in turns, and they read at once."""
    return call.transport.size > 2


def always(call: Call) -> bool:
    return True
