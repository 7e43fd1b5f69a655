"""How embedding tables are cut over ranks: which rows of which table, and which columns, a rank has.

    table    rank 0: tables 0 3, rank 1: 1 2    few large transfers; needs as many tables as ranks to be even
    row      a block of rows of every table     even in memory whatever the tables; popular rows may load one rank more
    column   a block of columns of every table  even in memory and in work; every rank looks every id up

Whole tables are dealt largest first, each to the rank that has least: no rank exceeds the best deal by more than a
third (Graham, "Bounds on multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives.dtypes import spans
from dtrain.layout import Shard

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The parts of all ranks."""

    shards: list[Shard]
    """Of each table, over the ranks."""
    rows: list[list[Range]]
    """By rank and table."""
    columns: list[Range]
    """By rank."""

    def bags(self, ids: Array, rank: int) -> Array:
        """Which bags of ids (B, T, L) have anything that lies on this rank: (B, T) booleans."""
        if self.columns[rank][0] == self.columns[rank][1]:
            return np.zeros(ids.shape[:2], bool)
        first, last = np.array(self.rows[rank], ids.dtype).T[:, :, None]
        found: Array = ((ids >= first) & (ids < last)).any(axis=-1)
        return found

    def elements(self) -> list[int]:
        """How many numbers each rank holds."""
        return [
            sum(last - first for first, last in rows) * (columns[1] - columns[0])
            for rows, columns in zip(self.rows, self.columns, strict=True)
        ]


Shapes = Sequence[tuple[int, ...]]


def by_table(shapes: Shapes, ranks: int) -> Plan:
    """Whole tables."""
    load = [0] * ranks
    owners = [0] * len(shapes)
    for table in sorted(range(len(shapes)), key=lambda t: (-shapes[t][0], t)):
        owners[table] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[table]] += shapes[table][0]
    rows = [[(0, shapes[t][0] if owners[t] == rank else 0) for t in range(len(shapes))] for rank in range(ranks)]
    shards = [Shard(0, tuple((rows[rank][t],) for rank in range(ranks))) for t in range(len(shapes))]
    return Plan(shards, rows, [(0, shapes[0][1])] * ranks)


def by_row(shapes: Shapes, ranks: int) -> Plan:
    """A block of rows of every table."""
    blocks = [spans(rows, ranks) for rows, _ in shapes]
    return Plan(
        [Shard(0)] * len(shapes), [[b[rank] for b in blocks] for rank in range(ranks)], [(0, shapes[0][1])] * ranks
    )


def by_column(shapes: Shapes, ranks: int) -> Plan:
    """A block of columns of every table."""
    return Plan([Shard(1)] * len(shapes), [[(0, rows) for rows, _ in shapes]] * ranks, spans(shapes[0][1], ranks))


PLANS: dict[str, Callable[[Shapes, int], Plan]] = {"table": by_table, "row": by_row, "column": by_column}
