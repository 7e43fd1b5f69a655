"""Zero-copy movement on one node: who needs a block copies it straight out of the window of who has it.

    all_gather, 3 ranks                                 all_to_all
      source of rank 0 | a |   every rank copies a b c    | a0 a1 a2 |   rank 1 copies
      source of rank 1 | b |   from where they lie        | b0 b1 b2 |   a1 b1 c1
      source of rank 2 | c |   into its own result        | c0 c1 c2 |

    all_to_all in place: of each pair of ranks, b0 and a1 change places; rank 0 does the first half, rank 1 the second

how: "window", or "cma" for arrays from anywhere, which the kernel reads (`cross_memory.py`).

One copy per byte received, two synchronisations: the sources have arrived (ARRIVED: data and the place it lies at,
which may differ from rank to rank), and the readers are done (REDUCED: the source may change again). Each rank waits
only for those it reads from and those that read from it. A rank begins with its right neighbour, so that not all read
one source at once. Memory traffic for n bytes on p ranks: all_gather and all_to_all 2pn, in place 2(p-1)n, broadcast
and scatter 2n per reader; through private copies it is twice that. Invariant: a result never lies where a peer still
reads; the communicator sees to that; in place, each byte is moved by one rank alone.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from dtrain.collectives import cross_memory, records
from dtrain.collectives.arena import Place
from dtrain.collectives.copying import swap
from dtrain.collectives.cross_memory import PRIVATE
from dtrain.collectives.dtypes import Array, address, starts
from dtrain.collectives.flags import Peers
from dtrain.collectives.node import Node
from dtrain.collectives.records import IN_PLACE, NO_PLACE
from dtrain.collectives.sums import LINE
from dtrain.collectives.waiting import CollectiveMismatch
from dtrain.collectives.window import WindowWork

_OCTET = np.dtype(np.uint8)
_NOBODY: Peers = []


def start_all_gather(
    node: Node, source: Array, place: Place, target: Array, counts: Sequence[int], how: str
) -> WindowWork:
    """Target = the sources of all ranks one after another; source may be my own block of target."""
    source, target, item = source.view(np.uint8), target.view(np.uint8), source.itemsize
    lengths = [count * item for count in counts]
    offsets = starts(lengths)
    number = node.begin("all_gather", how, extra=hash((item, *counts)), aside=place)

    def compute() -> None:
        for rank in _from_mine(node):
            block = target[offsets[rank] : offsets[rank] + lengths[rank]]
            if rank == node.rank:
                _copy(source, block)
            else:
                _fetch(node, rank, number, 0, block)

    return WindowWork(node, number, compute)


def start_all_to_all(
    node: Node,
    source: Array,
    place: Place,
    target: Array,
    counts: Sequence[int],
    out_counts: Sequence[int],
    alike: bool,
    how: str,
) -> WindowWork:
    """Target = the blocks for this rank of all sources; target and source are disjoint.

    alike: all ranks have the same counts, so that everybody knows where his blocks lie. Otherwise the ranks write the
    starts of their blocks into the staging, which the next collective may use again: wait for this one before.
    """
    source, target, item = source.view(np.uint8), target.view(np.uint8), source.itemsize
    begins = [start * item for start in starts(counts)]
    ends = [begin + count * item for begin, count in zip(begins, counts, strict=True)]
    offsets = [start * item for start in starts(out_counts)]
    lengths = [count * item for count in out_counts]
    number = node.begin("all_to_all", how, extra=hash((item, *(counts if alike else ()))), aside=place)
    slots = None
    if not alike:
        slots = node.stage(number, np.dtype(np.int64))
        slots[node.rank][: node.size] = begins
        slots[node.rank][node.size : 2 * node.size] = ends

    def compute() -> None:
        for rank in _from_mine(node):
            begin, end = begins[node.rank], ends[node.rank]
            if slots is not None:
                begin, end = int(slots[rank][node.rank]), int(slots[rank][node.size + node.rank])
            if end - begin != lengths[rank]:
                raise CollectiveMismatch(
                    f"all_to_all: rank {rank} has {end - begin} bytes for rank {node.rank}, which expects "
                    f"{lengths[rank]} (out_counts)"
                )
            block = target[offsets[rank] : offsets[rank] + lengths[rank]]
            if rank == node.rank:
                block[...] = source[begin:end]
            else:
                _fetch(node, rank, number, begin, block)

    return WindowWork(node, number, compute)


def start_swaps(node: Node, array: Array, place: Place, counts: Sequence[int], how: str) -> WindowWork:
    """All_to_all in place: block i of rank j and block j of rank i change places; all blocks are equally long."""
    item = array.itemsize
    number = node.begin("all_to_all", IN_PLACE[how], extra=hash((item, *counts)), aside=place)

    def compute() -> None:
        for rank, there, here, nbytes in halves(node, counts[0] * item):
            other = node.aside(rank, number)
            assert other is not None
            process, begin = node.at_home(rank, records.packed(other))
            exchange = partial(cross_memory.swap, process) if process else swap
            exchange(begin + there, address(array) + here, nbytes)

    return WindowWork(node, number, compute)


def halves(node: Node, length: int) -> list[tuple[int, int, int, int]]:
    """What this rank swaps of blocks of so many bytes: (rank, where it begins there, where in mine, bytes)."""
    mine, middle = node.rank, length // 2 // LINE * LINE
    rows = []
    for rank in _from_mine(node)[1:]:
        start, stop = (0, middle) if mine < rank else (middle, length)
        rows.append((rank, mine * length + start, rank * length + start, stop - start))
    return rows


def start_broadcast(node: Node, buffer: Array, place: Place, root: int) -> WindowWork:
    """Buffer of every rank = buffer of root. Nobody waits for anybody but root, and root for all."""
    number = node.begin("broadcast", "window", array=buffer, extra=root, aside=place)
    if node.rank == root:
        return WindowWork(node, number, _nothing, sources=_NOBODY)
    octets = buffer.view(np.uint8)

    def compute() -> None:
        octets[...] = _read(node, root, number, 0, octets.size)

    return WindowWork(node, number, compute, sources=node.only(root), users=_NOBODY)


def start_gather(
    node: Node,
    source: Array,
    place: Place | None,
    target: Array | None,
    counts: Sequence[int],
    root: int,
    how: str,
) -> WindowWork:
    """Target on root = the sources of all ranks. `place`: of the target on root, of the source on the others.

    Where root's target lies in the window, everybody writes its block there; otherwise root reads all blocks.
    """
    source, item = source.view(np.uint8), source.itemsize
    lengths = [count * item for count in counts]
    offsets = starts(lengths)
    number = node.begin("gather", how, extra=hash((item, root, *counts)), aside=NO_PLACE if place is None else place)
    if node.rank != root:

        def write() -> None:
            if node.aside(root, number) is not None:
                begin = offsets[node.rank]
                _read(node, root, number, begin, begin + lengths[node.rank])[...] = source

        return WindowWork(node, number, write, sources=node.only(root), users=node.only(root))
    assert target is not None
    octets = target.view(np.uint8)

    def read() -> None:
        for rank in _from_mine(node):
            block = octets[offsets[rank] : offsets[rank] + lengths[rank]]
            if rank == root:
                _copy(source, block)
            elif place is None:
                _fetch(node, rank, number, 0, block)

    return WindowWork(node, number, read, sources=None if place is None else _NOBODY)


def start_scatter(
    node: Node,
    source: Array | None,
    place: Place | None,
    target: Array,
    counts: Sequence[int],
    root: int,
    how: str,
) -> WindowWork:
    """Target = this rank's block of root's source; place: of the source, on root."""
    target, item = target.view(np.uint8), target.itemsize
    lengths = [count * item for count in counts]
    begin = sum(lengths[: node.rank])
    end = begin + lengths[node.rank]
    number = node.begin("scatter", how, extra=hash((item, root, *counts)), aside=NO_PLACE if place is None else place)
    if source is not None:
        block = source.view(np.uint8)[begin:end]
        return WindowWork(node, number, lambda: _copy(block, target), sources=_NOBODY)

    def compute() -> None:
        _fetch(node, root, number, begin, target)

    return WindowWork(node, number, compute, sources=node.only(root), users=_NOBODY)


def _fetch(node: Node, rank: int, number: int, begin: int, block: Array) -> None:
    """Block = bytes from `begin` on of what a rank that has arrived put aside, in the window or in its own memory."""
    place = node.aside(rank, number)
    if place is not None and place[0] == PRIVATE:
        cross_memory.read(node.processes[rank], place[1] + begin, address(block), block.nbytes)
    else:
        block[...] = _read(node, rank, number, begin, begin + block.nbytes)


def _read(node: Node, rank: int, number: int, begin: int, end: int) -> Array:
    """Bytes begin to end of what a rank that has arrived put aside for this collective."""
    place = node.aside(rank, number)
    assert place is not None
    return node.arena.part(rank, (place[0], place[1] + begin), end - begin, _OCTET)


def _from_mine(node: Node) -> list[int]:
    """All ranks in a circle, this one first."""
    return [(node.rank + step) % node.size for step in range(node.size)]


def _copy(source: Array, block: Array) -> None:
    """Copy, unless both are the same memory."""
    if len(source) and address(source) != address(block):
        block[...] = source


def _nothing() -> None:
    pass
