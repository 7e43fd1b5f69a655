"""From a call to what does it: the window, the staging, the transport's own collective, or `exchange`.

A function that returns a request has started the collective; the others have done it.
"""
# ruff: noqa: D103 (names and types say all there is to say about these functions)

from dtrain.collectives import (
    exchange,
    hierarchy,
    hierarchy_moves,
    prepared_cma,
    prepared_window,
    staged,
    uneven,
    window,
    window_moves,
)
from dtrain.collectives.call import Call
from dtrain.collectives.dtypes import Array
from dtrain.collectives.window import WindowWork
from dtrain.collectives.work import Request


def _at_root(call: Call, array: Array) -> Array | None:
    return array if call.at_root else None


# In the window


def window_all_reduce(call: Call) -> Request:
    node, place = call.window
    return window.start_all_reduce(node, call.source, place, call.op)


def window_staged_all_reduce(call: Call) -> None:
    prepared_window.window_staged_all_reduce(call)(call.source, call.target)


def window_reduce_scatter(call: Call) -> Request:
    node, place = call.window
    return window.start_reduce_scatter(node, call.source, place, call.target, call.counts, call.op)


def window_reduce(call: Call) -> WindowWork:
    node, place = call.window
    target, at = _at_root(call, call.target), call.target_place
    return window.start_reduce(node, call.source, place, target, at, call.op, call.root)


def window_broadcast(call: Call) -> Request:
    node, place = call.window
    return window_moves.start_broadcast(node, call.target, place, call.root)


# In the window, or where the arrays lie: how = "window" or "cma"


def start_all_gather_at_home(call: Call, how: str) -> Request:
    node, place = call.home
    return window_moves.start_all_gather(node, call.source, place, call.target, call.counts, how)


def cma_all_to_all(call: Call) -> None:
    if call.alike:
        start_all_to_all_at_home(call, "cma").wait()
    else:
        uneven.exchange(call.stage, call.source, call.target, call.counts, call.out_counts)


def cma_broadcast(call: Call) -> None:
    prepared_cma.cma_broadcast(call)(call.target, call.target)


def start_all_to_all_at_home(call: Call, how: str) -> Request:
    node, place = call.home
    if call.in_place:
        return window_moves.start_swaps(node, call.target, place, call.counts, how)
    return window_moves.start_all_to_all(
        node, call.source, place, call.target, call.counts, call.out_counts, call.alike, how
    )


def start_gather_at_home(call: Call, how: str) -> WindowWork:
    node, place = call.home
    target, at = _at_root(call, call.target), call.target_place if call.at_root else place
    return window_moves.start_gather(node, call.source, at, target, call.counts, call.root, how)


def start_scatter_at_home(call: Call, how: str) -> Request:
    node, place = call.home
    source = _at_root(call, call.source)
    return window_moves.start_scatter(node, source, place, call.target, call.counts, call.root, how)


# Through the staging


def staged_all_reduce(call: Call) -> None:
    staged.all_reduce(call.stage, call.source, call.target, call.op)


def staged_reduce(call: Call) -> None:
    staged.all_reduce(call.stage, call.source, call.target, call.op, call.root)


def staged_reduce_scatter(call: Call) -> None:
    staged.reduce_scatter(call.stage, call.source, call.target, call.counts, call.op)


def staged_all_gather(call: Call) -> None:
    staged.all_gather(call.stage, call.source, call.target, call.counts)


def staged_scan(call: Call) -> None:
    staged.scan(call.stage, call.source, call.target, call.op, inclusive=True)


def staged_exscan(call: Call) -> None:
    staged.scan(call.stage, call.source, call.target, call.op, inclusive=False)


def staged_gather(call: Call) -> None:
    staged.all_gather(call.stage, call.source, _at_root(call, call.target), call.counts, call.root)


def staged_all_to_all(call: Call) -> None:
    staged.all_to_all(call.stage, call.source, call.target, call.counts[0])


def staged_broadcast(call: Call) -> None:
    staged.broadcast(call.stage, call.target, call.root)


# Over several nodes


def hierarchical_all_reduce(call: Call) -> Request:
    place = call.place if call.in_place else None
    return hierarchy.start_all_reduce(call.both_levels, call.source, call.target, place, call.op)


