"""Parameter: a tensor that is trained. It knows its name, its place on the mesh and how its values begin.

A new parameter has a shape and a rule for its initial values but no memory; `Module.materialise(seed)` fills it. In
between, a model of any size can be counted, looked at and cut, and then only the slice of this rank is ever made.

Invariant: initial values depend on (seed, name of the parameter, place in the whole tensor) alone, never on ranks or
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain import random
from dtrain.arrays import Array
from dtrain.layout import REPLICATED, Layout
from dtrain.tensor import Tensor


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

    __slots__ = ("initial", "layout", "name", "whole")

    def __init__(self, shape: tuple[int, ...], initial: Normal | Constant, dtype: Any = np.float32) -> None:
        super().__init__(np.broadcast_to(np.zeros((), dtype), shape), requires_grad=True)
        self.name = ""  # dotted path, given by the root module
        self.layout: Layout = REPLICATED
        self.initial = initial
        self.whole = shape  # of the whole tensor, also where `data` is a slice of it

    def initial_values(self, seed: int, part: Sequence[slice] = ()) -> Array:
        """The values at the start, of the whole tensor or of a part of it: one slice (step 1) per leading dim."""
        if not self.name:
            raise ValueError("a parameter without a name has no initial values: call assign_names() of the root")
        return self.initial.values(seed, self.name, self.whole, self.dtype, part)

    @property
    def is_placeholder(self) -> bool:
        """Whether there are no values yet."""
        return isinstance(self.data, np.ndarray) and not self.data.flags.writeable

    def __repr__(self) -> str:
        return f"Parameter({self.name or 'unnamed'}, {self.dtype}{list(self.shape)}, {self.layout})"
