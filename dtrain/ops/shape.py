"""Ops that move elements and compute nothing: views where NumPy has views."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, elementwise
from dtrain.ops.common import scatter_add, unbroadcast

FREE = elementwise(0)
SIMPLE = (int, slice, type(None), type(...))  # parts of an index; all other sequences may name an element twice

RESHAPE = Op(
    "reshape", lambda x, shape: (x.reshape(shape), None), lambda node, g: (g.reshape(node.shapes[0]),), ITSELF, FREE
)


def _permute_vjp(node: Any, g: Array) -> tuple[Array]:
    dims = node.attributes["dims"]
    back = [0] * len(dims)
    for i, d in enumerate(dims):
        back[d] = i
    return (g.transpose(back),)


PERMUTE = Op("permute", lambda x, dims: (x.transpose(dims), None), _permute_vjp, ITSELF, FREE)

BROADCAST_TO = Op(
    "broadcast_to",
    lambda x, shape: (np.broadcast_to(x, shape), None),
    lambda node, g: (unbroadcast(g, node.shapes[0]),),
    ITSELF,
    FREE,
)


def _basic(index: Any) -> bool:
    """Whether the index picks every element at most once: slices, integers, None, ..., or a mask."""
    parts = index if isinstance(index, tuple) else (index,)
    return all([p.dtype.kind == "b" if hasattr(p, "dtype") else isinstance(p, SIMPLE) for p in parts])


def _index_vjp(node: Any, g: Array) -> tuple[Array]:
    index = node.attributes["index"]
    if not _basic(index):
        positions = np.arange(math.prod(node.shapes[0]), like=g).reshape(node.shapes[0])
        return (scatter_add(g, positions[index], node.shapes[0]),)
    dx = np.zeros_like(g, shape=node.shapes[0])
    dx[index] = g
    return (dx,)


INDEX = Op("index", lambda x, index: (x[index], None), _index_vjp, ITSELF, FREE)


def _concat_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    dim, start, parts = node.attributes["dim"] % g.ndim, 0, []
    for shape in node.shapes:
        stop = start + shape[dim]
        parts.append(g[(slice(None),) * dim + (slice(start, stop),)])
        start = stop
    return tuple(parts)


CONCAT = Op("concat", lambda *xs, dim: (np.concatenate(xs, axis=dim), None), _concat_vjp, ITSELF, FREE)


def _stack_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    dim = node.attributes["dim"] % g.ndim
    return tuple([g[(slice(None),) * dim + (i,)] for i in range(g.shape[dim])])


STACK = Op("stack", lambda *xs, dim: (np.stack(xs, axis=dim), None), _stack_vjp, ITSELF, FREE)


def _gather_vjp(node: Any, g: Array) -> tuple[Array]:
    indices, dim = node.attributes["indices"], node.attributes["dim"]
    positions = np.arange(math.prod(node.shapes[0]), like=g).reshape(node.shapes[0])
    return (scatter_add(g, np.take_along_axis(positions, indices, axis=dim), node.shapes[0]),)


# y[i][j] = x[i][indices[i][j]] for dim=1: picks along one dim
GATHER = Op(
    "gather",
    lambda x, indices, dim: (np.take_along_axis(x, indices, axis=dim), None),
    _gather_vjp,
    ITSELF,
    FREE,
)
