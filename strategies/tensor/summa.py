"""SUMMA: products of matrices that lie in blocks on a grid of q x r ranks; no rank ever gathers a row or a column.

    A  m cut over rows, k over columns         B  k over rows, n over columns         C = A B like A and B

            │ column 0 │ column 1 │              for each panel of k (here 2):
    row 0   │  C00     │  C01     │                the column that has it broadcasts A's part along its rows    ──►
    row 1   │  C10     │  C11     │                the row that has it broadcasts B's part along its columns     │
                                                   every rank adds the product of the two to its block of C      ▼

    C = A B      two broadcasts per panel of k, the dim that is summed over
    C = A Bᵀ     a broadcast of B along columns, a sum along rows       per panel of n, which B has over rows
    C = Aᵀ B     a broadcast of A along rows, a sum along columns       per panel of k, which A has over columns

The gradients of each are the two others: of C = A B they are G Bᵀ and Aᵀ G. Nothing is transposed between ranks.
A dim that one matrix has over q rows and the other over r columns is cut into panels where either is cut: the grid need
not be square, and blocks may be of any length, also empty.

Received per rank in A B: what it lacks of its row of A and of its column of B, (r-1)/r · m/q · k + (q-1)/q · k · n/r;
a panel at a time, so that beside the own blocks there is never more than one panel of each.
References: van de Geijn, Watts, "SUMMA: scalable universal matrix multiplication algorithm", 1997; Xu, Li, Gong, You,
"An efficient 2D method for training super-large deep learning models" (Optimus), arXiv:2104.05343.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import accumulator
from dtrain.op import Op, Shape
from dtrain.ops.common import matmul, rows
from dtrain.tensor import Tensor, apply


class Grid(NamedTuple):
    """The place of a rank on the grid: `along_row` are the ranks of its row, by column; `along_column` those above and
    below it, by row."""

    along_row: Communicator
    along_column: Communicator

    @property
    def row(self) -> int:
        """Mine."""
        return self.along_column.rank

    @property
    def column(self) -> int:
        """Mine."""
        return self.along_row.rank


@dataclass(frozen=True)
class Panel:
    """Elements of a dim that one column has of the one matrix, and one row of the other."""

    column: int
    row: int
    in_column: slice
    in_row: slice

    @property
    def width(self) -> int:
        """How many."""
        return int(self.in_row.stop - self.in_row.start)


Panels = tuple[Panel, ...]


def panels(by_column: Sequence[int], by_row: Sequence[int]) -> Panels:
    """A dim that columns have in blocks of these lengths and rows in those, cut where either is cut."""
    assert sum(by_column) == sum(by_row), (by_column, by_row)
    column_ends, row_ends = [0, *accumulate(by_column)], [0, *accumulate(by_row)]
    found = []
    for column in range(len(by_column)):
        for row in range(len(by_row)):
            start = max(column_ends[column], row_ends[row])
            stop = min(column_ends[column + 1], row_ends[row + 1])
            if start < stop:
                first, second = column_ends[column], row_ends[row]
                found.append(
                    Panel(column, row, slice(start - first, stop - first), slice(start - second, stop - second))
                )
    return tuple(found)


# The three products, on this rank's blocks


def product(a: Array, b: Array, over: Panels, grid: Grid) -> Array:
    """C = A B: a (m, k of my column), b (k of my row, n) -> (m, n); over: k."""
    c = np.zeros_like(a, shape=(len(a), b.shape[1]), dtype=accumulator(a.dtype))
    for panel in over:
        left = _broadcast(a[:, panel.in_column], (len(a), panel.width), grid.along_row, panel.column)
        right = _broadcast(b[panel.in_row], (panel.width, b.shape[1]), grid.along_column, panel.row)
        c += matmul(left, right)
    return c.astype(a.dtype, copy=False)


def product_bt(a: Array, b: Array, over: Panels, grid: Grid) -> Array:
    """C = A Bᵀ: a (m, k), b (n of my row, k) -> (m, n of my column); over: n."""
    c = np.zeros_like(a, shape=(len(a), _width(over, grid.column)))
    for panel in over:
        right = _broadcast(b[panel.in_row], (panel.width, b.shape[1]), grid.along_column, panel.row)
        total = grid.along_row.reduce(matmul(a, right.T), root=panel.column)
        if total is not None:
            c[:, panel.in_column] = total
    return c


def product_at(a: Array, b: Array, over: Panels, grid: Grid) -> Array:
    """C = Aᵀ B: a (m, k of my column), b (m, n) -> (k of my row, n); over: k."""
    c = np.zeros_like(a, shape=(_height(over, grid.row), b.shape[1]))
    for panel in over:
        left = _broadcast(a[:, panel.in_column], (len(a), panel.width), grid.along_row, panel.column)
        total = grid.along_column.reduce(matmul(left.T, b), root=panel.row)
        if total is not None:
            c[panel.in_row] = total
    return c


def _broadcast(mine: Array, shape: Shape, comm: Communicator, root: int) -> Array:
    if comm.size == 1:
        return mine
    return comm.broadcast(mine if comm.rank == root else np.empty_like(mine, shape=shape), root)


def _width(over: Panels, column: int) -> int:
    return sum(panel.width for panel in over if panel.column == column)


def _height(over: Panels, row: int) -> int:
    return sum(panel.width for panel in over if panel.row == row)


# As ops of x (..., columns) and a weight as `Linear` has it, (outputs, inputs)


def _flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    length: int = sum(panel.width for panel in attributes["over"])
    other: int = output[-1] if attributes["inner"] else inputs[0][-1]
    return 2 * math.prod(output[:-1]) * length * other


def _forward(x: Array, weight: Array, over: Panels, grid: Grid, inner: bool) -> tuple[Array, Any]:
    flat = rows(x)
    y = product(flat, weight.T, over, grid) if inner else product_bt(flat, weight, over, grid)
    return y.reshape(*x.shape[:-1], y.shape[1]), (flat, weight)


def _vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (x, weight), a = node.saved, node.attributes
    over, grid, g = a["over"], a["grid"], rows(g)
    dx = dweight = None
    if node.needs[0]:
        dx = product_bt(g, weight.T, over, grid) if a["inner"] else product(g, weight, over, grid)
        dx = dx.reshape(node.shapes[0])
    if node.needs[1]:
        dweight = product_at(x, g, over, grid).T if a["inner"] else product_at(g, x, over, grid)
    return dx, dweight


SUMMA = Op("summa", _forward, _vjp, flops=_flops, splits=True)


def linear(x: Tensor, weight: Tensor, inputs: Panels, grid: Grid) -> Tensor:
    """X Wᵀ by broadcasts alone: x (..., inputs of my column), weight (outputs of my column, inputs of my row) ->
    (..., outputs of my column)."""
    return apply(SUMMA, x, weight, over=inputs, grid=grid, inner=True)


def linear_by_rows(x: Tensor, weight: Tensor, outputs: Panels, grid: Grid) -> Tensor:
    """X Wᵀ for a weight that lies as a table of embeddings does: x (..., inputs of my column), weight (outputs of my
    row, inputs of my column) -> (..., outputs of my column)."""
    return apply(SUMMA, x, weight, over=outputs, grid=grid, inner=False)