def hierarchical_reduce_scatter(call: Call) -> Request:
    return hierarchy.start_reduce_scatter(call.both_levels, call.source, call.target, call.place, call.counts, call.op)


def hierarchical_all_gather(call: Call) -> Request:
    return hierarchy_moves.start_all_gather(call.both_levels, call.source, call.target, call.counts)


def hierarchical_broadcast(call: Call) -> Request:
    return hierarchy_moves.start_broadcast(call.both_levels, call.target, call.root)


def hierarchical_all_to_all(call: Call) -> Request:
    return hierarchy_moves.start_all_to_all(call.both_levels, call.apart, call.target, call.counts[0])


def staged_barrier(call: Call) -> None:
    staged.barrier(call.stage)


# By the transport


def native_barrier(call: Call) -> None:
    call.met("barrier", "native", alike=False).barrier()


def native_all_reduce(call: Call) -> None:
    call.met("all_reduce", "native").all_reduce(call.source, call.target, call.op)


def native_reduce_scatter(call: Call) -> None:
    call.met("reduce_scatter", "native").reduce_scatter(call.source, call.target, call.counts, call.op)


def native_reduce(call: Call) -> None:
    call.met("reduce", "native").reduce(call.source, _at_root(call, call.target), call.op, call.root)


def native_scan(call: Call) -> None:
    call.met("scan", "native").scan(call.source, call.target, call.op, inclusive=True)


def native_exscan(call: Call) -> None:
    call.met("exscan", "native").scan(call.source, call.target, call.op, inclusive=False)


def native_all_gather(call: Call) -> None:
    call.met("all_gather", "native", alike=False).all_gather(call.apart, call.target, call.counts)


def native_gather(call: Call) -> None:
    transport = call.met("gather", "native", alike=False)
    transport.gather(call.apart, _at_root(call, call.target), call.counts, call.root)


def native_scatter(call: Call) -> None:
    transport = call.met("scatter", "native", alike=False)
    transport.scatter(_at_root(call, call.apart), call.target, call.counts, call.root)


def native_all_to_all(call: Call) -> None:
    call.met("all_to_all", "native", alike=False).all_to_all(call.apart, call.target, call.counts, call.out_counts)


def native_broadcast(call: Call) -> None:
    call.met("broadcast", "native").broadcast(call.target, call.root)


def start_all_reduce(call: Call) -> Request:
    return call.noted("all_reduce").start_all_reduce(call.source, call.target, call.op)


def start_reduce_scatter(call: Call) -> Request:
    return call.noted("reduce_scatter").start_reduce_scatter(call.apart, call.target, call.counts, call.op)


def start_all_gather(call: Call) -> Request:
    return call.noted("all_gather", alike=False).start_all_gather(call.apart, call.target, call.counts)


def start_broadcast(call: Call) -> Request:
    return call.noted("broadcast").start_broadcast(call.target, call.root)


def start_reduce(call: Call) -> Request:
    return call.noted("reduce").start_reduce(call.source, _at_root(call, call.target), call.op, call.root)


def start_scan(call: Call) -> Request:
    return call.noted("scan").start_scan(call.source, call.target, call.op, inclusive=True)


def start_exscan(call: Call) -> Request:
    return call.noted("exscan").start_scan(call.source, call.target, call.op, inclusive=False)


def start_gather(call: Call) -> Request:
    transport = call.noted("gather", alike=False)
    return transport.start_gather(call.apart, _at_root(call, call.target), call.counts, call.root)


def start_scatter(call: Call) -> Request:
    transport = call.noted("scatter", alike=False)
    return transport.start_scatter(_at_root(call, call.apart), call.target, call.counts, call.root)


def start_all_to_all(call: Call) -> Request:
    transport = call.noted("all_to_all", alike=False)
    return transport.start_all_to_all(call.apart, call.target, call.counts, call.out_counts)


# By messages between two ranks


def exchange_all_reduce(call: Call) -> None:
    exchange.all_reduce(call.met("all_reduce", "exchange"), call.source, call.target, call.op)


def exchange_reduce_scatter(call: Call) -> None:
    transport = call.met("reduce_scatter", "exchange")
    exchange.reduce_scatter(transport, call.source, call.target, call.counts, call.op)


def exchange_reduce(call: Call) -> None:
    transport = call.met("reduce", "exchange")
    exchange.reduce(transport, call.source, _at_root(call, call.target), call.op, call.root)
