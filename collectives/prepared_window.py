"""Collectives in the window, prepared: `window.py` and `window_moves.py` without finding views and lengths again.

record and place published -> ARRIVED -> my part, all views made before -> REDUCED
"""

from collections.abc import Callable

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.arena import Place
from dtrain.collectives.call import Call
from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, address, starts
from dtrain.collectives.flags import Peers
from dtrain.collectives.node import Node
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.sums import block_elements, owned, reduce_into

Run = Callable[[Array, Array], None]
Part = Callable[[int, Array, Array], None]  # number of the collective, source, target
_OCTET = np.dtype(np.uint8)


def _windowed(
    node: Node,
    record: Record,
    part: Part,
    aside: Place = NO_PLACE,
    sources: Peers | None = None,
    users: Peers | None = None,
) -> Run:
    """Two synchronisations around this rank's part."""

    def run(source: Array, target: Array) -> None:
        number = node.begin_record(record, aside)
        node.arrive(number)
        node.complete(number)  # works started before: REDUCED below speaks for them too
        node.await_arrived(number, sources)
        part(number, source, target)
        node.reduced(number)
        node.await_reduced(number, users)

    return run


# Reductions in the window


def add_in_place(ufunc: np.ufunc, parts: list[Array], start: int, stop: int) -> Callable[[], None]:
    """What `window.reduce_in_place` does, with all blocks cut before."""
    dtype = parts[0].dtype
    if accumulator(dtype) != dtype:
        slices = [part[start:stop] for part in parts]
        return lambda: reduce_into(ufunc, parts, start, stop, slices)
    step = block_elements(dtype, len(parts))
    first, others = parts[0], parts[1:]
    blocks = []
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        blocks.append((first[begin:end], [part[begin:end] for part in others]))

    def add() -> None:
        for total, rest in blocks:
            for block in rest:
                ufunc(total, block, total)
            for block in rest:
                block[...] = total

    return add


def window_all_reduce(call: Call) -> Run:
    """All ranks' arrays at one place become their sum."""
    node, place = call.window
    parts = node.arena.parts(place, call.source.size, call.source.dtype)
    add = add_in_place(OPERATIONS[call.op], parts, *owned(call.source.size, node.rank, node.size))

    def part(number: int, source: Array, target: Array) -> None:
        with np.errstate(all="ignore"):
            add()

    dtype, count = call.source.dtype, call.source.size
    return _windowed(node, records.record("all_reduce", "window", call.op, dtype, count, place, 0), part)


def window_reduce_scatter(call: Call) -> Run:
    """Target becomes the sum of all ranks' blocks of this rank."""
    node, place = call.window
    dtype, count = call.source.dtype, call.source.size
    parts = node.arena.parts(place, count, dtype)
    start = sum(call.counts[: node.rank])
    stop = start + call.counts[node.rank]
    ufunc = OPERATIONS[call.op]

    def part(number: int, source: Array, target: Array) -> None:
        with np.errstate(all="ignore"):
            reduce_into(ufunc, parts, start, stop, [target])

    extra = hash(tuple(call.counts))
    return _windowed(node, records.record("reduce_scatter", "window", call.op, dtype, count, place, extra), part)


# Movement in the window


def _view(node: Node, rank: int, number: int, begin: int, length: int) -> Array:
    """Bytes of what a rank that has arrived put aside; the places repeat, and so do the views."""
    place = node.aside(rank, number)
    assert place is not None
    return node.arena.parts((place[0], place[1] + begin), length, _OCTET)[rank]


def window_all_gather(call: Call) -> Run:
    """Target = the sources of all ranks, one after another."""
    node, place = call.window
    item, mine = call.source.itemsize, node.rank
    lengths = [count * item for count in call.counts]
    blocks = [slice(start, start + length) for start, length in zip(starts(lengths), lengths, strict=True)]
    others = [(mine + step) % node.size for step in range(1, node.size)]

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        own = target[blocks[mine]]
        if len(own) and address(own) != address(source):
            copy(own, source.view(np.uint8))
        for rank in others:
            copy(target[blocks[rank]], _view(node, rank, number, 0, lengths[rank]))

    extra = hash((item, *call.counts))
    return _windowed(node, records.record("all_gather", "window", "", None, 0, NO_PLACE, extra), part, place)


def window_all_to_all(call: Call) -> Run | None:
    """Target = the blocks for this rank of all sources. Uneven blocks have no plan."""
    node, place = call.window
    item, mine = call.source.itemsize, node.rank
    if not call.alike:
        return None
    begins = [start * item for start in starts(call.counts)]
    length = call.counts[mine] * item
    own = slice(begins[mine], begins[mine] + length)
    others = [(mine + step) % node.size for step in range(1, node.size)]

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        copy(target[mine * length : (mine + 1) * length], source.view(np.uint8)[own])
        for rank in others:
            copy(target[rank * length : (rank + 1) * length], _view(node, rank, number, begins[mine], length))

    extra = hash((item, *call.counts))
    return _windowed(node, records.record("all_to_all", "window", "", None, 0, NO_PLACE, extra), part, place)


def window_broadcast(call: Call) -> Run:
    """Target of every rank = target of root."""
    node, place = call.window
    root, dtype, count = call.root, call.target.dtype, call.target.size
    length = count * dtype.itemsize
    record = records.record("broadcast", "window", "", dtype, count, NO_PLACE, root)
    if node.rank == root:
        return _windowed(node, record, lambda number, source, target: None, place, sources=[])

    def part(number: int, source: Array, target: Array) -> None:
        copy(target.view(np.uint8), _view(node, root, number, 0, length))

    return _windowed(node, record, part, place, sources=node.only(root), users=[])
