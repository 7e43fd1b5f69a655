"""Steps and bytes of one call on this rank, for each way to do a collective (p ranks, n bytes, own block b).

The formulas count what `counters.py` defines. `native` has those of an algorithm of least volume: what the MPI library
really sends it does not tell. Only the sender and the receiver of a message between two ranks count it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import cut
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.staging import LONG
from dtrain.collectives.sums import owned
from dtrain.collectives.window_moves import halves

if TYPE_CHECKING:
    from dtrain.collectives.algorithms import Call

Formula = Callable[["Call"], Volume]

NOTHING = Volume(0, 0, 0)


def unknown(call: "Call") -> Volume:
    """For an algorithm that has no formula."""
    return Volume(1, 0, 0)


def nothing(call: "Call") -> Volume:
    """One rank: no communication."""
    return NOTHING


def _own(call: "Call", counts: Sequence[int]) -> int:
    return counts[call.transport.rank] * call.source.itemsize


def _others(call: "Call") -> int:
    return call.transport.size - 1


def _slice(call: "Call") -> int:
    """Bytes of the slice that this rank adds up."""
    start, stop = owned(call.source.size, call.transport.rank, call.transport.size)
    return (stop - start) * call.source.itemsize


def _chunks(nbytes: int, portion: int = LONG.nbytes) -> int:
    return max(1, -(-nbytes // portion))


# Windows: reads count as received, writes into a peer's memory as sent


def window_all_reduce(call: "Call") -> Volume:
    """My slice from all others, the sum of it to all others."""
    moved = _others(call) * _slice(call)
    return Volume(2, moved, moved)


def window_shared(call: "Call") -> Volume:
    """My slice from all others; the sum is written once, and read by whoever needs it."""
    return Volume(2, 0, _others(call) * _slice(call))


def window_reduce_scatter(call: "Call") -> Volume:
    """My block from all others."""
    return Volume(2, 0, _others(call) * _own(call, call.counts))


def window_reduce(call: "Call") -> Volume:
    """My slice from all others, the sum of it to root; or everything to root, if its result is private."""
    if call.target_place is not None:
        mine = _slice(call)
        return Volume(2, 0 if call.at_root else mine, _others(call) * mine)
    return Volume(2, 0, _others(call) * call.source.nbytes if call.at_root else 0)


def window_all_gather(call: "Call") -> Volume:
    """The blocks of all others."""
    return Volume(2, 0, call.target.nbytes - call.source.nbytes)


def window_gather(call: "Call") -> Volume:
    """My block to root; or root reads it, if its result is private."""
    if call.target_place is not None:
        return Volume(2, 0 if call.at_root else call.source.nbytes, 0)
    return Volume(2, 0, call.target.nbytes - call.source.nbytes if call.at_root else 0)


def window_all_to_all(call: "Call") -> Volume:
    """The blocks for me from all others; in place, half of what changes places between us both, either way."""
    if call.in_place:
        moved = sum(row[-1] for row in halves(call.stage, _own(call, call.counts)))
        return Volume(2, moved, moved)
    return moved_all_to_all(call)


def moved_all_to_all(call: "Call") -> Volume:
    """The blocks for me from all others."""
    return Volume(2, 0, call.target.nbytes - _own(call, call.out_counts))


def window_from_root(call: "Call") -> Volume:
    """Broadcast and scatter: what this rank gets from root."""
    return Volume(2, 0, 0 if call.at_root else call.target.nbytes)


# Staging: what is put into the own slot counts as sent, what is read from other slots as received


def staged_all_reduce(call: "Call") -> Volume:
    """Short: everything from all. Longer: my slice from all, and the sums of theirs."""
    nbytes = call.source.nbytes
    if nbytes <= SMALL_BYTES:
        return Volume(1, nbytes, _others(call) * nbytes)
    return Volume(2 * _chunks(nbytes), nbytes, _others(call) * _slice(call) + nbytes - _slice(call))


def window_staged_all_reduce(call: "Call") -> Volume:
    """My slice from all, into the slot, and the sums of theirs."""
    nbytes, size = call.source.nbytes, call.transport.size
    chunks = _chunks(nbytes, size * LONG.nbytes)
    return Volume(2 * chunks, _slice(call), _others(call) * _slice(call) + nbytes - _slice(call))


def staged_reduce(call: "Call") -> Volume:
    """As all_reduce, but only root reads sums."""
    steps, sent, received = staged_all_reduce(call)
    if not call.at_root:
        received = 0 if call.source.nbytes <= SMALL_BYTES else _others(call) * _slice(call)
    return Volume(steps, sent, received)


def staged_reduce_scatter(call: "Call") -> Volume:
    """Everything into the slot, my block from all others."""
    chunks = _chunks(max(call.counts) * call.source.itemsize, LONG.nbytes // call.transport.size)
    return Volume(chunks, call.source.nbytes, _others(call) * _own(call, call.counts))


def staged_gather(call: "Call") -> Volume:
    """all_gather and gather: my block into the slot, those of the others to whom it may concern."""
    chunks = _chunks(max(call.counts) * call.source.itemsize)
    total = sum(call.counts) * call.source.itemsize
    return Volume(chunks, call.source.nbytes, total - call.source.nbytes if call.target.nbytes == total else 0)


def staged_broadcast(call: "Call") -> Volume:
    """Root puts it into the slot, the others read it there."""
    nbytes = call.target.nbytes
    return Volume(_chunks(nbytes), nbytes if call.at_root else 0, 0 if call.at_root else nbytes)


def staged_all_to_all(call: "Call") -> Volume:
    """Everything into the slot, the blocks for me from all others."""
    own = _own(call, call.counts)
    return Volume(_chunks(own, LONG.nbytes // call.transport.size), call.source.nbytes, call.target.nbytes - own)


def staged_scan(call: "Call") -> Volume:
    """Mine for those behind me, all before me: one synchronisation for each chunk."""
    rank, n = call.transport.rank, call.source.nbytes
    return Volume(_chunks(n), n * (rank < _others(call)), n * rank)


# Messages: of the least volume, and by `exchange`


def least_all_reduce(call: "Call") -> Volume:
    """2 n (p-1)/p each way: a ring."""
    moved = 2 * call.source.nbytes * _others(call) // call.transport.size
    return Volume(1, moved, moved)


def least_reduce_scatter(call: "Call") -> Volume:
    """All blocks but mine leave as partial sums, and as much comes."""
    moved = call.source.nbytes - _own(call, call.counts)
    return Volume(1, moved, moved)


def least_reduce(call: "Call") -> Volume:
    """A chain: everything once from rank to rank."""
    return Volume(1, 0 if call.at_root else call.source.nbytes, call.source.nbytes if call.at_root else 0)


def least_scan(call: "Call") -> Volume:
    """A chain: from the rank before me, to the next."""
    rank, n = call.transport.rank, call.source.nbytes
    return Volume(1, n * (rank < _others(call)), n * (rank > 0))


def least_all_gather(call: "Call") -> Volume:
    """My block and those that pass through."""
    moved = call.target.nbytes - call.source.nbytes
    return Volume(1, moved, moved)


def least_gather(call: "Call") -> Volume:
    """Each block straight to root."""
    if call.at_root:
        return Volume(1, 0, call.target.nbytes - call.source.nbytes)
    return Volume(1, call.source.nbytes, 0)


def least_scatter(call: "Call") -> Volume:
    """Each block straight from root."""
    if call.at_root:
        return Volume(1, call.source.nbytes - call.target.nbytes, 0)
    return Volume(1, 0, call.target.nbytes)


def least_broadcast(call: "Call") -> Volume:
    """A chain: once from rank to rank."""
    nbytes = call.target.nbytes
    return Volume(1, nbytes if call.at_root else 0, 0 if call.at_root else nbytes)


def all_to_all(call: "Call") -> Volume:
    """Every block straight to its rank."""
    return Volume(
        _others(call), call.source.nbytes - _own(call, call.counts), call.target.nbytes - _own(call, call.out_counts)
    )


def exchange_all_reduce(call: "Call") -> Volume:
    """Blocks to their owners, sums to all."""
    size = call.transport.size
    block = cut(call.source.size, size)[call.transport.rank] * call.source.itemsize
    rest = call.source.nbytes - block
    return Volume(2 * (size - 1), rest + (size - 1) * block, (size - 1) * block + rest)


def exchange_reduce_scatter(call: "Call") -> Volume:
    """Blocks to their owners."""
    own = _own(call, call.counts)
    return Volume(_others(call), call.source.nbytes - own, _others(call) * own)


def exchange_reduce(call: "Call") -> Volume:
    """Blocks to their owners, sums to root."""
    size = call.transport.size
    block = cut(call.source.size, size)[call.transport.rank] * call.source.itemsize
    rest = call.source.nbytes - block
    to_root, from_owners = (0, rest) if call.at_root else (block, 0)
    return Volume(size, rest + to_root, (size - 1) * block + from_owners)
