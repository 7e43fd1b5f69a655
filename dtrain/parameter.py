"""Parameter: a tensor that is trained. It knows its name, its place on the mesh and how its values begin.

A new parameter has a shape and a rule for its initial values but no memory; `Module.materialise(seed)` fills it. In
between, a model of any size can be counted, looked at and cut, and then only the slice of this rank is ever made.

Invariant: initial values depend on (seed, name of the parameter, place in the whole tensor) alone, never on ranks or
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dtrain import random
from dtrain.arrays import Array
from dtrain.layout import REPLICATED, Box, Layout, Partial, Place, Shard
from dtrain.tensor import Tensor


class Initial(Protocol):
    """A rule for initial values."""

    def values(self, seed: int, name: str, shape: tuple[int, ...], dtype: Any, part: Sequence[slice]) -> Array:
        """The `part` (slices of the leading dims) of the initial tensor of global `shape`."""


@dataclass(frozen=True)
class Normal:
    """Initial values from N(0, std²)."""

    std: float

    def values(self, seed: int, name: str, shape: tuple[int, ...], dtype: Any, part: Sequence[slice]) -> Array:
        """The `part` (slices of the leading dims) of the initial tensor of global `shape`."""
        return random.normal(seed, name, shape, self.std, dtype, part)


@dataclass(frozen=True)
class Constant:
    """All initial values alike."""

    value: float

    def values(self, seed: int, name: str, shape: tuple[int, ...], dtype: Any, part: Sequence[slice]) -> Array:
        """The `part` (slices of the leading dims) of the initial tensor of global `shape`."""
        return np.full(np.broadcast_to(np.int8(0), shape)[tuple(part)].shape, self.value, dtype)


class Parameter(Tensor):
    """A tensor that is trained: it has a name in its model, a layout on the mesh and a rule for its initial values.

    Until `materialise` its `data` is a read-only placeholder of the right shape and dtype without memory behind it.
    """

    __slots__ = ("boxes", "gradient_layout", "initial", "layout", "name", "whole")
    trained = True

    def __init__(self, shape: tuple[int, ...], initial: Initial, dtype: Any = np.float32) -> None:
        super().__init__(np.broadcast_to(np.zeros((), dtype), shape), requires_grad=True)
        self.name = ""  # dotted path in the whole model, given by its root before anything is cut
        self.layout: Layout = REPLICATED
        self.gradient_layout: Layout = REPLICATED
        """Partial on the axes over which the gradient must be summed after the backward, the data axis aside."""
        self.initial: Initial = initial
        self.whole = shape  # of the whole tensor, also where `data` is a slice of it
        self.boxes = whole_boxes(shape)
        """Which blocks of the whole tensor `data` holds."""

    def cut(self, mesh: Place, layout: Layout) -> None:
        """Keep only what this rank holds by `layout`, which replaces the parameter's: values too, if there are any.

        Several strategies may cut one after the other, each by the layout with its axis added, as long as there are no
        values. ValueError where values are cut already, or the layout does not fit the shape or is partial.
        """
        if self.layout.axes(Shard) and not self.is_placeholder:
            raise ValueError(f"{self} is cut already: give all axes that cut it in one layout")
        if layout.axes(Partial):
            raise ValueError(
                f"{self}: cut({layout}): a parameter is not a sum; `gradient_layout` says that of gradients"
            )
        boxes, shape = layout.boxes(mesh, self.whole), layout.local_shape(mesh, self.whole)
        if self.is_placeholder:
            self.data = np.broadcast_to(np.zeros((), self.dtype), shape)
        else:
            self.data = _assembled(shape, self.dtype, boxes, lambda box: self.data[box.whole])
        self.layout, self.boxes, self.grad, self.buffer = layout, boxes, None, None

    def initial_values(self, seed: int, part: Sequence[slice] | None = None) -> Array:
        """The values at the start of what this rank holds, a function of (seed, name, place in the whole tensor).

        `part`: of these slices of the whole tensor instead, one (step 1) per leading dim.
        """
        if not self.name:
            raise ValueError("a parameter without a name has no initial values: call assign_names() of the root")
        if part is not None:
            return self.initial.values(seed, self.name, self.whole, self.dtype, part)
        draw = lambda box: self.initial.values(seed, self.name, self.whole, self.dtype, box.whole)  # noqa: E731
        return _assembled(self.shape, self.dtype, self.boxes, draw)

    @property
    def is_placeholder(self) -> bool:
        """Whether there are no values yet."""
        return isinstance(self.data, np.ndarray) and not self.data.flags.writeable

    def __repr__(self) -> str:
        return f"Parameter({self.name or 'unnamed'}, {self.dtype}{list(self.shape)}, {self.layout})"


def whole_boxes(shape: tuple[int, ...]) -> list[Box]:
    """The one box of a tensor that nothing cuts; none of a tensor without elements."""
    slices = tuple(slice(0, length) for length in shape)
    return [] if 0 in shape else [Box(slices, slices)]


def _assembled(shape: tuple[int, ...], dtype: Any, boxes: Sequence[Box], values: Callable[[Box], Array]) -> Array:
    if len(boxes) == 1:
        return np.ascontiguousarray(values(boxes[0])).reshape(shape)
    array = np.empty(shape, dtype)
    for box in boxes:
        array[box.local] = values(box)
    return array
