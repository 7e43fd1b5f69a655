"""Matrix products and the lookup of rows: where the time of a model goes.

LINEAR flattens a batch (..., I) to rows, so that forward, input gradient and weight gradient are ONE product each; the
weight gradient is written straight into the leaf's gradient buffer when it is the first (`node.into`).
MATMUL takes strided views (transposed operands, heads of a packed array) without copies.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, Shape, elementwise
from dtrain.ops.common import contiguous, fresh, matmul, rows, unbroadcast


def _matmul_forward(a: Array, b: Array) -> tuple[Array, Any]:
    if a.ndim > 2 and b.ndim == 2:  # one product of all rows instead of one per matrix
        return matmul(rows(a), b).reshape(*a.shape[:-1], b.shape[1]), (a, b)
    return matmul(a, b), (a, b)


def _matmul_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (a, b), (needs_a, needs_b) = node.saved, node.needs
    if a.ndim == 2 and b.ndim == 2:
        return matmul(g, b.T) if needs_a else None, matmul(a.T, g, node.into(1)) if needs_b else None
    if a.ndim == 1 and b.ndim == 1:
        return g * b, g * a
    if a.ndim > 2 and b.ndim == 2:
        flat = rows(g)
        return (
            matmul(flat, b.T).reshape(a.shape) if needs_a else None,
            matmul(rows(a).T, flat, node.into(1)) if needs_b else None,
        )
    left = a[None, :] if a.ndim == 1 else a
    right = b[:, None] if b.ndim == 1 else b
    gradient = np.expand_dims(g, -2) if a.ndim == 1 else np.expand_dims(g, -1) if b.ndim == 1 else g
    da = unbroadcast(matmul(gradient, right.swapaxes(-1, -2)), left.shape).reshape(a.shape) if needs_a else None
    db = unbroadcast(matmul(left.swapaxes(-1, -2), gradient), right.shape).reshape(b.shape) if needs_b else None
    return da, db


def _matmul_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    return tangents[0] @ inputs[1] + inputs[0] @ tangents[1]


def _matmul_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


MATMUL = Op("matmul", _matmul_forward, _matmul_vjp, _matmul_jvp, _matmul_flops, splits=True)


def _linear_forward(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Any]:
    """X (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError("x (..., I) needs a weight (O, I)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError("the bias of a weight (O, I) needs the shape (O,)")
    flat = rows(x)
    y = matmul(flat, weight.T, fresh(x, (flat.shape[0], weight.shape[0])))
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), (flat, weight)


def _linear_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (flat, weight), needs = node.saved, node.needs
    g = contiguous(rows(g))
    dx = matmul(g, weight, fresh(g, flat.shape)).reshape(node.shapes[0]) if needs[0] else None
    dweight = None
    if needs[1]:
        place = node.into(1)
        dweight = matmul(g.T, flat, fresh(g, weight.shape) if place is None else place)
    if len(needs) == 2:
        return dx, dweight
    return dx, dweight, kernels.of(g).column_sum(g) if needs[2] else None


def _linear_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    tangent = tangents[0] @ inputs[1].T + inputs[0] @ tangents[1].T
    return tangent + tangents[2] if len(tangents) == 3 else tangent


def _linear_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return math.prod(output) * (2 * inputs[1][1] + (len(inputs) == 3))


LINEAR = Op("linear", _linear_forward, _linear_vjp, _linear_jvp, _linear_flops, splits=True)


def _embedding_forward(weight: Array, ids: Array) -> tuple[Array, Any]:
    """Weight (V, C), ids (...) of integers -> (..., C)."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= len(weight):
            raise IndexError(
                f"the ids reach from {low} to {high}; a vocabulary of {len(weight)} has 0 to {len(weight) - 1}"
            )
    return kernels.of(weight).embedding(weight, ids), None


def _embedding_vjp(node: Any, g: Array) -> tuple[Array]:
    ids, shape = node.attributes["ids"], node.shapes[0]
    place = node.onto(0)
    if place is None:
        place = node.into(0)
        if place is not None:
            place.fill(0)
    return (kernels.of(g).embedding_vjp(contiguous(g), ids, shape[0], out=place),)


EMBEDDING = Op("embedding", _embedding_forward, _embedding_vjp, ITSELF, elementwise(0))
