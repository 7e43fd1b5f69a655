"""Layers on a grid of ranks: samples cut over the rows, the width of activations over the columns.

    x (B of my row, T, C of my column)       linear   SUMMA, see summa.py; the bias is cut over columns
                                             norm     each rank's mean and squares, 2 numbers per token, along the row
    weight (outputs, inputs) of a linear:    dropout  the mask of the whole row of C, of which this rank draws its part
      outputs over columns, inputs over rows
    embedding and head (V, C): V over rows, C over columns; one table can be both

Invariant: every rank of a row has the same samples, every rank of a column the same columns. A vector lies over columns
and has the same values in all rows; its gradient is of the samples of one row, so it is a sum over `tp_row`.
Reference: Xu, Li, Gong, You, "An efficient 2D method for training super-large deep learning models", arXiv:2104.05343.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dtrain import kernels, random
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import accumulator, cut, spans
from dtrain.modules import Context, Dropout, LayerNorm, Linear, Module, RMSNorm
from dtrain.op import ITSELF, Op
from dtrain.ops.common import rows
from dtrain.strategies.tensor import summa
from dtrain.strategies.tensor.summa import Grid, Panels
from dtrain.tensor import Tensor, apply

CHUNK = 1 << 16  # elements of a mask that are drawn at once


class GridLinear(Linear):
    """A linear layer whose outputs lie over columns and whose inputs lie over rows."""

    def __init__(self, whole: Linear, inputs: Panels, grid: Grid) -> None:
        self.weight, self.bias, self.name = whole.weight, whole.bias, whole.name
        self._inputs, self._grid = inputs, grid

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """From (..., inputs of my column) to (..., outputs of my column)."""
        y = summa.linear(x, self.weight, self._inputs, self._grid)
        return y if bias is None else y + bias


class GridHead(Linear):
    """A linear layer whose weight lies as that of the embedding, which it may be."""

    def __init__(self, whole: Linear, outputs: Panels, grid: Grid) -> None:
        self.weight, self.bias, self.name = whole.weight, whole.bias, whole.name
        self._outputs, self._grid = outputs, grid

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """From (..., C of my column) to (..., V of my column)."""
        y = summa.linear_by_rows(x, self.weight, self._outputs, self._grid)
        return y if bias is None else y + bias


class GridNorm(Module):
    """Layer norm or RMS norm of rows that are cut along `comm`."""

    def __init__(self, whole: LayerNorm | RMSNorm, width: int, comm: Communicator) -> None:
        """width: of the whole rows."""
        self.weight, self.name, self.eps = whole.weight, whole.name, whole.eps
        self.centred = isinstance(whole, LayerNorm)
        self.bias = getattr(whole, "bias", None)
        self.width, self.comm = width, comm

    def forward(self, x: Tensor) -> Tensor:
        """From (..., C of my column) to the same shape."""
        vectors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        options = {"eps": self.eps, "centred": self.centred, "width": self.width, "comm": self.comm}
        return apply(NORM, x, *vectors, **options)


class GridDropout(Dropout):
    """Dropout on my samples and columns: the mask is that of the same elements in the whole."""

    def __init__(self, whole: Dropout, width: int, grid: Grid) -> None:
        """width: of the whole rows."""
        super().__init__(whole.p)
        self.name, self.width, self.grid = whole.name, width, grid

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From (B of my row, ..., C of my column) to the same shape; the context is of all samples."""
        if context is None or self.p == 0:
            return x
        mine = replace(context, row_ids=context.row_ids[block(len(context.row_ids), self.grid.along_column)])
        key = random.key(context.seed, "dropout " + self.name, context.step)
        row_ids = mine.rows(int(np.prod(x.shape[1:-1])))
        columns = block(self.width, self.grid.along_row)
        return apply(DROPOUT, x, p=self.p, key=key, row_ids=row_ids, columns=columns, width=self.width)


def block(length: int, comm: Communicator) -> slice:
    """Which of `length` things this rank has of those that `comm` cuts."""
    return slice(*spans(length, comm.size)[comm.rank])


# Norms: each rank's n, mean and sum of squares around it, joined as by Chan, Golub, LeVeque (1979)


def _norm_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    eps: float,
    centred: bool,
    width: int,
    comm: Communicator,
) -> tuple[Array, Any]:
    wide = rows(x).astype(accumulator(x.dtype), copy=False)
    mean = np.zeros((len(wide), 1), wide.dtype)
    if centred and wide.shape[1]:
        mean = wide.mean(axis=1, keepdims=True)
    squares = ((wide - mean) ** 2).sum(axis=1, keepdims=True)
    if centred:
        own = np.concatenate([mean, squares], axis=1)
        each = comm.all_gather(own.reshape(1, -1)).reshape(comm.size, len(wide), 2)
        counts = np.array(cut(width, comm.size), wide.dtype)[:, None]
        mean = (counts * each[..., 0]).sum(axis=0)[:, None] / width
        squares = (each[..., 1] + counts * (each[..., 0] - mean.T) ** 2).sum(axis=0)[:, None]
    else:
        squares = comm.all_reduce(squares)
    rstd = 1 / np.sqrt(squares / width + eps)
    y = (wide - mean) * rstd * weight
    if bias is not None:
        y += bias
    return y.astype(x.dtype, copy=False).reshape(x.shape), (x, weight, mean, rstd)


def _norm_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (x, weight, mean, rstd), a = node.saved, node.attributes
    wide, g = rows(x).astype(rstd.dtype, copy=False), rows(g).astype(rstd.dtype, copy=False)
    normed, weighted = (wide - mean) * rstd, g * weight
    sums = np.stack([weighted.sum(axis=1), (weighted * normed).sum(axis=1)][0 if a["centred"] else 1 :])
    sums = a["comm"].all_reduce(sums)[..., None] / a["width"]
    dx = weighted - normed * sums[-1]
    if a["centred"]:
        dx -= sums[0]
    results = ((dx * rstd).reshape(x.shape), (g * normed).sum(axis=0), g.sum(axis=0))
    return tuple(result.astype(x.dtype, copy=False) for result in results[: len(node.needs)])


NORM = Op("grid_norm", _norm_forward, _norm_vjp)


# Dropout: the mask of whole rows is drawn, a few rows at a time, and cut


def _dropped(x: Array, p: float, key: int, row_ids: Array, columns: slice, width: int) -> Array:
    flat = rows(x)
    y, step = np.empty_like(flat), max(1, CHUNK // width)
    for first in range(0, len(flat), step):
        ids = row_ids[first : first + step]
        mask = kernels.of(x).dropout(np.ones((len(ids), width), x.dtype), p, key, ids)
        np.multiply(flat[first : first + step], mask[:, columns], out=y[first : first + step])
    return y.reshape(x.shape)


DROPOUT = Op(
    "grid_dropout",
    lambda x, **a: (_dropped(x, **a), None),
    lambda node, g: (_dropped(g, **node.attributes),),
    ITSELF,
)
