"""Sums over ranks by one binary tree, whatever the algorithm: the upper part of that of `reproducible.py`.

rank   0   1   2   3        every rank gets the parts of its own block from all,
       └ + ┘   └ + ┘        adds them up like this, and all gather the blocks
         └── + ──┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.collectives.dtypes import cut


class FixedTree(Communicator):
    """The same communicator, but sums go over the ranks by a binary tree: everybody gets the parts of its block from
    all, and adds them up. As much traffic as a ring."""

    @classmethod
    def over(cls, comm: Communicator) -> FixedTree:
        """Another view of `comm`, with the same state; the number of ranks is a power of two."""
        view = object.__new__(cls)
        view.__dict__ = comm.__dict__
        return view

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks, by the tree; other operations do not depend on an order."""
        if op != "sum" or self.size == 1:
            return super().all_reduce(array, op, out, algorithm)
        array = np.asarray(array)
        counts = cut(array.size, self.size)
        whole = self.all_gather(self._sum(array, counts), counts=counts).reshape(array.shape)
        if out is None:
            return whole
        out[...] = whole
        return out

    def reduce_scatter(
        self,
        array: Any,
        op: str = "sum",
        out: Array | None = None,
        algorithm: str = "auto",
        counts: Sequence[int] | None = None,
    ) -> Array:
        """My block of the sum over ranks of a flat array, by the tree."""
        array = np.asarray(array)
        if op != "sum" or self.size == 1 or array.ndim != 1:
            return super().reduce_scatter(array, op, out, algorithm, counts)
        mine = self._sum(array, counts or cut(array.size, self.size))
        if out is None:
            return mine
        out[...] = mine
        return out

    def all_reduce_async(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: Any = "auto") -> Work:
        """Done when it returns."""
        result = self.all_reduce(array, op, out)
        return Work(None, lambda: result)

    def reduce_scatter_async(
        self,
        array: Any,
        op: str = "sum",
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: Any = "auto",
    ) -> Work:
        """Done when it returns."""
        result = self.reduce_scatter(array, op, out, counts=counts)
        return Work(None, lambda: result)

    def _sum(self, array: Array, counts: Sequence[int]) -> Array:
        flat = np.ascontiguousarray(array).reshape(-1)
        parts = self.all_to_all(flat, counts=counts, out_counts=[counts[self.rank]] * self.size)
        rows = list(parts.reshape(self.size, -1))
        while len(rows) > 1:
            rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
        return rows[0]
