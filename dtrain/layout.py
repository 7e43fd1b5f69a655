"""How a tensor lies on the mesh: per axis whole, cut along a dim, in parts to be added up, or at some places only.

    Layout(tp=Shard(0), dp=Partial())          axes that are not named: Replicate

    weight (8, 4), tp of size 2, Shard(0)      rank tp=0 holds rows 0..3, tp=1 rows 4..7
    gradient, dp of size 2, Partial()          both hold a whole array; the true gradient is the sum
    weight, pp of size 4, Only((0, 3))         the first and the last stage hold it whole, the others do not have it

Gradient synchronisation, clipping, checkpoints and redistribution derive from it, so a strategy writes down *what* it
did with a parameter and nobody needs to ask which strategy that was. `axis` is an axis of the mesh, `dim` one of the
tensor. Where a dim does not divide, the first ranks get one element more, as in all collectives. Two axes may cut the
same dim: the one named first cuts the whole, the next one cuts its blocks.
Reference: the placements of PyTorch's DTensor; Xu et al., "GSPMD", arXiv:2105.04663.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtrain.collectives.dtypes import spans

Run = tuple[int, int]
"""Start and stop of consecutive elements of a dim."""


class Place(Protocol):
    """Where a rank stands on which mesh; a `Mesh` says it."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Ranks along each axis."""

    @property
    def coordinates(self) -> Mapping[str, int]:
        """Of this rank."""


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the same whole."""


@dataclass(frozen=True)
class Shard:
    """Rank i of the axis holds block i of this dim (from 0), or the runs `ranges[i]` in the order in which they stand.

    Ranges are for dims in which several things lie one after the other (q, k and v): each rank has a bit of all. They
    must cover the dim without overlap.
    """

    dim: int
    ranges: tuple[tuple[Run, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one way to write a dim, and that ranges tile."""
        if self.dim < 0:
            raise ValueError(f"{self}: dims of a layout count from 0, so that equal layouts look equal")
        end = 0
        for start, stop in sorted(run for runs in self.ranges for run in runs if run[0] != run[1]):
            if start != end or stop < start:
                raise ValueError(f"{self}: ranges must cover the dim once; there is a gap or an overlap at {end}")
            end = stop

    def __repr__(self) -> str:
        return f"Shard({self.dim}{f', ranges={self.ranges}' if self.ranges else ''})"


@dataclass(frozen=True)
class Partial:
    """Every rank of the axis holds a contribution; the whole is their reduction."""

    op: str = "sum"


@dataclass(frozen=True)
class Only:
    """The ranks at these coordinates of the axis hold the same whole, the others nothing at all."""

    coordinates: tuple[int, ...]


Placement = Replicate | Shard | Partial | Only


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it lies in the array that a rank holds, and where in the whole."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]

    @property
    def start(self) -> tuple[int, ...]:
        """In the whole, per dim."""
        return tuple(each.start for each in self.whole)


