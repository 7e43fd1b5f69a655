"""Which algorithms exist for each collective, and which one `auto` takes: the first row that is possible and preferred.

A row runs on the flat arrays of a `Call`. What `possible` and `preferred` look at is the same on all ranks of a correct
program (size, nodes, count, dtype, whether the arrays lie in the shared window), so all ranks choose alike; on one node
a difference is noticed and reported (`CollectiveMismatch`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtrain.collectives import hierarchy_volumes, volumes, ways
from dtrain.collectives.call import Call
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.volumes import Formula
from dtrain.collectives.window import WindowWork
from dtrain.collectives.work import Request

if TYPE_CHECKING:
    from dtrain.collectives.scheduled import Own

__all__ = ["TABLES", "Algorithm", "Call", "choose", "choose_start", "names"]


class Algorithm(NamedTuple):
    """One way to do a collective."""

    run: Callable[[Call], None]
    possible: Callable[[Call], bool]
    preferred: Callable[[Call], bool] = lambda call: True
    volume: Formula = volumes.unknown
    start: Callable[[Call], Request] | None = None  # the non-blocking form, if there is one


# Arrays from elsewhere: what is added up goes through the staging. What is moved goes there up to here, above by the
# MPI library, whose one copy through the kernel beats two once they leave the caches. Measured with MPICH 5.0 at 2, 4
# and 8 ranks on 2 cores.
STAGED_PAIR_BYTES = 128 * 1024  # results that are moved between two ranks
STAGED_PAIR_BROADCAST_BYTES = 64 * 1024  # one rank copies while the other waits
STAGED_LONG_BYTES = 64 << 20  # between more: one copy into the staging serves all; and reduce, slow in the libraries
STAGED_PAIR_ALL_TO_ALL_BYTES, STAGED_ALL_TO_ALL_BYTES = 512 * 1024, 1 << 20

# Arrays in the window: above this length straight from there. What is moved, and reduce_scatter, needs one
# synchronisation in the staging and two in the window; that costs as much as copying 128-256 KiB (2 and 8 ranks on 2
# cores). Longer reductions to all or to root need two in both.
WINDOW_BYTES = 128 * 1024
WINDOW_REDUCE_BYTES = SMALL_BYTES


# Over several nodes: sums to all from here by both levels, what is scattered or moved from there; below by the MPI
# library. Measured between two hosts of 4 ranks at 1 Gbit/s. all_to_all has only direct messages to gain from, which
# the library sends too: it is done by both levels where that is asked for.
HIERARCHY_BYTES = 256 * 1024
HIERARCHY_MOVE_BYTES = 1 << 20


def _alone(call: Call) -> bool:
    return call.transport.size == 1


def _several(call: Call) -> bool:
    return call.transport.size > 1


def _on_node(call: Call) -> bool:
    return call.node is not None


def _in_window(call: Call) -> bool:
    return call.node is not None and call.place is not None


def _in_place_in_window(call: Call) -> bool:
    return call.node is not None and call.place is not None and call.in_place


def _even_on_node(call: Call) -> bool:
    """All blocks of all ranks are equally long."""
    return call.node is not None and call.alike and call.counts[0] == call.counts[-1]


def _over_nodes(call: Call) -> bool:
    return call.levels is not None


def _even_over_nodes(call: Call) -> bool:
    return call.levels is not None and call.alike and call.counts[0] == call.counts[-1]


def _far(call: Call) -> bool:
    return call.source.nbytes >= HIERARCHY_BYTES


def _far_and_long(call: Call) -> bool:
    return max(call.source.nbytes, call.target.nbytes) >= HIERARCHY_MOVE_BYTES


def _never(call: Call) -> bool:
    return False


def _reduces(call: Call) -> bool:
    return call.transport.size > 1 and call.transport.reduces(call.op, call.source)


def _long(call: Call) -> bool:
    return call.source.nbytes > WINDOW_BYTES


def _long_reduce(call: Call) -> bool:
    return call.source.nbytes > WINDOW_REDUCE_BYTES


def _long_gather(call: Call) -> bool:
    return sum(call.counts) * call.source.itemsize > WINDOW_BYTES


def _long_all_to_all(call: Call) -> bool:
    """What is cut unevenly has no other way through shared memory, and its length is known to one rank alone."""
    return not _even_on_node(call) or _long_gather(call)


def _short_reduce(call: Call) -> bool:
    """What is short, and what the MPI library cannot reduce."""
    return call.source.nbytes <= STAGED_LONG_BYTES or not call.transport.reduces(call.op, call.source)


def _short_move(call: Call, nbytes: int) -> bool:
    return nbytes <= (STAGED_PAIR_BYTES if call.transport.size == 2 else STAGED_LONG_BYTES)


def _short_gather(call: Call) -> bool:
    return _short_move(call, sum(call.counts) * call.source.itemsize)


def _short_all_to_all(call: Call) -> bool:
    limit = STAGED_PAIR_ALL_TO_ALL_BYTES if call.transport.size == 2 else STAGED_ALL_TO_ALL_BYTES
    return sum(call.counts) * call.source.itemsize <= limit


def _short_broadcast(call: Call) -> bool:
    return call.target.nbytes <= (STAGED_PAIR_BROADCAST_BYTES if call.transport.size == 2 else STAGED_LONG_BYTES)


def _always(call: Call) -> bool:
    return True


def _window(
    start: Callable[[Call], Request],
    volume: Formula,
    possible: Callable[[Call], bool] = _in_window,
    preferred: Callable[[Call], bool] = _always,
) -> Algorithm:
    return Algorithm(lambda call: start(call).wait(), possible, preferred, volume, start)


def _to_root(start: Callable[[Call], WindowWork], volume: Formula, preferred: Callable[[Call], bool]) -> Algorithm:
    """Where the result lies decides who does what, and only root knows at the start."""

    def run(call: Call) -> None:
        work = start(call)
        work.wait()
        call.target_place = call.stage.aside(call.root, work.number)

    return Algorithm(run, _in_window, preferred, volume, start)


def _copy(call: Call) -> None:
    if call.target is not call.source:
        np.copyto(call.target, call.source)


COPY = Algorithm(_copy, _alone, volume=volumes.nothing)


def _hierarchical(
    start: Callable[[Call], Request],
    volume: Formula,
    preferred: Callable[[Call], bool] = _far_and_long,
    possible: Callable[[Call], bool] = _over_nodes,
) -> Algorithm:
    return Algorithm(lambda call: start(call).wait(), possible, preferred, volume, start)


ALL_REDUCE: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_all_reduce, hierarchy_volumes.all_reduce, _far),
    "window": _window(ways.window_all_reduce, volumes.window_all_reduce, _in_place_in_window, _long_reduce),
    "staged": Algorithm(ways.staged_all_reduce, _on_node, _always, volumes.staged_all_reduce),
    "native": Algorithm(ways.native_all_reduce, _reduces, _always, volumes.least_all_reduce, ways.start_all_reduce),
    "exchange": Algorithm(ways.exchange_all_reduce, _several, _always, volumes.exchange_all_reduce),
}

REDUCE_SCATTER: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_reduce_scatter, hierarchy_volumes.reduce_scatter),
    "window": _window(ways.window_reduce_scatter, volumes.window_reduce_scatter, preferred=_long),
    "staged": Algorithm(ways.staged_reduce_scatter, _on_node, _always, volumes.staged_reduce_scatter),
    "native": Algorithm(
        ways.native_reduce_scatter, _reduces, _always, volumes.least_reduce_scatter, ways.start_reduce_scatter
    ),
    "exchange": Algorithm(ways.exchange_reduce_scatter, _several, _always, volumes.exchange_reduce_scatter),
}

ALL_GATHER: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_all_gather, hierarchy_volumes.all_gather),
    "window": _window(ways.window_all_gather, volumes.window_all_gather, preferred=_long_gather),
    "staged": Algorithm(ways.staged_all_gather, _on_node, _short_gather, volumes.staged_gather),
    "native": Algorithm(ways.native_all_gather, _several, _always, volumes.least_all_gather, ways.start_all_gather),
}

BROADCAST: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_broadcast, hierarchy_volumes.broadcast),
    "window": _window(ways.window_broadcast, volumes.window_from_root, preferred=_long),
    "staged": Algorithm(ways.staged_broadcast, _on_node, _short_broadcast, volumes.staged_broadcast),
    "native": Algorithm(ways.native_broadcast, _several, _always, volumes.least_broadcast, ways.start_broadcast),
}

REDUCE: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _to_root(ways.window_reduce, volumes.window_reduce, _long_reduce),
    "staged": Algorithm(ways.staged_reduce, _on_node, _short_reduce, volumes.staged_reduce),
    "native": Algorithm(ways.native_reduce, _reduces, _always, volumes.least_reduce, ways.start_reduce),
    "exchange": Algorithm(ways.exchange_reduce, _several, _always, volumes.exchange_reduce),
}

ALL_TO_ALL: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_all_to_all, hierarchy_volumes.all_to_all, _never, _even_over_nodes),
    "window": _window(ways.window_all_to_all, volumes.window_all_to_all, preferred=_long_all_to_all),
    "staged": Algorithm(ways.staged_all_to_all, _even_on_node, _short_all_to_all, volumes.staged_all_to_all),
    "native": Algorithm(ways.native_all_to_all, _several, _always, volumes.all_to_all, ways.start_all_to_all),
}

GATHER: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _to_root(ways.window_gather, volumes.window_gather, _long_gather),
    "staged": Algorithm(ways.staged_gather, _on_node, _short_gather, volumes.staged_gather),
    "native": Algorithm(ways.native_gather, _several, _always, volumes.least_gather, ways.start_gather),
}

SCATTER: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _window(ways.window_scatter, volumes.window_from_root),
    "native": Algorithm(ways.native_scatter, _several, _always, volumes.least_scatter, ways.start_scatter),
}


SCAN: dict[str, Algorithm] = {"copy": COPY}
EXSCAN: dict[str, Algorithm] = {"copy": COPY}

BARRIER: dict[str, Algorithm] = {
    "copy": COPY,
    "staged": Algorithm(ways.staged_barrier, _on_node),
    "native": Algorithm(ways.native_barrier, _several),
}

TABLES: dict[str, dict[str, Algorithm]] = {
    "all_reduce": ALL_REDUCE,
    "reduce_scatter": REDUCE_SCATTER,
    "all_gather": ALL_GATHER,
    "all_to_all": ALL_TO_ALL,
    "broadcast": BROADCAST,
    "reduce": REDUCE,
    "gather": GATHER,
    "scatter": SCATTER,
    "scan": SCAN,
    "exscan": EXSCAN,
    "barrier": BARRIER,
}
"""For scans, and beside the rows of the others, there are the schedules of the catalogue (`scheduled.py`)."""


def names(collective: str) -> tuple[str, ...]:
    """All names that `algorithm=` may have; a schedule may have parameters behind it."""
    from dtrain.collectives import scheduled

    return tuple(dict.fromkeys(("auto", *TABLES[collective], *scheduled.names(collective))))


def choose(
    table: dict[str, Algorithm], name: "str | Own", call: Call, measured: Sequence[str] = ()
) -> tuple[str, Algorithm]:
    """The row called `name`; ValueError for what cannot be.

    "auto": the first of those `measured` (from the best to the worst) that is possible; where nothing was measured, the
    first row that is possible and preferred.
    What is in no row is a schedule: of the catalogue, maybe with parameters ("chain:segments=4"), or the user's own.
    Where a row and a schedule have one name, the row is meant if it is possible.
    """
    if name == "auto":
        for best in measured:
            if (known := _known(table, best, call)) is not None:
                return known
        rows = (item for item in table.items() if item[1].possible(call) and item[1].preferred(call))
        return next(rows, None) or choose(table, "doubling", call)  # a scan: only schedules do it
    if not isinstance(name, str) or name not in table or not (table[name].possible(call) or _alone(call)):
        found = _schedule(table, name, call)
        if found is not None:
            return found
    assert isinstance(name, str)
    if _alone(call):
        name = "copy"
    if not table[name].possible(call):
        possible = ", ".join(other for other, row in table.items() if row.possible(call))
        raise ValueError(
            f"algorithm={name!r}: not possible for {call.op} of {call.source.dtype} in this memory between "
            f"{call.transport.size} ranks; possible here: auto, {possible}"
        )
    return name, table[name]


def _known(table: dict[str, Algorithm], name: str, call: Call) -> tuple[str, Algorithm] | None:
    """The row or schedule of this name; None where it is not possible, or nothing that this version knows."""
    if name in table:
        return (name, table[name]) if table[name].possible(call) else None
    try:
        return _schedule(table, name, call)
    except ValueError:
        return None


def _schedule(table: dict[str, Algorithm], name: "str | Own", call: Call) -> tuple[str, Algorithm] | None:
    """A schedule as a row; None where only a row of the table has this name."""
    collective = next(each for each, rows in TABLES.items() if rows is table)
    found = (_named if isinstance(name, str) else _own)(collective, name)
    return ("copy", COPY) if found is not None and _alone(call) else found


@lru_cache(maxsize=256)
def _named(collective: str, name: str) -> tuple[str, Algorithm] | None:
    from dtrain.collectives import scheduled

    if name.partition(":")[0] not in scheduled.names(collective):
        if name in TABLES[collective]:
            return None
        raise ValueError(f"algorithm={name!r}: not an algorithm; allowed: {', '.join(names(collective))}")
    return _own(collective, name)


def _own(collective: str, name: "str | Own") -> tuple[str, Algorithm]:
    from dtrain.collectives import scheduled

    choice = scheduled.find(collective, name)
    return choice.name, Algorithm(choice.run, _several, _always, choice.volume, choice.start)


def choose_start(table: dict[str, Algorithm], call: Call, measured: Sequence[str] = ()) -> tuple[str, Algorithm] | None:
    """The row that starts a call without waiting; None: there is none.

    In the window it is the window's: to publish and go costs the least, and nothing must be moved on meanwhile. Else
    the first of those `measured` that is possible and can be started, and the first such row where nothing was.
    """
    rows = [(name, row) for name, row in table.items() if row.start is not None and row.possible(call)]
    if rows and rows[0][0] == "window":
        return rows[0]
    for best in measured:
        if (known := _known(table, best, call)) is not None and known[1].start is not None:
            return known
    return next(((name, row) for name, row in rows if name != "hierarchical" or row.preferred(call)), None)
