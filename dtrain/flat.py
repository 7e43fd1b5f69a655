"""Flat buffers: all parameters of a rank in one array per group that lies alike, all their gradients in another.

    data │ norm.weight │ qkv.bias │ … │ embedding │ qkv.weight │ … │ 0 0 │     one array of comm.empty
    grad │      "      │    "     │ … │     "     │     "      │ … │ 0 0 │
           vectors, not decayed         matrices, decayed

`Parameter.data` and `Parameter.buffer` (where its gradient goes) become views. Then a bucket, a shard, a gradient
norm and a fused update are slices, and nothing is copied to communicate. Vectors and matrices lie apart, each kind in
the order of definition, so that an optimizer which decays matrices only needs two calls for the whole model. Vectors
come first, and the matrices at the end are the last of the model: a backward fills the buffer from its end.

A parameter that is cut over an axis of the batch (a table over dp, an expert over ep) gets its gradient from the
samples of all ranks there already: its group is summed over the other axes of the batch only (`peers`). Frozen
parameters (`requires_grad` is False) have values, but no place in the buffers.

Invariant: every parameter begins on a cache line of its own (64 bytes), and what lies between parameters is always 0
in both arrays: sums and updates may run straight over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, single
from dtrain.layout import Only, Partial, Shard
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.parameter import Parameter

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


Kind = tuple[np.dtype[Any], tuple[str, ...], tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]


def kind(parameter: Parameter) -> Kind:
    """(dtype, axes that cut it, axes over which its gradient is summed, (axis, coordinates) where alone it is)."""
    layout, gradient = parameter.layout, parameter.gradient_layout
    only = tuple((axis, layout.coordinates(axis)) for axis in sorted(layout.axes(Only)))
    return parameter.dtype, tuple(sorted(layout.axes(Shard))), tuple(sorted(gradient.axes(Partial))), only


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


class FlatBuffers:
    """The flat buffers of a model: a group for each dtype, way of being cut and way of being summed."""

    group_type: type[FlatGroup] = FlatGroup

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        comm: Communicator,
        pad_to: int = 1,
        mesh: Mesh | None = None,
        section: Callable[[str], int] = lambda name: 0,
        join: bool = False,
    ) -> None:
        """Move the parameters (with their values) into flat buffers of `comm.empty`: a collective call.

        Parameters without values yet are 0 until `initialise`. The length of each buffer is a multiple of `pad_to`
        elements. Gradients that are present are forgotten. Without a mesh, all ranks that matter hold the same. Names
        are those that the parameters have in the whole model. Parameters of different sections have groups apart.
        With `join`, partial gradients are summed in one go with those of other samples: over axes that cut no
        parameter (cp), whose ranks have equal buffers. The memory is then that of all these ranks.
        """
        parameters = {parameter.name or path: parameter for path, parameter in parameters.items()}
        self.frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        """What is not trained: in no group, so without gradient, state, or part in a checkpoint."""
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.mesh = mesh
        self.fresh = {name for name, parameter in parameters.items() if parameter.is_placeholder}
        by_kind: dict[tuple[Kind, int], dict[str, Parameter]] = {}
        for name, parameter in parameters.items():
            by_kind.setdefault((kind(parameter), section(name)), {})[name] = parameter
        self.parameters = parameters
        # One order on all ranks, also where each has other parameters: what is summed over an axis meets there.
        kinds = sorted(by_kind, key=lambda each: (each[0][2], each[0][3], each[0][1], str(each[0][0]), each[1]))
        joined = [_joined(each[0], kinds) if join and mesh else () for each in kinds]
        if mesh is not None:
            mesh.open((*summed_axes(each[0][1], mesh), *axes) for each, axes in zip(kinds, joined, strict=True))
        # What is cut over an axis of the batch has another length on each rank there: no memory of all of them.
        homes = [
            mesh[(*summed_axes(cut_axes, mesh), *axes)]
            if mesh and (axes or (comm.size > 1 and set(cut_axes) & set(BATCH_AXES)))
            else comm
            for ((_, cut_axes, _, _), _), axes in zip(kinds, joined, strict=True)
        ]
        self.groups = [
            self.group_type(by_kind[each], home, pad_to, mesh, axes)
            for each, home, axes in zip(kinds, homes, joined, strict=True)
        ]
        if mesh is not None:
            mesh.open(axes for group in self.groups for axes in _meetings(group))

    def initialise(self, seed: int, comm: Communicator | None = None) -> None:
        """Give the ranks that replicate a group the same values: initial ones where there are none yet, else those of
        the first of them. Without `comm`, the mesh knows them.

        Each rank draws a share of the initial values and the sum makes them whole (the others hold zeros, so it is
        exact): eight ranks do not draw everything eight times. Collective.
        """
        for group in self.groups:
            peers = comm or (single() if self.mesh is None else self.mesh[group.replicating_axes])
            for name, parameter in group.parameters.items():
                drawer = group.slices[name].start * peers.size // max(1, group.size) if name in self.fresh else 0
                if drawer != peers.rank:
                    parameter.data[...] = 0
                elif name in self.fresh:
                    parameter.data[...] = parameter.initial_values(seed)
            peers.all_reduce(group.data, out=group.data)
        self.fill_frozen(seed)
        self.fresh.clear()
        self.changed()

    def fill_frozen(self, seed: int) -> None:
        """Give the frozen parameters that have no values yet their initial ones, on every rank for itself."""
        for parameter in self.frozen.values():
            if parameter.is_placeholder:
                parameter.data = parameter.initial_values(seed)

    def zero_grad(self) -> None:
        """Forget all gradients: the next backward overwrites. The memory keeps its old values until then."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def missing(self) -> list[str]:
        """The names of the parameters that have no gradient since `zero_grad`."""
        return [name for name, parameter in self.parameters.items() if parameter.grad is None]

    def fill_missing(self) -> None:
        """Give a gradient of 0 to the parameters that have none: before `grad` is used as a whole."""
        for parameter in self.parameters.values():
            if parameter.grad is None and parameter.buffer is not None:
                parameter.buffer[...] = 0
                parameter.grad = parameter.buffer

    def changed(self) -> None:
        """Tell the tape that all parameters have new values: a graph that used the old ones refuses its backward."""
        for parameter in self.parameters.values():
            parameter.version += 1


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


