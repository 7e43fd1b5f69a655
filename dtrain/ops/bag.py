"""Bags of rows: what a recommender looks up, the sum of the rows of a table that a bag of ids names.

ids     [[3, 1], [0, -1], [-1, -1]]           -1: no id
output  [w3 + w1,  w0,     0      ]           backward: each row's gradient is added to all ids of its bag
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, Shape
from dtrain.ops.common import contiguous


def _forward(weight: Array, ids: Array) -> tuple[Array, Any]:
    """Weight (V, C), ids (K, L) of integers -> (K, C)."""
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise TypeError(f"ids must be integers (bags, longest bag), not {ids.dtype} of shape {ids.shape}")
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < len(weight):
        raise IndexError(
            f"the ids reach from {int(ids.min())} to {int(ids.max())}; a table of {len(weight)} rows has 0 to "
            f"{len(weight) - 1}, and -1 for none"
        )
    bags, places = np.nonzero(ids >= 0)  # ordered by bag
    rows = ids[bags, places]
    found = kernels.of(weight).embedding(weight, rows) if rows.size else weight[:0]
    if len(rows) == len(ids) and np.array_equal(bags, np.arange(len(ids), like=bags)):
        return found, (bags, rows)  # one id each: a plain lookup
    output = np.zeros_like(weight, shape=(len(ids), weight.shape[1]))
    filled, starts = np.unique(bags, return_index=True)
    if len(filled):
        output[filled] = np.add.reduceat(found, starts, axis=0)
    return output, (bags, rows)


def _vjp(node: Any, g: Array) -> tuple[Array]:
    (bags, rows), shape = node.saved, node.shapes[0]
    place = node.onto(0)
    if place is None:
        place = node.into(0)
        if place is not None:
            place.fill(0)
    if not rows.size:
        return (np.zeros_like(g, shape=shape) if place is None else place,)
    return (kernels.of(g).embedding_vjp(contiguous(g)[bags], rows, shape[0], out=place),)


def _flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    longest: int = attributes["ids"].shape[1]
    return math.prod(output) * (longest - 1)


EMBEDDING_BAG = Op("embedding_bag", _forward, _vjp, ITSELF, _flops)
