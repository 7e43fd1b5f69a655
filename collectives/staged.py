"""Collectives on one node for arrays from anywhere: through the staging of the control segment (`staging.py`).

    copy my data into my slot  ->  ARRIVED  ->  read the slots of the others  (-> REDUCED -> read the sums)

Small reductions take one synchronisation: every rank adds up all slots itself. Larger ones take two: each rank adds
up its slice, its own data straight from the source, and the others copy the sums from its slot. What is longer than a
slot goes in chunks; the slots alternate, so a chunk is written while slower ranks still read the one before.
Invariant: rank order in every sum, so the result does not depend on which of the two ways was taken.
"""

from collections.abc import Sequence

import numpy as np

from dtrain.collectives.dtypes import OPERATIONS, Array, starts
from dtrain.collectives.node import Node
from dtrain.collectives.staging import LONG, SHORT, ring_for
from dtrain.collectives.sums import owned, reduce_into
from dtrain.collectives.window import WindowWork

# Up to here one synchronisation and p reads by everybody beat two synchronisations.
SMALL_BYTES = 4096


def barrier(node: Node) -> None:
    """Return when all ranks have come."""
    number = node.begin("barrier", "staged")
    node.arrive(number)
    node.await_arrived(number)


def start_barrier(node: Node) -> WindowWork:
    """This rank has come; the work is done when all have."""
    return WindowWork(node, node.begin("barrier", "staged"), lambda: None, users=[])


def all_reduce(node: Node, source: Array, target: Array, op: str, root: int | None = None) -> None:
    """Target (count,) = the sum of source (count,), on all ranks or on root alone; target may be source."""
    name = "all_reduce" if root is None else "reduce"
    ufunc = OPERATIONS[op]
    wanted = root is None or root == node.rank
    small = source.nbytes <= SMALL_BYTES
    ring = SHORT if small else LONG
    chunk = ring.portion(1, source.itemsize)
    with np.errstate(all="ignore"):
        for begin in range(0, source.size, chunk):
            count = min(chunk, source.size - begin)
            piece = slice(begin, begin + count)
            number = node.begin(name, "staged", op, source, extra=-1 if root is None else root)
            slots = node.stage(number, source.dtype, ring)
            mine = slots[node.rank]
            if small:
                mine[:count] = source
                node.arrive(number)
                node.await_arrived(number)
                if wanted:
                    reduce_into(ufunc, slots, 0, count, [target])
                continue
            # My own slice stays where it is: I add it up, and its room in my slot takes the sums.
            start, stop = owned(count, node.rank, node.size)
            mine[:start] = source[begin : begin + start]
            mine[stop:count] = source[begin + stop : begin + count]
            own = list(slots)
            node.arrive(number)
            node.await_arrived(number)
            node.works.complete(number)  # works started before: REDUCED below speaks for them too
            if start < stop:
                own[node.rank] = source[piece]
                sums = [slots[node.rank][start:stop]]
                if wanted:
                    sums.append(target[piece][start:stop])
                reduce_into(ufunc, own, start, stop, sums)
            node.reduced(number)
            if wanted:
                node.await_reduced(number)
                for rank, slot in enumerate(slots):
                    first, last = owned(count, rank, node.size)
                    if rank != node.rank and first < last:
                        target[begin + first : begin + last] = slot[first:last]


def reduce_scatter(node: Node, source: Array, target: Array, counts: Sequence[int], op: str) -> None:
    """Target (counts[rank],) = the sum of the ranks' blocks `rank` of source (sum(counts),)."""
    offsets = starts(counts)
    ring = ring_for(node.size * max(counts) * source.itemsize)
    portion = ring.portion(node.size, source.itemsize)
    with np.errstate(all="ignore"):
        for begin in range(0, max(counts), portion):
            lengths = [max(0, min(portion, count - begin)) for count in counts]
            number = node.begin("reduce_scatter", "staged", op, source, extra=hash(tuple(counts)))
            slots = node.stage(number, source.dtype, ring)
            for rank, length in enumerate(lengths):
                origin = offsets[rank] + begin
                slots[node.rank][rank * portion : rank * portion + length] = source[origin : origin + length]
            node.arrive(number)
            node.await_arrived(number)
            start, length = node.rank * portion, lengths[node.rank]
            reduce_into(OPERATIONS[op], slots, start, start + length, [target[begin : begin + length]])


