"""Which algorithms exist for each reducing collective, and which one `auto` takes: the first row that is possible and preferred.

A row runs on flat contiguous arrays; source and target are either the same memory or disjoint. What `possible` and `preferred`
look at is the same on all ranks of a correct program (size, nodes, count, dtype, whether the array lies in the shared window),
so all ranks choose alike.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from dtrain.collectives import exchange
from dtrain.collectives.dtypes import Array

if TYPE_CHECKING:
    from dtrain.collectives.communicator import Communicator


class AllReduce(NamedTuple):
    """One way to compute target = sum over ranks of source."""

    run: "Callable[[Communicator, Array, Array, str], None]"
    possible: "Callable[[Communicator, Array, Array, str], bool]"
    preferred: "Callable[[Communicator, Array], bool]" = lambda comm, source: True


class ReduceScatter(NamedTuple):
    """One way to compute target = my block of the sum over ranks of source, cut as counts says."""

    run: "Callable[[Communicator, Array, Array, Sequence[int], str], None]"
    possible: "Callable[[Communicator, Array, Array, str], bool]"
    preferred: "Callable[[Communicator, Array], bool]" = lambda comm, source: True


def _alone(comm: "Communicator", source: Array, target: Array, op: str) -> bool:
    return comm.size == 1


def _native(comm: "Communicator", source: Array, target: Array, op: str) -> bool:
    return comm.size > 1 and comm.transport.reduces(op, source)


def _always(comm: "Communicator", source: Array, target: Array, op: str) -> bool:
    return comm.size > 1


def _copy(comm: "Communicator", source: Array, target: Array, *_: object) -> None:
    np.copyto(target, source)


ALL_REDUCE: dict[str, AllReduce] = {
    "copy": AllReduce(_copy, _alone),
    "native": AllReduce(lambda comm, source, target, op: comm.transport.all_reduce(source, target, op), _native),
    "exchange": AllReduce(
        lambda comm, source, target, op: exchange.all_reduce(comm.transport, source, target, op), _always
    ),
}

REDUCE_SCATTER: dict[str, ReduceScatter] = {
    "copy": ReduceScatter(_copy, _alone),
    "native": ReduceScatter(
        lambda comm, source, target, counts, op: comm.transport.reduce_scatter(source, target, counts, op), _native
    ),
    "exchange": ReduceScatter(
        lambda comm, source, target, counts, op: exchange.reduce_scatter(comm.transport, source, target, counts, op),
        _always,
    ),
}


Row = TypeVar("Row", AllReduce, ReduceScatter)


def choose(table: dict[str, Row], name: str, comm: "Communicator", source: Array, target: Array, op: str) -> Row:
    """The row called `name`, or for "auto" the first that is possible and preferred. ValueError for what cannot be."""
    if name == "auto":
        for row in table.values():
            if row.possible(comm, source, target, op) and row.preferred(comm, source):
                return row
        raise AssertionError("the last row takes everything")
    if comm.size == 1:
        name = "copy"
    if name not in table:
        raise ValueError(f"algorithm={name!r}: not an algorithm; allowed: auto, {', '.join(table)}")
    if not table[name].possible(comm, source, target, op):
        possible = [other for other, row in table.items() if row.possible(comm, source, target, op)]
        raise ValueError(
            f"algorithm={name!r}: not possible for {op} of {source.dtype} in this place; possible here: auto, "
            f"{', '.join(possible)}"
        )
    return table[name]
