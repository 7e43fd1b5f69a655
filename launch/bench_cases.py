"""One call of each collective, as `dtrain bench` makes it: its arrays, its data, and which result is right.

Data is periodic: element i of the array of rank r in turn t is table[(i + shift(r, t)) mod 4093]. So are all
results, and checking an array needs one period and no communication. 4093 is a prime, so that a displaced block is
found; each check has a turn of its own, so that what an earlier call left behind is wrong. The numbers are small
integers: sums are exact in every dtype (bfloat16: up to 36 ranks) and in every order of adding up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dtrain.collectives import Array, Communicator, algorithms
from dtrain.collectives.dtypes import OPERATIONS, accumulator, neutral
from dtrain.collectives.schedules import Algorithm, bind, own
from dtrain.collectives.schedules.prover import prove
from dtrain.errors import UserError
from dtrain.launch.bench_table import COLLECTIVES, IN_PLACE

PERIOD = 4093
ROOT = 0

_VALUES: dict[str, Callable[[Array], Array]] = {
    "sum": lambda noise: noise % 8,
    "prod": lambda noise: 1 + (noise % 4 == 0),  # powers of two
    "max": lambda noise: noise % 128,
    "min": lambda noise: noise % 128,
    "": lambda noise: noise % 128,
}


class Pattern:
    """The data of all ranks in all turns."""

    def __init__(self, dtype: np.dtype[Any], op: str, size: int) -> None:
        """op: of the reduction, "" for movement; size: ranks."""
        noise = np.arange(PERIOD, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        self._table = _VALUES[op](noise).astype(dtype)
        self._op = op
        self._size = size

    def period(self, rank: int, turn: int, start: int = 0) -> Array:
        """Elements start .. start + PERIOD of the array of a rank."""
        return np.roll(self._table, -(start + 977 * rank + 131 * turn))

    def total(self, turn: int, start: int = 0, ranks: int | None = None) -> Array:
        """The same elements of the reduction over all ranks, or the first so many."""
        wide = accumulator(self._table.dtype)
        if ranks == 0:
            return np.full(PERIOD, neutral(self._op, self._table.dtype))
        result = self.period(0, turn, start).astype(wide)
        with np.errstate(all="ignore"):
            for rank in range(1, self._size if ranks is None else ranks):
                OPERATIONS[self._op](result, self.period(rank, turn, start).astype(wide), out=result)
            return result.astype(self._table.dtype)


def fill(array: Array, period: Array) -> None:
    """Array (count,) = period, again and again."""
    whole = len(array) // PERIOD * PERIOD
    array[:whole].reshape(-1, PERIOD)[...] = period
    array[whole:] = period[: len(array) - whole]


def count_wrong(array: Array, period: Array) -> int:
    """How many elements of array (count,) are not those of `fill`."""
    whole = len(array) // PERIOD * PERIOD
    wrong = np.count_nonzero(array[:whole].reshape(-1, PERIOD) != period)
    return int(wrong + np.count_nonzero(array[whole:] != period[: len(array) - whole]))


@dataclass(frozen=True)
class Place:
    """Where one call of `count` elements has its arrays."""

    comm: Communicator
    count: int
    op: str
    placing: str
    first: Array
    """At least (count,): holds what goes in."""
    second: Array
    """At least (count,): holds what comes out, if that is elsewhere."""

    @property
    def block(self) -> int:
        """Elements of one rank's block."""
        return self.count // self.comm.size

    @property
    def in_place(self) -> bool:
        """Whether the result goes where the input was."""
        return self.placing == IN_PLACE

    @property
    def at_root(self) -> bool:
        """Whether this rank is the root."""
        return self.comm.rank == ROOT


def arrays(name: str, place: Place) -> tuple[Array, Array | None]:
    """Source and target of this rank; the target is None where there is no result."""
    count, block = place.count, place.block
    mine = slice(place.comm.rank * block, (place.comm.rank + 1) * block)
    whole, result = place.first[:count], place.second[:count]
    if name in ("all_gather", "gather"):
        there = place.in_place and (name == "all_gather" or place.at_root)
        return (result[mine] if there else whole[:block]), (result if name == "all_gather" or place.at_root else None)
    if name in ("reduce_scatter", "scatter"):
        there = place.in_place and (name == "reduce_scatter" or place.at_root)
        return whole, (whole[mine] if there else result[:block])
    if name == "reduce" and not place.at_root:
        return whole, None
    return whole, (whole if place.in_place else result)


