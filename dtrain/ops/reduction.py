"""Reductions over one dim, several dims or all (`dim=None`), with or without `keepdims`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, Shape
from dtrain.ops.common import stretch, total


def _flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return math.prod(inputs[0])


def _kept(shape: Shape, dim: Any) -> Shape:
    """The shape that the result has with keepdims."""
    if dim is None:
        return (1,) * len(shape)
    dims = {d % len(shape) for d in (dim if isinstance(dim, tuple) else (dim,))}
    return tuple([1 if i in dims else n for i, n in enumerate(shape)])


def _spread(g: Array, shape: Shape, dim: Any) -> Array:
    """The gradient of a sum: g at every place that was summed."""
    if g.ndim == len(shape) or (dim is None and g.ndim == 0):
        return stretch(g, shape)
    return stretch(g.reshape(_kept(shape, dim)), shape)


def _sum_vjp(node: Any, g: Array) -> tuple[Array]:
    return (_spread(g, node.shapes[0], node.attributes["dim"]),)


SUM = Op("sum", lambda x, dim, keepdims: (total(x, dim, keepdims), None), _sum_vjp, ITSELF, _flops)


def _mean_forward(x: Array, dim: Any, keepdims: bool) -> tuple[Array, Any]:
    count = math.prod([n for n, kept in _dims(x.shape, dim) if not kept])
    if count == 0:
        raise ValueError("the mean of no elements does not exist")
    return total(x, dim, keepdims) / x.dtype.type(count), count


def _mean_vjp(node: Any, g: Array) -> tuple[Array]:
    return (_spread(g / g.dtype.type(node.saved), node.shapes[0], node.attributes["dim"]),)


MEAN = Op("mean", _mean_forward, _mean_vjp, ITSELF, _flops)


def _extreme(name: str, reduce: Any) -> Op:
    """The maximum or minimum; elements that tie share the gradient evenly."""

    def forward(x: Array, dim: Any, keepdims: bool) -> tuple[Array, Any]:
        y = reduce(x, axis=dim, keepdims=True)
        return y if keepdims else y.reshape([n for n, kept in _dims(x.shape, dim) if kept]), (x, y)

    def vjp(node: Any, g: Array) -> tuple[Array]:
        x, y = node.saved
        return (_share(x, y, node.attributes["dim"]) * g.reshape(y.shape),)

    def jvp(inputs: Any, tangents: Any, output: Any, dim: Any, keepdims: bool) -> Any:
        x = inputs[0].data
        share = _share(x, output.data.reshape(_kept(x.shape, dim)), dim)
        return (tangents[0] * share).sum(dim=dim, keepdims=keepdims)

    return Op(name, forward, vjp, jvp, _flops)


def _dims(shape: Shape, dim: Any) -> list[tuple[int, bool]]:
    if dim is None:
        return [(n, False) for n in shape]
    reduced = {d % len(shape) for d in (dim if isinstance(dim, tuple) else (dim,))}
    return [(n, i not in reduced) for i, n in enumerate(shape)]


def _share(x: Array, y: Array, dim: Any) -> Array:
    equal = (x == y).astype(x.dtype)
    shares: Array = equal / total(equal, dim, True)
    return shares


MAX = _extreme("max", np.max)
MIN = _extreme("min", np.min)
