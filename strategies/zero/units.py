"""What happens around the forward and the backward of a unit: its parameters come and go, its gradients leave.

    forward    fetch ── block ── let go          fetch: all_gather, the next unit's is on its way meanwhile
    backward   fetch, lend ── vjps ── let go     lend: room for the gradients of the unit, for as long as they are made
                              all there: reduce_scatter, every rank adds its n-th to its shard

Where the parameters are shared or whole, only the gradients move. Room for gradients is made once and goes round: two
blocks' worth, or, where gradients must stay until the last microbatch, one for every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.modules import Module
from dtrain.parameter import Parameter
from dtrain.strategies.zero.buffers import ZeroGroup
from dtrain.tensor import Tensor


class Unit:
    """The groups of one block, or of the model's two ends."""

    def __init__(self, groups: Sequence[ZeroGroup]) -> None:
        # What most ranks have in common comes first: there their places in a room must be the same.
        self.groups = sorted(groups, key=lambda group: -group.comm.size)
        self.parameters: dict[str, Parameter] = {name: p for group in groups for name, p in group.parameters.items()}
        self.missing = set(self.parameters)
        """Whose gradient has not come yet."""
        self.sums = 0
        """Reductions of this step."""
        self.fetching: list[Work] | None = None
        """None: the parameters are not gathered; else works that may still be under way."""

    def fetch(self) -> None:
        """Start to gather the parameters."""
        if self.fetching is None:
            self.fetching = [
                group.comm.all_gather_async(group.mine, out=group.data)
                for group in self.groups
                if group.pages is not None
            ]

    def arrive(self) -> None:
        """Return when they are there."""
        self.fetch()
        for work in self.fetching or ():
            work.wait()
        self.fetching = []

    def let_go(self) -> None:
        """Give the memory of the gathered parameters back."""
        if self.fetching is not None:
            self.arrive()
            for group in self.groups:
                if group.pages is not None:
                    group.pages.give_back()
        self.fetching = None


class Rooms:
    """Room for the gradients of a few units, handed round."""

    def __init__(self, comm: Communicator, units: Sequence[Unit], count: int) -> None:
        """Collective. `count` rooms, each large enough for any of the units."""
        sizes: dict[np.dtype[Any], int] = {}
        for unit in units:
            for dtype in {group.dtype for group in unit.groups}:
                size = sum(group.size for group in unit.groups if group.dtype == dtype)
                sizes[dtype] = max(size, sizes.get(dtype, 0))
        order = sorted(sizes, key=str)
        # Ranks may hold parts of different length, as of experts: a room is as large as the largest needs it.
        largest = comm.all_reduce(np.array([sizes[dtype] for dtype in order], np.int64), "max")
        sizes = dict(zip(order, largest.tolist(), strict=True))
        self._rooms = [{dtype: comm.empty(sizes[dtype], dtype) for dtype in order} for _ in range(count)]
        self._free = list(range(count))
        self._leaving: list[tuple[int, Callable[[], None]]] = []
        self._layouts: list[tuple[Any, ...]] = [()] * count

    def take(self, unit: Unit) -> tuple[int, list[Array]]:
        """The number of a room, and in it an array for each group of the unit; waits for the oldest that is leaving."""
        while not self._free:
            self.settle(1)
        number = self._free.pop()
        ends: dict[np.dtype[Any], int] = {}
        arrays = []
        for group in unit.groups:
            start = ends.get(group.dtype, 0)
            ends[group.dtype] = start + group.size
            arrays.append(self._rooms[number][group.dtype][start : start + group.size])
        layout = tuple(
            (group.dtype, group.size, *((w.start, w.stop) for w in group.slices.values())) for group in unit.groups
        )
        if self._layouts[number] != layout:  # between parameters there must be zeros
            for array in arrays:
                array[...] = 0
            self._layouts[number] = layout
        return number, arrays

    def leave(self, number: int, finish: Callable[[], None]) -> None:
        """The room is free again when `finish` returns; it is called when room is needed, or by `settle`."""
        self._leaving.append((number, finish))

    def settle(self, count: int | None = None) -> None:
        """Finish the oldest that are leaving (default: all)."""
        for number, finish in self._leaving[:count]:
            finish()
            self._free.append(number)
        del self._leaving[:count]


class Wrapped(Module):
    """A block that says when its forward and when its backward begin."""

    def __init__(self, inner: Module, forward: Callable[[], None], backward: Callable[[], None]) -> None:
        self.inner, self.name = inner, inner.name
        self._before, self._backward = forward, backward

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """As the block."""
        self._before()
        y = self.inner(x, *context)
        if y.requires_grad:
            y.on_gradient(self._begin)
        return y

    def _begin(self, gradient: Array) -> None:
        self._backward()