def wrong_elements(name: str, result: Array | None, place: Place, pattern: Pattern, turn: int) -> int:
    """How many elements of this rank's result of the turn are wrong."""
    if result is None:
        return 0
    block, rank = place.block, place.comm.rank
    if name in ("all_gather", "gather", "all_to_all"):
        start = rank * block if name == "all_to_all" else 0
        parts = [result[q * block : (q + 1) * block] for q in range(place.comm.size)]
        return sum(count_wrong(part, pattern.period(q, turn, start)) for q, part in enumerate(parts))
    if name == "broadcast":
        return count_wrong(result, pattern.period(ROOT, turn))
    if name == "scatter":
        return count_wrong(result, pattern.period(ROOT, turn, rank * block))
    if name in ("scan", "exscan"):
        return count_wrong(result, pattern.total(turn, 0, rank + (name == "scan")))
    return count_wrong(result, pattern.total(turn, rank * block if name == "reduce_scatter" else 0))


# --- who can do it ----------------------------------------------------------------------------------------------------

Run = Callable[[], Array | None]


def names(collective: str, size: int) -> tuple[str, ...]:
    """The algorithms that can be asked for on `size` ranks."""
    if size == 1:
        return ("auto",)
    table = [name for name in algorithms.names(collective) if name not in ("auto", "copy")]
    return ("auto", *table, *(["shared"] if collective == "all_reduce" else []), "bare")


def is_known(name: str, known: Sequence[str]) -> bool:
    """Whether it is one of these, maybe with parameters behind it, or a user's own (PATH.py:NAME)."""
    return name.partition(":")[0] in known or own.is_own(name)


def described(collective: str, name: str, size: int) -> str:
    """What the prover says of a user's own algorithm; UserError if it is none, or wrong."""
    row = _own(name)
    label = algorithm_name(name)
    try:
        proof = prove(bind(collective, label, row, size))
    except ValueError as error:
        raise UserError(f"--algorithms {name}: {error}") from None
    sent, added = proof.sent.max(), proof.added.max()
    per_rank = f"at most {sent:.4g} n sent and {added:.4g} n added per rank"
    return f"{collective}, {label}: proven for {size} ranks; {proof.steps} steps, {per_rank}"


def algorithm_name(name: str) -> str:
    """What stands in the table: of a user's own, the name of the function."""
    if not own.is_own(name):
        return name
    row = _own(name)
    return str(getattr(row.steps if isinstance(row, Algorithm) else row, "__name__", name))


@cache
def _own(name: str) -> Any:
    try:
        return own.load(name)
    except ValueError as error:
        raise UserError(f"--algorithms {error}") from None


def call(collective: str, algorithm: str, place: Place) -> Run:
    """One call, without arguments; raises ValueError, on all ranks, where the algorithm cannot do it."""
    comm, op = place.comm, place.op
    if collective == "barrier":
        return _nothing(comm.transport.barrier if algorithm == "bare" else lambda: comm.barrier(algorithm))
    source, target = arrays(collective, place)
    if algorithm == "bare":
        return lambda: _bare(collective, place, source, target)
    if algorithm == "shared":
        return lambda: _shared(place, source)
    method = getattr(comm, collective)
    chosen = {} if algorithm == "auto" else {"algorithm": _own(algorithm) if own.is_own(algorithm) else algorithm}
    if COLLECTIVES[collective].reduces:
        return lambda: method(source, op, out=target, **chosen)
    return lambda: method(source, out=target, **chosen)


def _nothing(run: Callable[[], None]) -> Run:
    def call() -> None:
        run()

    return call


def _shared(place: Place, source: Array) -> Array:
    if place.in_place or place.comm.node is None:
        raise ValueError("shared: the result lies elsewhere, in memory that all ranks of one node share")
    return place.comm.all_reduce_shared(source, place.op)


def _bare(name: str, place: Place, source: Array, target: Array | None) -> Array | None:
    """The call of the MPI library without dtrain's checks around it: what those cost is the difference to `native`."""
    transport = place.comm.transport
    into: Any = target
    counts = [place.block] * place.comm.size
    if COLLECTIVES[name].reduces and not transport.reduces(place.op, source):
        raise ValueError(f"bare: the MPI library does not know {place.op} of {source.dtype}")
    if place.in_place and name in ("all_gather", "all_to_all", "gather", "scatter"):
        raise ValueError("bare: source and target must not overlap")
    if name == "all_reduce":
        transport.all_reduce(source, into, place.op)
    elif name == "reduce_scatter":
        transport.reduce_scatter(source, into, counts, place.op)
    elif name == "reduce":
        transport.reduce(source, into, place.op, ROOT)
    elif name in ("scan", "exscan"):
        transport.scan(source, into, place.op, inclusive=name == "scan")
        if name == "exscan" and place.comm.rank == 0:
            into[...] = neutral(place.op, into.dtype)  # the library leaves it undefined
    elif name == "all_gather":
        transport.all_gather(source, into, counts)
    elif name == "all_to_all":
        transport.all_to_all(source, into, counts, counts)
    elif name == "gather":
        transport.gather(source, into, counts, ROOT)
    elif name == "scatter":
        transport.scatter(source if place.at_root else None, into, counts, ROOT)
    else:
        if place.at_root and not place.in_place:
            np.copyto(into, source)
        transport.broadcast(into, ROOT)
    return target
