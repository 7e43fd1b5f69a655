"""How a tensor lies on the mesh: per axis whole, cut along a dim, or in parts that are still to be added up.

    Layout(tp=Shard(0), dp=Partial())          axes that are not named: Replicate

    weight (8, 4), tp of size 2, Shard(0)      rank tp=0 holds rows 0..3, tp=1 rows 4..7
    gradient, dp of size 2, Partial()          both hold a whole array; the true gradient is the sum

Gradient synchronisation, clipping, checkpoints and redistribution derive from it, so a strategy writes down *what* it
did with a parameter and nobody needs to ask which strategy that was. `axis` is an axis of the mesh, `dim` one of the
tensor. Where a dim does not divide, the first ranks get one element more, as in all collectives.
Reference: the placements of PyTorch's DTensor; Xu et al., "GSPMD", arXiv:2105.04663.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.collectives.dtypes import cut


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the same whole."""


@dataclass(frozen=True)
class Shard:
    """Rank i of the axis holds block i of this dim (from 0)."""

    dim: int

    def __post_init__(self) -> None:
        """Check that there is one way to write a dim."""
        if self.dim < 0:
            raise ValueError(f"{self}: dims of a layout count from 0, so that equal layouts look equal")


@dataclass(frozen=True)
class Partial:
    """Every rank of the axis holds a contribution; the whole is their reduction."""

    op: str = "sum"


Placement = Replicate | Shard | Partial


class Layout:
    """The placement on each axis of the mesh. Immutable; equal when every rank holds the same by both.

    Two axes may cut the same dim: the one named first cuts the whole, the next one cuts its blocks.
    """

    __slots__ = ("_placements",)

    def __init__(self, **placements: Placement) -> None:
        self._placements = {axis: what for axis, what in placements.items() if not isinstance(what, Replicate)}

    def __getitem__(self, axis: str) -> Placement:
        return self._placements.get(axis, Replicate())

    def with_(self, **placements: Placement) -> Layout:
        """The same but for these axes."""
        return Layout(**(self._placements | placements))

    def axes(self, kind: type[Shard] | type[Partial]) -> tuple[str, ...]:
        """The axes with a placement of this kind, in the order of cutting."""
        return tuple(axis for axis, what in self._placements.items() if isinstance(what, kind))

    def part(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], coordinates: Mapping[str, int]
    ) -> tuple[slice, ...]:
        """Which slices of a tensor of global `shape` the rank at `coordinates` of a mesh of `sizes` holds, one per dim.

        An axis that the mesh does not have counts as size 1.
        """
        parts = [slice(0, length) for length in shape]
        for axis in self.axes(Shard):
            placement, size = self._placements[axis], sizes.get(axis, 1)
            assert isinstance(placement, Shard)
            if placement.dim >= len(shape):
                raise ValueError(f"{axis}={placement} does not fit a tensor of shape {shape}")
            whole = parts[placement.dim]
            lengths = cut(whole.stop - whole.start, size)
            coordinate = coordinates.get(axis, 0)
            start = whole.start + sum(lengths[:coordinate])
            parts[placement.dim] = slice(start, start + lengths[coordinate])
        return tuple(parts)

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


REPLICATED = Layout()
