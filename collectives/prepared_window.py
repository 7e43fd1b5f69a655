"""Collectives in the window, prepared: `window.py` and `window_moves.py` without finding views and lengths again.

record and place published -> ARRIVED -> my part, all views made before -> REDUCED
"""

from collections.abc import Callable

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.arena import Place
from dtrain.collectives.caches import last_level_cache
from dtrain.collectives.call import Call
from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import OPERATIONS, Array, address, starts
from dtrain.collectives.flags import Peers
from dtrain.collectives.node import Node
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.sums import Sum, owned

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


def window_all_reduce(call: Call) -> Run:
    """All ranks' arrays at one place become their sum."""
    node, place = call.window
    parts = node.arena.parts(place, call.source.size, call.source.dtype)
    add = Sum(OPERATIONS[call.op], parts, *owned(call.source.size, node.rank, node.size))

    def part(number: int, source: Array, target: Array) -> None:
        add.in_place()

    dtype, count = call.source.dtype, call.source.size
    return _windowed(node, records.record("all_reduce", "window", call.op, dtype, count, place, 0), part)


def window_all_reduce_shared(node: Node, place: Place, op: str, result: Array) -> Callable[[], None]:
    """The sum of all ranks' arrays at this place is written once, into `result`, the same memory on all."""
    dtype, count = result.dtype, result.size
    start, stop = owned(count, node.rank, node.size)
    add = Sum(OPERATIONS[op], node.arena.parts(place, count, dtype), start, stop)
    into = [result[start:stop]]

    def part(number: int, source: Array, target: Array) -> None:
        add.into(into)

    run = _windowed(node, records.record("all_reduce_shared", "window", op, dtype, count, place, 0), part)
    return lambda: run(result, result)


def window_reduce_scatter(call: Call) -> Run:
    """Target becomes the sum of all ranks' blocks of this rank."""
    node, place = call.window
    dtype, count = call.source.dtype, call.source.size
    parts = node.arena.parts(place, count, dtype)
    start = sum(call.counts[: node.rank])
    add = Sum(OPERATIONS[call.op], parts, start, start + call.counts[node.rank])

    def part(number: int, source: Array, target: Array) -> None:
        add.into([target])

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
    past = (node.size + 1) * sum(lengths) > last_level_cache()

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        own = target[blocks[mine]]
        if len(own) and address(own) != address(source):
            copy(own, source.view(np.uint8), past)
        for rank in others:
            copy(target[blocks[rank]], _view(node, rank, number, 0, lengths[rank]), past)

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
    past = 2 * node.size * node.size * length > last_level_cache()

    def part(number: int, source: Array, target: Array) -> None:
        target = target.view(np.uint8)
        copy(target[mine * length : (mine + 1) * length], source.view(np.uint8)[own], past)
        for rank in others:
            copy(target[rank * length : (rank + 1) * length], _view(node, rank, number, begins[mine], length), past)

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

    past = node.size * length > last_level_cache()

    def part(number: int, source: Array, target: Array) -> None:
        copy(target.view(np.uint8), _view(node, root, number, 0, length), past)

    return _windowed(node, record, part, place, sources=node.only(root), users=[])
