"""Which algorithms exist for each collective, and which one `auto` takes: the first row that is possible and preferred.

A row runs on the flat arrays of a `Call`. What `possible` and `preferred` look at is the same on all ranks of a correct
program (size, nodes, count, dtype, whether the arrays lie in the shared window), so all ranks choose alike; on one node
a difference is noticed and reported (`CollectiveMismatch`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from dtrain.collectives import hierarchy_volumes, rules, volumes, ways
from dtrain.collectives.call import Call
from dtrain.collectives.volumes import Formula
from dtrain.collectives.window import WindowWork
from dtrain.collectives.work import Request

if TYPE_CHECKING:
    from dtrain.collectives.choices import Own

__all__ = ["TABLES", "Algorithm", "Call", "choose", "choose_start", "names"]


T = TypeVar("T")


class Algorithm(NamedTuple):
    """One way to do a collective."""

    run: Callable[[Call], None]
    possible: Callable[[Call], bool]
    preferred: Callable[[Call], bool] = lambda call: True
    volume: Formula = volumes.unknown
    start: Callable[[Call], Request] | None = None  # the non-blocking form, if there is one


def _window(
    start: Callable[[Call], Request],
    volume: Formula,
    possible: Callable[[Call], bool] = rules.in_window,
    preferred: Callable[[Call], bool] = rules.always,
) -> Algorithm:
    return Algorithm(lambda call: start(call).wait(), possible, preferred, volume, start)


def _here(start: Callable[[Call, str], T]) -> Callable[[Call], T]:
    return lambda call: start(call, "window")


def _cma(
    start: Callable[[Call, str], Request], volume: Formula, preferred: Callable[[Call], bool] = rules.always
) -> Algorithm:
    """Straight out of arrays from anywhere. Not to be started: they must live until the others have read them."""
    return Algorithm(lambda call: start(call, "cma").wait(), rules.readable, preferred, volume)


def _to_root(
    start: Callable[[Call], WindowWork],
    volume: Formula,
    preferred: Callable[[Call], bool],
    possible: Callable[[Call], bool] = rules.in_window,
) -> Algorithm:
    """Where the result lies decides who does what, and only root knows at the start."""

    def run(call: Call) -> None:
        work = start(call)
        work.wait()
        call.target_place = call.stage.aside(call.root, work.number)

    return Algorithm(run, possible, preferred, volume, start if possible is rules.in_window else None)


def _copy(call: Call) -> None:
    if call.target is not call.source:
        np.copyto(call.target, call.source)


COPY = Algorithm(_copy, rules.alone, volume=volumes.nothing)


def _hierarchical(
    start: Callable[[Call], Request],
    volume: Formula,
    preferred: Callable[[Call], bool] = rules.far_and_long,
    possible: Callable[[Call], bool] = rules.over_nodes,
) -> Algorithm:
    return Algorithm(lambda call: start(call).wait(), possible, preferred, volume, start)


ALL_REDUCE: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_all_reduce, hierarchy_volumes.all_reduce, rules.far),
    "window": _window(ways.window_all_reduce, volumes.window_all_reduce, rules.in_place_in_window, rules.long_reduce),
    "window_staged": Algorithm(
        ways.window_staged_all_reduce, rules.in_window, rules.long_reduce, volumes.window_staged_all_reduce
    ),
    "staged": Algorithm(ways.staged_all_reduce, rules.on_node, rules.always, volumes.staged_all_reduce),
    "native": Algorithm(
        ways.native_all_reduce, rules.reduces, rules.always, volumes.least_all_reduce, ways.start_all_reduce
    ),
    "exchange": Algorithm(ways.exchange_all_reduce, rules.several, rules.always, volumes.exchange_all_reduce),
}

REDUCE_SCATTER: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_reduce_scatter, hierarchy_volumes.reduce_scatter),
    "window": _window(ways.window_reduce_scatter, volumes.window_reduce_scatter, preferred=rules.long),
    "staged": Algorithm(ways.staged_reduce_scatter, rules.on_node, rules.always, volumes.staged_reduce_scatter),
    "native": Algorithm(
        ways.native_reduce_scatter, rules.reduces, rules.always, volumes.least_reduce_scatter, ways.start_reduce_scatter
    ),
    "exchange": Algorithm(ways.exchange_reduce_scatter, rules.several, rules.always, volumes.exchange_reduce_scatter),
}

ALL_GATHER: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_all_gather, hierarchy_volumes.all_gather),
    "window": _window(_here(ways.start_all_gather_at_home), volumes.window_all_gather, preferred=rules.long_gather),
    "staged": Algorithm(ways.staged_all_gather, rules.on_node, rules.short_all_gather, volumes.staged_gather),
    "cma": _cma(ways.start_all_gather_at_home, volumes.window_all_gather),
    "native": Algorithm(
        ways.native_all_gather, rules.several, rules.always, volumes.least_all_gather, ways.start_all_gather
    ),
}

BROADCAST: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(ways.hierarchical_broadcast, hierarchy_volumes.broadcast),
    "window": _window(ways.window_broadcast, volumes.window_from_root, preferred=rules.long),
    "staged": Algorithm(ways.staged_broadcast, rules.on_node, rules.short_broadcast, volumes.staged_broadcast),
    "cma": Algorithm(ways.cma_broadcast, rules.readable, rules.always, volumes.window_from_root),
    "native": Algorithm(
        ways.native_broadcast, rules.several, rules.always, volumes.least_broadcast, ways.start_broadcast
    ),
}

REDUCE: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _to_root(ways.window_reduce, volumes.window_reduce, rules.long_reduce),
    "staged": Algorithm(ways.staged_reduce, rules.on_node, rules.short_reduce, volumes.staged_reduce),
    "native": Algorithm(ways.native_reduce, rules.reduces, rules.always, volumes.least_reduce, ways.start_reduce),
    "exchange": Algorithm(ways.exchange_reduce, rules.several, rules.always, volumes.exchange_reduce),
}

ALL_TO_ALL: dict[str, Algorithm] = {
    "copy": COPY,
    "hierarchical": _hierarchical(
        ways.hierarchical_all_to_all, hierarchy_volumes.all_to_all, rules.never, rules.even_over_nodes
    ),
    "window": _window(_here(ways.start_all_to_all_at_home), volumes.window_all_to_all, preferred=rules.long_all_to_all),
    "staged": Algorithm(ways.staged_all_to_all, rules.even_on_node, rules.short_all_to_all, volumes.staged_all_to_all),
    "cma": Algorithm(ways.cma_all_to_all, rules.readable, rules.always, volumes.window_all_to_all),
    "native": Algorithm(ways.native_all_to_all, rules.several, rules.always, volumes.all_to_all, ways.start_all_to_all),
}

GATHER: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _to_root(_here(ways.start_gather_at_home), volumes.window_gather, rules.long_gather),
    "staged": Algorithm(ways.staged_gather, rules.on_node, rules.short_gather, volumes.staged_gather),
    "cma": _to_root(
        lambda call: ways.start_gather_at_home(call, "cma"), volumes.window_gather, rules.more, rules.readable
    ),
    "native": Algorithm(ways.native_gather, rules.several, rules.always, volumes.least_gather, ways.start_gather),
}

SCATTER: dict[str, Algorithm] = {
    "copy": COPY,
    "window": _window(_here(ways.start_scatter_at_home), volumes.window_from_root),
    "cma": _cma(ways.start_scatter_at_home, volumes.window_from_root, rules.pair),
    "native": Algorithm(ways.native_scatter, rules.several, rules.always, volumes.least_scatter, ways.start_scatter),
}


# Between nodes the schedule `doubling` does it: 1 MiB between 2 ranks in 3.3 ms, MPICH's own in 6.8.
SCAN: dict[str, Algorithm] = {
    "copy": COPY,
    "staged": Algorithm(ways.staged_scan, rules.on_node, rules.always, volumes.staged_scan),
    "native": Algorithm(ways.native_scan, rules.reduces, rules.never, volumes.least_scan, ways.start_scan),
}

EXSCAN: dict[str, Algorithm] = {
    "copy": COPY,
    "staged": Algorithm(ways.staged_exscan, rules.on_node, rules.always, volumes.staged_scan),
    "native": Algorithm(ways.native_exscan, rules.reduces, rules.never, volumes.least_scan, ways.start_exscan),
}

BARRIER: dict[str, Algorithm] = {
    "copy": COPY,
    "staged": Algorithm(ways.staged_barrier, rules.on_node),
    "native": Algorithm(ways.native_barrier, rules.several),
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
"""Beside these rows there are the schedules of the catalogue (`choices.py`)."""


def names(collective: str) -> tuple[str, ...]:
    """All names that `algorithm=` may have; a schedule may have parameters behind it."""
    from dtrain.collectives import choices

    return tuple(dict.fromkeys(("auto", *TABLES[collective], *choices.names(collective))))


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
        return next(rows, None) or choose(table, "doubling", call)  # a scan
    if not isinstance(name, str) or name not in table or not (table[name].possible(call) or rules.alone(call)):
        found = _schedule(table, name, call)
        if found is not None:
            return found
    assert isinstance(name, str)
    if rules.alone(call):
        name = "copy"
    if not table[name].possible(call):
        possible = ", ".join(other for other, row in table.items() if row.possible(call))
        what = f"{call.op} of {call.source.dtype}" if call.op else f"{call.source.dtype}"
        raise ValueError(
            f"algorithm={name!r}: not possible for {what} in this memory between "
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
    return ("copy", COPY) if found is not None and rules.alone(call) else found


@lru_cache(maxsize=256)
def _named(collective: str, name: str) -> tuple[str, Algorithm] | None:
    from dtrain.collectives import choices

    if name.partition(":")[0] not in choices.names(collective):
        if name in TABLES[collective]:
            return None
        raise ValueError(f"algorithm={name!r}: not an algorithm; allowed: {', '.join(names(collective))}")
    return _own(collective, name)


def _own(collective: str, name: "str | Own") -> tuple[str, Algorithm]:
    from dtrain.collectives import choices

    choice = choices.find(collective, name)
    return choice.name, Algorithm(choice.run, rules.several, rules.always, choice.volume, choice.start)


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
