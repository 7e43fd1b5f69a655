"""Flat buffers: all parameters of a rank in one array per dtype, all their gradients in another.

    data │ norm.weight │ qkv.bias │ … │ embedding │ qkv.weight │ … │ 0 0 │     one array of comm.empty
    grad │      "      │    "     │ … │     "     │     "      │ … │ 0 0 │
           vectors, not decayed         matrices, decayed

`Parameter.data` and `Parameter.buffer` (where its gradient goes) become views. Then a bucket, a shard, a gradient
norm and a fused update are slices, and nothing is copied to communicate. Vectors and matrices lie apart, each kind in
the order of definition, so that an optimizer which decays matrices only needs two calls for the whole model. Vectors
come first, and the matrices at the end are the last of the model: a backward fills the buffer from its end.

Invariant: every parameter begins on a cache line of its own (64 bytes), and what lies between parameters is always 0
in both arrays: sums and updates may run straight over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.collectives import Communicator
from dtrain.parameter import Parameter

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


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


class FlatGroup:
    """The parameters of one dtype: `data` and `grad` are flat and of one length, `slices` say what is where."""

    def __init__(self, parameters: Mapping[str, Parameter], comm: Communicator, pad_to: int) -> None:
        ordered = sorted(parameters, key=lambda name: parameters[name].ndim >= 2)  # stable
        self.parameters = {name: parameters[name] for name in ordered}
        self.dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
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


class FlatBuffers:
    """The flat buffers of a model, one group per dtype."""

    def __init__(self, parameters: Mapping[str, Parameter], comm: Communicator, pad_to: int = 1) -> None:
        """Move the parameters (with their values) into flat buffers of `comm.empty`: a collective call.

        Parameters without values yet are 0 until `initialise`. The length of each buffer is a multiple of `pad_to`
        elements. Gradients that are present are forgotten.
        """
        self.fresh = {name for name, parameter in parameters.items() if parameter.is_placeholder}
        by_dtype: dict[Any, dict[str, Parameter]] = {}
        for name, parameter in parameters.items():
            by_dtype.setdefault(parameter.dtype, {})[name] = parameter
        self.parameters = dict(parameters)
        self.groups = [FlatGroup(members, comm, pad_to) for members in by_dtype.values()]

    def initialise(self, seed: int, comm: Communicator) -> None:
        """Give all ranks of `comm` the same values: initial ones where there are none yet, else those of rank 0.

        Each rank draws a share of the initial values and the sum makes them whole (the others hold zeros, so it is
        exact): eight ranks do not draw everything eight times. Collective.
        """
        for group in self.groups:
            for name, parameter in group.parameters.items():
                drawer = group.slices[name].start * comm.size // group.size if name in self.fresh else 0
                if drawer != comm.rank:
                    parameter.data[...] = 0
                elif name in self.fresh:
                    parameter.data[...] = parameter.initial_values(seed)
            comm.all_reduce(group.data, out=group.data)
        self.fresh.clear()
        self.changed()

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