class Layout:
    """The placement on each axis of the mesh. Immutable; equal when every rank holds the same by both."""

    __slots__ = ("_placements",)

    def __init__(self, **placements: Placement) -> None:
        self._placements = {axis: what for axis, what in placements.items() if not isinstance(what, Replicate)}

    def __getitem__(self, axis: str) -> Placement:
        return self._placements.get(axis, Replicate())

    def __iter__(self) -> Iterator[str]:
        """The axes that are not Replicate, in the order of cutting."""
        return iter(self._placements)

    def with_(self, **placements: Placement) -> Layout:
        """The same but for these axes."""
        return Layout(**(self._placements | placements))

    def axes(self, kind: type[Shard] | type[Partial] | type[Only]) -> tuple[str, ...]:
        """The axes with a placement of this kind, in the order of cutting."""
        return tuple(axis for axis, what in self._placements.items() if isinstance(what, kind))

    def cutters(self, dim: int) -> tuple[str, ...]:
        """The axes that cut this dim, in the order of cutting."""
        return tuple(axis for axis in self.axes(Shard) if self._placements[axis].dim == dim)  # type: ignore[union-attr]

    def runs(self, mesh: Place, shape: Sequence[int]) -> list[list[Run]]:
        """What of a tensor of global `shape` this rank of the mesh holds: per dim the runs of elements, in order.

        An axis that the mesh does not have counts as size 1. ValueError where a dim or ranges do not fit.
        """
        held: list[list[Run]] = [[(0, length)] for length in shape]
        for axis in self.axes(Shard):
            placement, size = self._placements[axis], mesh.sizes.get(axis, 1)
            assert isinstance(placement, Shard)
            if placement.dim >= len(shape):
                raise ValueError(f"{axis}={placement} does not fit a tensor of shape {tuple(shape)}")
            before, rank = held[placement.dim], mesh.coordinates.get(axis, 0)
            if placement.ranges:
                ends = max((stop for runs in placement.ranges for _, stop in runs), default=0)
                if len(placement.ranges) != size or ends != shape[placement.dim] or before != [(0, ends)]:
                    raise ValueError(
                        f"{axis}={placement}: ranges must be those of {size} ranks, cover the {shape[placement.dim]} "
                        "elements of the dim, and be the first to cut it"
                    )
                held[placement.dim] = [run for run in placement.ranges[rank] if run[1] > run[0]] or [(0, 0)]
            else:
                first, last = spans(sum(stop - start for start, stop in before), size)[rank]
                held[placement.dim] = _within(before, first, last)
        return held

    def part(self, mesh: Place, shape: Sequence[int]) -> tuple[slice, ...]:
        """Which slices of a tensor of global `shape` this rank holds, one per dim; ValueError if not one block."""
        held = self.runs(mesh, shape)
        if any(len(runs) > 1 for runs in held):
            raise ValueError(f"{self}: this rank holds several blocks of a tensor {tuple(shape)}; see Layout.boxes")
        return tuple(slice(*runs[0]) for runs in held)

    def local_shape(self, mesh: Place, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what this rank holds of a tensor of global `shape`."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs(mesh, shape))

    def boxes(self, mesh: Place, shape: Sequence[int]) -> list[Box]:
        """The blocks that make up what this rank holds; one without ranges. Empty blocks are left out."""
        dims = []
        for runs in self.runs(mesh, shape):
            end, pairs = 0, []
            for start, stop in runs:
                pairs.append((slice(end, end + stop - start), slice(start, stop)))
                end += stop - start
            dims.append(pairs)
        boxes = [
            Box(*map(tuple, zip(*pairs, strict=True))) if pairs else Box((), ()) for pairs in itertools.product(*dims)
        ]
        return [box for box in boxes if all(each.stop > each.start for each in box.whole)]

    def holds(self, mesh: Place) -> bool:
        """Whether this rank has any part in the tensor: it stands where `Only` says."""
        return all(mesh.coordinates.get(axis, 0) in self.coordinates(axis) for axis in self.axes(Only))

    def coordinates(self, axis: str) -> tuple[int, ...]:
        """Where along an axis with an `Only` the tensor is."""
        placement = self._placements[axis]
        assert isinstance(placement, Only)
        return placement.coordinates

    def _key(self) -> list[tuple[str, Placement]]:
        """The placements by dim; among those of one dim the order matters, and sorting keeps it."""
        return sorted(self._placements.items(), key=lambda item: _order(*item))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(tuple(self._key()))

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{axis}={what}' for axis, what in self._placements.items())})"


def _order(axis: str, placement: Placement) -> tuple[int, str]:
    return (placement.dim, "") if isinstance(placement, Shard) else (-1, axis)


def _within(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """Elements first..last of the runs, which count one after the other."""
    found, end = [], 0
    for start, stop in runs:
        low, high = max(first - end, 0), min(last - end, stop - start)
        if low < high:
            found.append((start + low, start + high))
        end += stop - start
    return found or [(runs[0][0] + min(first, runs[0][1] - runs[0][0]),) * 2]


REPLICATED = Layout()