def scan(node: Node, source: Array, target: Array, op: str, inclusive: bool) -> None:
    """Target = the sum of the sources of the ranks up to mine; not `inclusive`: before mine, on rank 0 left alone.

    Each rank adds up what it needs: one synchronisation, and on average half of the slots are read.
    """
    before, ring = node.rank + inclusive, ring_for(source.nbytes)
    chunk = ring.portion(1, source.itemsize)
    with np.errstate(all="ignore"):
        for begin in range(0, source.size, chunk):
            piece = source[begin : begin + chunk]
            number = node.begin("scan" if inclusive else "exscan", "staged", op, source)
            slots = node.stage(number, source.dtype, ring)
            slots[node.rank][: piece.size] = piece
            node.arrive(number)
            node.await_arrived(number)
            into = target[begin : begin + piece.size]
            if before > 1:
                reduce_into(OPERATIONS[op], slots[:before], 0, piece.size, [into])
            elif before:
                into[...] = slots[0][: piece.size]


def all_gather(node: Node, source: Array, target: Array | None, counts: Sequence[int], root: int | None = None) -> None:
    """Target = the ranks' sources of lengths counts, one after another, on all ranks or on root alone."""
    name = "all_gather" if root is None else "gather"
    extra = hash((tuple(counts), -1 if root is None else root))  # not None: its hash differs between processes
    source, item = source.view(np.uint8), source.itemsize
    target = None if target is None else target.view(np.uint8)
    lengths = [count * item for count in counts]
    offsets = starts(lengths)
    ring = ring_for(max(lengths))
    for begin in range(0, max(lengths), ring.nbytes):
        number = node.begin(name, "staged", extra=extra)
        slots = node.stage(number, source.dtype, ring)
        mine = source[begin : begin + ring.nbytes]
        slots[node.rank][: mine.size] = mine
        node.arrive(number)
        if target is None:
            continue
        node.await_arrived(number)
        for slot, offset, length in zip(slots, offsets, lengths, strict=True):
            part = max(0, min(ring.nbytes, length - begin))
            target[offset + begin : offset + begin + part] = slot[:part]


def broadcast(node: Node, buffer: Array, root: int) -> None:
    """Buffer of every rank = buffer of root. Nobody waits for anybody but root."""
    octets = buffer.view(np.uint8)
    ring = ring_for(octets.size)
    for begin in range(0, octets.size, ring.nbytes):
        number = node.begin("broadcast", "staged", array=buffer, extra=root)
        slots = node.stage(number, octets.dtype, ring)
        piece = octets[begin : begin + ring.nbytes]
        if node.rank == root:
            slots[root][: piece.size] = piece
            node.arrive(number)
        else:
            node.arrive(number)
            node.await_arrived(number, node.only(root))
            piece[...] = slots[root][: piece.size]


def all_to_all(node: Node, source: Array, target: Array, count: int) -> None:
    """Block i of source goes to rank i, target is what came; all blocks of all ranks have `count` elements."""
    source, target, length = source.view(np.uint8), target.view(np.uint8), count * source.itemsize
    ring = ring_for(node.size * length)
    portion = ring.portion(node.size, 1)
    for begin in range(0, length, portion):
        part = min(portion, length - begin)
        number = node.begin("all_to_all", "staged", extra=length)
        slots = node.stage(number, source.dtype, ring)
        mine = slots[node.rank][: portion * node.size].reshape(node.size, portion)
        mine[:, :part] = source.reshape(node.size, length)[:, begin : begin + part]
        node.arrive(number)
        node.await_arrived(number)
        rows = target.reshape(node.size, length)
        for rank, slot in enumerate(slots):
            rows[rank, begin : begin + part] = slot[node.rank * portion : node.rank * portion + part]
