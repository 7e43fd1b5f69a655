"""The mesh: the ranks as a grid with named axes, and a communicator for every line and plane of it.

    Mesh(comm, pp=2, dp=2, tp=2)             tp ─►            mesh["tp"]         my row: what differs in tp only
                                    pp=0  dp=0  0  1          mesh["dp"]         my column
                                          dp=1  2  3          mesh["dp", "tp"]   the plane of both, as one communicator
                                    pp=1  dp=0  4  5
                                          dp=1  6  7

tp varies fastest: its ranks exchange most and should be neighbours on one host; pp varies slowest. `order` is another
order, written as in Megatron-LM ("tp-cp-ep-dp-pp", fastest first). Axes: data, tensor, pipeline, context, expert.

Invariant: a rank's place is a function of (sizes, order, rank) alone. Communicators are made when first asked for,
which is a collective call over the whole mesh; an axis of size 1 needs none and gives a communicator of this rank
alone.
Reference: Narayanan et al., "Efficient large-scale language model training on GPU clusters", arXiv:2104.04473,
section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dtrain.collectives import Communicator, single
from dtrain.errors import UserError

ORDER = "tp-cp-ep-dp-pp"
SHOWN_RANKS = 64  # rows of the table in the log


class Mesh:
    """The grid of all ranks of `comm`. `sizes` and `coordinates` (of this rank) go by axis, slowest first."""

    def __init__(
        self, comm: Communicator, pp: int = 1, dp: int = 1, cp: int = 1, ep: int = 1, tp: int = 1, order: str = ORDER
    ) -> None:
        """dp=-1: what the other axes leave. A UserError names the axis that does not fit, and what would."""
        axes = tuple(reversed(order.split("-")))
        if sorted(axes) != sorted(ORDER.split("-")):
            raise UserError(f"order: {order}; must name each axis once, fastest first, such as {ORDER}")
        wanted = {"pp": pp, "dp": dp, "cp": cp, "ep": ep, "tp": tp}
        sizes = filled(wanted, comm.size)
        self.comm = comm
        self.axes = axes
        self.sizes = {axis: sizes[axis] for axis in axes}
        self.coordinates = self.coordinates_of(comm.rank)
        self._grid = np.arange(comm.size).reshape(list(self.sizes.values()))
        self._communicators: dict[tuple[str, ...], Communicator] = {}
        longer = [axis for axis in axes if sizes[axis] > 1]
        if len(longer) == 1:  # then the ranks of this axis are all ranks
            comm.name = longer[0]

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        """The ranks that differ from mine along these axes only, in the order of rank. Collective the first time."""
        names = self._sorted((axes,) if isinstance(axes, str) else axes)
        if names not in self._communicators:
            self._communicators[names] = self._make(names)
        return self._communicators[names]

    def communicators(self) -> list[Communicator]:
        """`comm` and those that were made for axes until now, each once; those of one rank are left out."""
        several = [self.comm, *(part for part in self._communicators.values() if part.size > 1)]
        return list(dict.fromkeys(several))

    def coordinates_of(self, rank: int) -> dict[str, int]:
        """The place of a rank of `comm`, by axis."""
        place = np.unravel_index(rank, list(self.sizes.values()))
        return {axis: int(coordinate) for axis, coordinate in zip(self.axes, place, strict=True)}

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks of every communicator that mesh[axes] gives to somebody, ordered by their first rank."""
        names = self._sorted(axes)
        inner = [self.axes.index(axis) for axis in names]
        outer = [i for i in range(len(self.axes)) if i not in inner]
        size = math.prod(self.sizes[axis] for axis in names)
        groups: list[list[int]] = self._grid.transpose(outer + inner).reshape(-1, size).tolist()
        return groups

    def rows(self) -> list[dict[str, Any]]:
        """One row per rank: rank, its coordinate on every axis, host."""
        hosts = self.comm.hosts
        return [{"rank": rank, **self.coordinates_of(rank), "host": hosts[rank]} for rank in range(self.comm.size)]

    def table(self) -> Iterator[str]:
        """The rows as lines of text, with the axes that are longer than 1."""
        columns = ["rank", *[axis for axis in self.axes if self.sizes[axis] > 1 or axis == "dp"], "host"]
        yield "mesh   " + " ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        yield "       " + "".join(f"{column:<6}" for column in columns).rstrip()
        for row in self.rows()[:SHOWN_RANKS]:
            yield "       " + "".join(f"{row[column]!s:<6}" for column in columns).rstrip()
        if self.comm.size > SHOWN_RANKS:
            yield f"       … and {self.comm.size - SHOWN_RANKS} more ranks"

    def close(self) -> None:
        """Give back the communicators that the mesh made; `comm` stays open."""
        for communicator in self._communicators.values():
            if communicator is not self.comm:
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

    def _sorted(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        for axis in axes:
            if axis not in self.axes:
                raise KeyError(f"{axis}: no axis of the mesh; axes: {', '.join(self.axes)}")
        return tuple(axis for axis in self.axes if axis in axes)


def filled(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The sizes with dp=-1 replaced by what the others leave; UserError where they do not make up `num_ranks`."""
    for axis, size in sizes.items():
        if size < 1 and not (axis == "dp" and size == -1):
            also = ", or -1 for what the other axes leave" if axis == "dp" else ""
            raise UserError(f"parallel.{axis}: {size}; must be 1 or more{also} ({num_ranks} ranks)")
    free = sizes["dp"] == -1
    product = math.prod(size for size in sizes.values() if size > 0)
    if free and num_ranks % product == 0:
        return {**sizes, "dp": num_ranks // product}
    if product == num_ranks and not free:
        return dict(sizes)
    # Which single axis could be changed to make it fit? dp first: it is the one that is usually left over.
    for axis in ("dp", "tp", "cp", "ep", "pp"):
        rest, left = divmod(num_ranks, product // max(1, sizes[axis]))
        if not left and (sizes[axis] > 1 or (axis == "dp" and not free)):
            break
    else:
        axis, rest = next(axis for axis in ("tp", "cp", "ep", "pp", "dp") if sizes[axis] > 1), num_ranks
        free = True
    legal = [size for size in range(1, rest + 1) if rest % size == 0] if free else [rest]
    nearest = sorted(sorted(legal, key=lambda size: abs(size - sizes[axis]))[:2])
    others = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 and name != axis)
    raise UserError(
        f"parallel.{axis}: {sizes[axis]}; does not fit {num_ranks} ranks{' with ' + others if others else ''}. "
        f"Nearest that can: {' or '.join(map(str, nearest))}{', or -1' if axis == 'dp' else ''}"
    )
