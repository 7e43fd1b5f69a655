"""A flat group: parameters that lie alike, in one array, and their gradients in another.

    data │ norm.weight │ qkv.bias │ … │ embedding │ qkv.weight │ … │ 0 0 │     one array of comm.empty
    grad │      "      │    "     │ … │     "     │     "      │ … │ 0 0 │
           vectors, not decayed         matrices, decayed
                            └──── a part ────┘                                a bucket or a shard: a slice, which has
                                                                              `pieces` and `blocks` of parameters

Vectors and matrices lie apart, each kind in the order of definition, so that an optimizer which decays matrices only
needs two calls for the whole model. Vectors come first, and the matrices at the end are the last of the model: a
backward fills the buffer from its end.

Invariant: every parameter begins on a cache line of its own (64 bytes), and what lies between parameters is always 0
in both arrays: sums and updates may run straight over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, single
from dtrain.layout import Only, Partial, Shard
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.parameter import Parameter

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


class Kind(NamedTuple):
    """What the parameters of a group have in common."""

    dtype: np.dtype[Any]
    cut_axes: tuple[str, ...]
    """The axes of the mesh that cut them."""
    partial_axes: tuple[str, ...]
    """Those over which their gradients are summed."""
    only: tuple[tuple[str, tuple[int, ...]], ...]
    """(axis, coordinates) where alone they are."""


def kind(parameter: Parameter) -> Kind:
    """The kind of a parameter, by its layouts."""
    layout, gradient = parameter.layout, parameter.gradient_layout
    only = tuple((axis, layout.coordinates(axis)) for axis in sorted(layout.axes(Only)))
    return Kind(parameter.dtype, tuple(sorted(layout.axes(Shard))), tuple(sorted(gradient.axes(Partial))), only)


@dataclass(frozen=True)
class Piece:
    """What of one parameter lies in a part of a flat buffer."""

    name: str
    where: slice
    """In the part."""
    inside: slice
    """In the flattened parameter."""
    shape: tuple[int, ...]
    """Of the array: the parameter's where all of it is here, else flat."""


@dataclass(frozen=True)
class Block:
    """A block of a whole tensor: the elements start .. start + array.shape of global_shape; `array` is a view."""

    name: str
    array: Array
    start: tuple[int, ...]
    global_shape: tuple[int, ...]


