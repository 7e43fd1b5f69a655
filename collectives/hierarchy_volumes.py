"""Steps and bytes of one call over several nodes on this rank: what crosses the network, and all together.

n bytes on N nodes; g ranks on this one; s: the slices that this rank drives, n in all of a node. A sum of small floats
travels as float32 until it is added up. `*_network` are the bytes that this rank sends to other nodes; `Levels.sent`
counts them where they are sent, and the tests compare both, and the counters of the interfaces.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import accumulator, cut
from dtrain.collectives.hierarchy import PIECE_BYTES
from dtrain.collectives.levels import SLOT_BYTES, Levels
from dtrain.collectives.sums import owned

if TYPE_CHECKING:
    from dtrain.collectives.call import Call


def _portions(count: int, length: int) -> Iterator[int]:
    """Lengths of the portions of `count` things."""
    return (min(length, count - begin) for begin in range(0, count, length))


def _in_window(call: "Call") -> bool:
    return call.place is not None and call.in_place


def _slices(call: "Call") -> Iterator[int]:
    """Elements of the slices that this rank drives, portion by portion."""
    levels, count = call.both_levels, call.source.size
    for portion in _portions(count, count if _in_window(call) else SLOT_BYTES // call.source.itemsize):
        for lane in levels.mine:
            start, stop = owned(portion, lane, levels.lanes)
            yield stop - start


def all_reduce_network(call: "Call") -> int:
    """2 s (N-1)/N; two nodes: s, at once."""
    levels, dtype = call.both_levels, call.source.dtype
    wide, size = accumulator(dtype).itemsize, len(levels.nodes)
    if size == 2 and wide == dtype.itemsize:
        return sum(_slices(call)) * wide
    sent = 0
    for length in _slices(call):
        for piece in _portions(length, PIECE_BYTES // wide):
            mine = cut(piece, size)[levels.here]
            sent += (piece - mine) * wide + (size - 1) * mine * dtype.itemsize
    return sent


def all_reduce(call: "Call") -> Volume:
    """Of the node: my slices from all its ranks, their sums to all. Through the staging everything once more."""
    levels, nbytes = call.both_levels, call.source.nbytes
    network, others = all_reduce_network(call), len(levels.members) - 1
    mine = sum(_slices(call)) * call.source.itemsize
    rounds = 3 if len(levels.nodes) == 2 else 4
    if _in_window(call):
        return Volume(rounds, network + others * mine, network + others * mine)
    steps = rounds * -(-nbytes // SLOT_BYTES)
    return Volume(steps, network + nbytes, network + others * mine + nbytes - mine)


def _duties(levels: Levels) -> list[int]:
    """The ranks of other nodes for which this one sums up its node."""
    return [
        rank
        for node, ranks in enumerate(levels.nodes)
        if node != levels.here
        for rank in ranks[levels.local :: len(levels.members)]
    ]


def reduce_scatter_network(call: "Call") -> int:
    """The sums over this node of the blocks of those who have my number elsewhere: n (N-1)/N per node."""
    return sum(call.counts[rank] for rank in _duties(call.both_levels)) * accumulator(call.source.dtype).itemsize


def reduce_scatter(call: "Call") -> Volume:
    """Of the node: the blocks that I sum up."""
    levels, wide = call.both_levels, accumulator(call.source.dtype).itemsize
    sent, own = reduce_scatter_network(call), call.counts[levels.rank]
    items = own + sum(call.counts[rank] for rank in _duties(levels))
    received = (len(levels.nodes) - 1) * own * wide + (len(levels.members) - 1) * items * call.source.itemsize
    if call.place is not None:
        return Volume(3, sent, received)
    length = max(1, SLOT_BYTES // call.source.itemsize // len(call.counts))
    return Volume(3 * -(-max(call.counts) // length), sent + call.source.nbytes, received)


def all_gather_network(call: "Call") -> int:
    """My block once to each other node."""
    return (len(call.both_levels.nodes) - 1) * call.source.nbytes


def all_gather(call: "Call") -> Volume:
    """Of the node: my block put there, those of the others fetched."""
    levels, item = call.both_levels, call.source.itemsize
    driven = sum(call.counts[rank] for rank in _duties(levels)) * item
    steps = 3 * -(-max(call.counts) * item // (SLOT_BYTES // len(call.counts)))
    fetched = call.target.nbytes - call.source.nbytes - driven
    return Volume(steps, all_gather_network(call) + call.source.nbytes, driven + fetched)


def broadcast_network(call: "Call") -> int:
    """My slices to the next node of the chain."""
    levels = call.both_levels
    position = (levels.here - levels.node_of(call.root)[0]) % len(levels.nodes)
    return sum(_octets(call)) if position < len(levels.nodes) - 1 else 0


def _octets(call: "Call") -> Iterator[int]:
    levels = call.both_levels
    for portion in _portions(call.target.nbytes, SLOT_BYTES):
        for lane in levels.mine:
            start, stop = owned(portion, lane, levels.lanes)
            yield stop - start


def broadcast(call: "Call") -> Volume:
    """Root puts it there; every other rank of its node reads it, and elsewhere what it did not receive itself."""
    nbytes, network = call.target.nbytes, broadcast_network(call)
    steps = 3 * -(-nbytes // SLOT_BYTES)
    return Volume(steps, network + (nbytes if call.at_root else 0), 0 if call.at_root else nbytes)


def all_to_all_network(call: "Call") -> int:
    """My blocks for all ranks of other nodes."""
    levels = call.both_levels
    away = set(range(len(call.counts))) - set(levels.members)
    return sum(call.counts[rank] for rank in away) * call.source.itemsize


def all_to_all(call: "Call") -> Volume:
    """Sent: blocks for other nodes in messages, those for mine put into the staging."""
    levels = call.both_levels
    steps = 3 * -(-call.counts[0] * call.source.itemsize // (SLOT_BYTES // max(map(len, levels.nodes))))
    return Volume(steps, call.source.nbytes, call.target.nbytes - call.counts[levels.rank] * call.source.itemsize)
