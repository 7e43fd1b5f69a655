"""The mesh: the ranks as a grid with named axes, and a communicator for every line and plane of it.

    Mesh(comm, pp=2, dp=2, tp=2)             tp ─►            mesh["tp"]         my row: what differs in tp only
                                    pp=0  dp=0  0  1          mesh["dp"]         my column
                                          dp=1  2  3          mesh["dp", "tp"]   the plane of both, as one communicator
                                    pp=1  dp=0  4  5
                                          dp=1  6  7

tp varies fastest: its ranks exchange most and should be neighbours on one host; pp varies slowest. `order` is another
order, written as in Megatron-LM ("tp-cp-ep-dp-pp", fastest first). Axes: data, tensor, pipeline, context, expert.

With `grid=(2, 3)` the 6 ranks of tp stand in rows and columns of their own (`summa.py` wants it): tp is then two axes,
`tp_row` and the faster `tp_column`, that may be named like all others; mesh["tp"] is the plane of both.

    tp 0 1 2      mesh["tp_column"]  my row of the grid: ranks that differ in their column
       3 4 5      mesh["tp_row"]     my column

Invariant: a rank's place is a function of (sizes, order, rank) alone. Communicators are made when first asked for,
which is a collective call over the whole mesh; an axis of size 1 needs none and gives a communicator of this rank
alone.
Reference: Narayanan et al., "Efficient large-scale language model training on GPU clusters", arXiv:2104.04473,
section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dtrain import config
from dtrain.collectives import Communicator, single
from dtrain.config import ORDER
from dtrain.errors import UserError
from dtrain.fixed_tree import FixedTree

SHOWN_RANKS = 64  # rows of the table in the log
BATCH_AXES = ("dp", "ep")  # ranks that differ along these axes have other samples
GRID_AXES = ("tp_row", "tp_column")  # what the tp axis is made of where it is a grid


class Grid:
    """The places of `num_ranks` ranks, without any communication: `sizes` go by axis, slowest first."""

    def __init__(
        self, num_ranks: int, sizes: Mapping[str, int], order: str = ORDER, grid: tuple[int, int] | None = None
    ) -> None:
        """dp=-1: what the other axes leave; grid: rows and columns of tp. A UserError names the axis that does not fit,
        and what would."""
        axes = tuple(reversed(order.split("-")))
        if sorted(axes) != sorted(ORDER.split("-")):
            raise UserError(f"parallel.order: {order}; must name each axis once, fastest first, such as {ORDER}")
        complete = filled(dict.fromkeys(("pp", "dp", "cp", "ep", "tp"), 1) | dict(sizes), num_ranks)
        assert grid is None or math.prod(grid) == complete["tp"], (grid, complete)
        self.num_ranks = num_ranks
        self.parts = {} if grid is None else {"tp": GRID_AXES}
        """Of an axis that is two."""
        self.axes = tuple(part for axis in axes for part in self.parts.get(axis, (axis,)))
        self.sizes = complete | dict(zip(GRID_AXES, grid or (), strict=False))
        self.sizes = {axis: self.sizes[axis] for axis in dict.fromkeys((*axes, *self.axes))}
        self._lengths = [self.sizes[axis] for axis in self.axes]
        self._grid = np.arange(num_ranks).reshape(self._lengths)

    def coordinates_of(self, rank: int) -> dict[str, int]:
        """The place of a rank, by axis."""
        place = dict(zip(self.axes, map(int, np.unravel_index(rank, self._lengths)), strict=True))
        for axis, (slow, fast) in self.parts.items():
            place[axis] = place[slow] * self.sizes[fast] + place[fast]
        return place

    def size(self, *axes: str) -> int:
        """How many ranks these axes have together; 1 without an axis."""
        return math.prod(self.sizes[axis] for axis in self.sorted(axes))

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ along these axes only, a list for each group, ordered by their first rank."""
        names = self.sorted(axes)
        inner = [self.axes.index(axis) for axis in names]
        outer = [i for i in range(len(self.axes)) if i not in inner]
        groups: list[list[int]] = self._grid.transpose(outer + inner).reshape(-1, self.size(*names)).tolist()
        return groups

    def rows(self, hosts: Sequence[str]) -> list[dict[str, Any]]:
        """One row per rank: rank, its coordinate on every axis, host."""
        return [{"rank": rank, **self.coordinates_of(rank), "host": hosts[rank]} for rank in range(self.num_ranks)]

    def table(self, hosts: Sequence[str], shown: int = SHOWN_RANKS) -> Iterator[str]:
        """The rows as lines of text, with the axes that are longer than 1; then the groups along each of these."""
        columns = ["rank", *[axis for axis in self.axes if self.sizes[axis] > 1 or axis == "dp"], "host"]
        yield "mesh   " + " ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        widths = {column: max(6, len(column) + 2) for column in columns}
        yield "       " + "".join(f"{column:<{width}}" for column, width in widths.items()).rstrip()
        for row in self.rows(hosts)[:shown]:
            yield "       " + "".join(f"{row[column]!s:<{width}}" for column, width in widths.items()).rstrip()
        if self.num_ranks > shown:
            yield f"       … and {self.num_ranks - shown} more ranks"
        for axis in columns[1:-1] if len(columns) > 3 else ():
            groups = self.groups(axis)
            told = " ".join(
                "[" + " ".join(map(str, ranks)) + "]" for ranks in groups[: max(1, shown // len(groups[0]))]
            )
            yield f"{axis:<6} {told}{' …' if len(groups) > max(1, shown // len(groups[0])) else ''}"

    def sorted(self, axes: Sequence[str]) -> tuple[str, ...]:
        """These axes, slowest first; KeyError for one that the mesh does not have."""
        for axis in axes:
            if axis not in self.sizes:
                raise KeyError(f"{axis}: no axis of the mesh; axes: {', '.join(self.sizes)}")
        wanted = {part for axis in axes for part in self.parts.get(axis, (axis,))}
        return tuple(axis for axis in self.axes if axis in wanted)


class Mesh(Grid):
    """The grid of all ranks of `comm`, with the `coordinates` of this rank and its communicators."""

    def __init__(
        self,
        comm: Communicator,
        pp: int = 1,
        dp: int = 1,
        cp: int = 1,
        ep: int = 1,
        tp: int = 1,
        order: str = ORDER,
        reproducible: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """dp=-1: what the other axes leave. A UserError names the axis that does not fit, and what would.

        reproducible: sums go over the data ranks, a power of two, by one tree (`fixed_tree.py`); grid: rows and columns
        of the tp axis, where it is to be two.
        """
        super().__init__(comm.size, {"pp": pp, "dp": dp, "cp": cp, "ep": ep, "tp": tp}, order, grid)
        self.comm, self.reproducible = comm, reproducible
        self.coordinates = self.coordinates_of(comm.rank)
        self._communicators: dict[tuple[Any, ...], Communicator | None] = {}
        longer = self._longer(self.axes)
        if len(longer) == 1:  # then the ranks of this axis are all ranks
            comm.name = longer[0]

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        """The ranks that differ from mine along these axes only, in the order of rank. Collective the first time.

        An axis of size 1 changes nothing: mesh["dp", "ep"] is mesh["dp"] then, and arrays of its windows are at home.
        """
        names = self._longer((axes,) if isinstance(axes, str) else axes)
        if names not in self._communicators:
            self._communicators[names] = self._make(names)
        found = self._communicators[names]
        assert found is not None
        return FixedTree.over(found) if self.reproducible and found.size > 1 else found

    def _longer(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Those of the axes that have more than one rank, slowest first."""
        return tuple(axis for axis in self.sorted(axes) if self.sizes[axis] > 1)

    def communicators(self) -> list[Communicator]:
        """`comm` and those that were made for axes until now, each once; those of one rank are left out."""
        made = [part for part in self._communicators.values() if part is not None and part.size > 1]
        return list(dict.fromkeys([self.comm, *made]))

    def keep(self, part: Communicator) -> None:
        """Take over a communicator that a strategy split off: it is among `communicators`, and closed with the rest."""
        self._communicators["kept", len(self._communicators)] = part

    def index(self, *axes: str) -> int:
        """My rank among those that differ from me along these axes only, without making a communicator."""
        index = 0
        for axis in self.sorted(axes):
            index = index * self.sizes[axis] + self.coordinates[axis]
        return index

    def among(self, axis: str, coordinates: Sequence[int]) -> Communicator | None:
        """The ranks of mesh[axis] at these coordinates, in order; None on the others. Collective over mesh[axis]
        the first time."""
        names = (axis, *coordinates)
        if len(coordinates) == self.size(axis):
            return self[axis]
        if names not in self._communicators:
            mine = self.coordinates[axis] in coordinates
            line = self[axis]
            self._communicators[names] = line.split(0 if mine else None, name=f"{axis}{list(coordinates)}")
        return self._communicators[names]

    def open(self, wanted: Iterable[tuple[str | int, ...]]) -> None:
        """Make the communicators that any rank wants, on all: for ranks that want different ones, as the stages of a
        pipeline do. Wanted: the axes of mesh[axes], or (axis, *coordinates) of `among`. Collective over the mesh."""
        everyone = self.comm.all_gather_object([list(names) for names in wanted])
        for names in sorted({tuple(names) for each in everyone for names in each}, key=str):
            coordinates = [name for name in names if isinstance(name, int)]
            if coordinates:
                self.among(names[0], coordinates)
            else:
                self[names]

    def rows(self, hosts: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One row per rank: rank, its coordinate on every axis, host."""
        return super().rows(self.comm.hosts if hosts is None else hosts)

    def table(self, hosts: Sequence[str] | None = None, shown: int = SHOWN_RANKS) -> Iterator[str]:
        """The rows as lines of text, then the groups."""
        return super().table(self.comm.hosts if hosts is None else hosts, shown)

    def close(self) -> None:
        """Give back the communicators that the mesh made; `comm` stays open."""
        for communicator in self._communicators.values():
            if communicator is not None and communicator is not self.comm:
                communicator.close()
        self._communicators = {}

    def _make(self, names: tuple[str, ...]) -> Communicator:
        size = math.prod(self.sizes[axis] for axis in names)
        if size == 1:
            return single()
        if size == self.comm.size:
            return self.comm
        color = next(i for i, ranks in enumerate(self.groups(*names)) if self.comm.rank in ranks)
        part = self.comm.split(color, name="+".join(names))
        assert part is not None
        return part


def filled(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The sizes with dp=-1 replaced by what the others leave; UserError where they do not make up `num_ranks`."""
    try:
        return config.filled(sizes, num_ranks)
    except ValueError as error:
        raise UserError(str(error)) from None