class FlatGroup:
    """Parameters that lie alike: `data` and `grad` are flat and of one length, `slices` say what is where.

    Of one dtype, cut over the same axes (`cut_axes`), with gradients to be summed over the same axes (`partial_axes`),
    held by the same coordinates (`only`). So all ranks that replicate the group have equal offsets, and a sum over them
    is one collective on a slice.
    """

    owned_over: tuple[str, ...] = ()
    """The axes over which `owned` is cut: () or ("dp", "cp")."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        comm: Communicator,
        pad_to: int,
        mesh: Mesh | None,
        joined: tuple[str, ...] = (),
    ) -> None:
        """joined: axes of partial gradients over which the data-parallel sum goes too."""
        self.joined = joined
        ordered = sorted(parameters, key=lambda name: parameters[name].ndim >= 2)  # stable
        self.parameters = {name: parameters[name] for name in ordered}
        self.mesh = mesh
        self.dtype, self.cut_axes, self.partial_axes, self.only = kind(next(iter(self.parameters.values())))
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.slices: dict[str, slice] = {}
        unit, end = max(1, ALIGNMENT // self.dtype.itemsize), 0
        for name, parameter in self.parameters.items():
            start = -(-end // unit) * unit
            end = start + parameter.size
            self.slices[name] = slice(start, end)
        unit = math.lcm(unit, pad_to)
        self.size = -(-end // unit) * unit
        matrices = [where.start for name, where in self.slices.items() if len(self.shapes[name]) >= 2]
        self.first_matrix = min(matrices, default=self.size)
        self.owned = slice(0, self.size)
        """What this rank updates, norms and saves."""
        self.allocate(comm)

    def allocate(self, comm: Communicator) -> None:
        """Make the arrays and move the parameters into them. Collective."""
        self.data = comm.empty(self.size, self.dtype)
        self.grad = comm.empty(self.size, self.dtype)
        self.data[...] = 0
        self.grad[...] = 0
        for name, parameter in self.parameters.items():
            where = self.slices[name]
            view = self.data[where].reshape(parameter.shape)
            if not parameter.is_placeholder:
                view[...] = parameter.data
            parameter.data = view
            parameter.buffer = self.grad[where].reshape(parameter.shape)
            parameter.grad = None

    @property
    def peers(self) -> Communicator:
        """The ranks with other samples that hold the same of this group, and those along the axes that are joined: the
        gradients are summed over them."""
        return single() if self.mesh is None or not self.summed_over else self.mesh[self.summed_over]

    @property
    def summed_over(self) -> tuple[str, ...]:
        """The axes of `peers`."""
        return () if self.mesh is None else (*summed_axes(self.cut_axes, self.mesh), *self.joined)

    @property
    def owned_data(self) -> Array:
        """The parameters that this rank updates."""
        return self.data[self.owned]

    @property
    def owned_grad(self) -> Array:
        """Their gradients, after the strategies have reduced them."""
        return self.grad[self.owned]

    def bytes_held(self) -> dict[str, int]:
        """Of parameters and gradients, on this rank, between two steps."""
        return {"parameters": self.data.nbytes, "gradients": self.grad.nbytes}

    @property
    def replicating_axes(self) -> tuple[str, ...]:
        """The axes of the mesh along which all ranks hold the same of this group."""
        held = self.mesh.axes if self.mesh is not None else ()
        return tuple(axis for axis in held if axis not in self.cut_axes and axis not in dict(self.only))

    def replicas(self) -> tuple[int, int]:
        """(index of this rank, number) among the ranks that own the same: together they count it once."""
        if self.mesh is None:
            return 0, 1
        axes = [axis for axis in self.replicating_axes if axis not in self.owned_over]
        index, count = self.mesh.index(*axes), self.mesh.size(*axes)
        for axis, coordinates in self.only:
            index = index * len(coordinates) + coordinates.index(self.mesh.coordinates[axis])
            count *= len(coordinates)
        return index, count

    @property
    def complement(self) -> Communicator:
        """The ranks that together own each parameter of the group exactly once. The first access is collective."""
        axes = (*self.cut_axes, *self.owned_over)
        return single() if self.mesh is None or not axes else self.mesh[axes]

    def runs(self, part: slice) -> list[tuple[slice, bool]]:
        """The part as (slice relative to it, whether it is decayed): at most one run of vectors, one of matrices."""
        border = min(max(self.first_matrix, part.start), part.stop) - part.start
        runs = [(slice(0, border), False), (slice(border, part.stop - part.start), True)]
        return [(where, decayed) for where, decayed in runs if where.stop > where.start]

    def pieces(self, part: slice) -> list[Piece]:
        """What of each parameter lies in the part, in order; parameters outside are left out."""
        pieces = []
        for name, whole in self.slices.items():
            start, stop = max(whole.start, part.start), min(whole.stop, part.stop)
            if start < stop:
                inside = slice(start - whole.start, stop - whole.start)
                shape = self.shapes[name] if stop - start == whole.stop - whole.start else (stop - start,)
                pieces.append(Piece(name, slice(start - part.start, stop - part.start), inside, shape))
        return pieces

    def blocks(self, array: Array, part: slice) -> Iterator[Block]:
        """The blocks of whole parameters in an array that holds `part` (data, or state as long as the part)."""
        for piece in self.pieces(part):
            parameter, there = self.parameters[piece.name], array[piece.where]
            end = 0
            for held in boxes_within(self.shapes[piece.name], piece.inside.start, piece.inside.stop):
                shape = tuple(each.stop - each.start for each in held)
                view = there[end : end + math.prod(shape)].reshape(shape)
                end += view.size
                for box in parameter.boxes:
                    common = [_overlap(a, b) for a, b in zip(held, box.local, strict=True)]
                    if all(low < high for low, high in common):
                        inside = tuple(slice(a - h.start, b - h.start) for (a, b), h in zip(common, held, strict=True))
                        start = tuple(
                            whole.start + a - local.start
                            for (a, _), local, whole in zip(common, box.local, box.whole, strict=True)
                        )
                        yield Block(piece.name, view[inside] if inside else view, start, parameter.whole)
        for name, parameter in self.parameters.items():
            if 0 in parameter.whole:  # no rank has a piece of it, but a checkpoint knows it
                yield Block(name, array[:0].reshape(parameter.whole), (0,) * len(parameter.whole), parameter.whole)


def boxes_within(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Elements start .. stop of a flattened array as blocks of it, in order: a rest of a row, whole rows, a rest."""
    size = math.prod(shape)
    if start >= stop:
        return
    if (start, stop) == (0, size):
        yield tuple(slice(0, length) for length in shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        for rest in boxes_within(shape[1:], start - last * row, stop - last * row):
            yield (slice(last, last + 1), *rest)
        return
    for rest in boxes_within(shape[1:], start - (first - 1) * row, row) if start % row else ():
        yield (slice(first - 1, first), *rest)
    if first < last:
        yield (slice(first, last), *(slice(0, length) for length in shape[1:]))
    for rest in boxes_within(shape[1:], 0, stop - last * row) if stop % row else ():
        yield (slice(last, last + 1), *rest)


def summed_axes(cut_axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
    """The axes of the batch over which the gradient of a parameter that `cut_axes` cut is to be summed."""
    return tuple(axis for axis in BATCH_AXES if axis not in cut_axes and mesh.size(axis) > 1)


def _overlap(a: slice, b: slice) -> tuple[int, int]:
    return max(a.start, b.start), min(a.stop, b.stop)