def reduce_partial(flat: FlatBuffers) -> None:
    """Sum the gradients that are Partial over axes of the mesh by their `gradient_layout`: one collective per group and
    communicator. After the data-parallel sum, on what this rank owns. Collective."""
    for group in flat.groups:
        if group.mesh is None or not group.partial_axes:
            continue
        flat.fill_missing()
        gradient, only = group.owned_grad, dict(group.only)
        whole = tuple(axis for axis in group.partial_axes if axis not in only and axis not in group.joined)
        comms: list[Communicator | None] = [group.mesh[whole]] if whole else []
        comms += [group.mesh.among(axis, only[axis]) for axis in group.partial_axes if axis in only]
        for comm in comms:
            if comm is not None and comm.size > 1:
                comm.all_reduce(gradient, out=gradient)


def summed_axes(cut_axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
    """The axes of the batch over which the gradient of a parameter that `cut_axes` cut is to be summed."""
    return tuple(axis for axis in BATCH_AXES if axis not in cut_axes and mesh.size(axis) > 1)


def _joined(of: Kind, kinds: Sequence[tuple[Kind, int]]) -> tuple[str, ...]:
    """The axes of its partial gradients along which all ranks hold whole parameters, and the same."""
    apart = {axis for (_, cut_axes, _, only), _ in kinds for axis in (*cut_axes, *dict(only))}
    return tuple(axis for axis in of[2] if axis not in apart)


def _meetings(group: FlatGroup) -> Iterator[tuple[str | int, ...]]:
    """The communicators that a group needs, as `Mesh.open` wants them named: made by all ranks in one order."""
    only = dict(group.only)
    yield group.replicating_axes
    yield (*group.cut_axes, *group.owned_over)
    yield tuple(axis for axis in group.partial_axes if axis not in only)
    for axis in group.partial_axes:
        if axis in only:
            yield axis, *only[axis]


def _overlap(a: slice, b: slice) -> tuple[int, int]:
    return max(a.start, b.start), min(a.stop, b.stop)
