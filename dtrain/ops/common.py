"""What several rows share: sums over broadcast dims, half-precision accumulation, contiguous and new arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import Shape


def contiguous(x: Array) -> Array:
    """X in C order, as most kernels want it (gradients may be broadcast or transposed views)."""
    return x if x.flags.c_contiguous else x.copy()


def fresh(like: Array, shape: Shape) -> Array:
    """An uninitialised array beside `like`, of NumPy or CuPy, in C order."""
    if type(like) is np.ndarray:
        return np.empty(shape, like.dtype)
    return np.empty_like(like, shape=shape)


def total(x: Array, dim: Any = None, keepdims: bool = False) -> Array:
    """The sum; half precision is accumulated in float32."""
    if x.dtype.itemsize == 2:
        wide: Any = np.sum(x, axis=dim, keepdims=keepdims, dtype=np.float32)
        return wide.astype(x.dtype)  # type: ignore[no-any-return]
    # the method and not np.add.reduce: CuPy's arrays take part in calls of ufuncs, not in their methods
    narrow: Any = x.sum(axis=dim, keepdims=keepdims)
    return narrow  # type: ignore[no-any-return]


def stretch(g: Array, shape: Shape) -> Array:
    """Broadcast g to a shape: a view, or a copy where that is cheaper than np.broadcast_to's 4 µs of Python."""
    if math.prod(shape) > 4096:
        return np.broadcast_to(g, shape)
    copy = np.empty_like(g, shape=shape)
    copy[...] = g
    return copy


def unbroadcast(g: Array, shape: Shape) -> Array:
    """Sum g over the dims that broadcasting stretched, back to `shape`."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    dims = tuple([i for i, n in enumerate(g.shape) if i < extra or (shape[i - extra] == 1 and n != 1)])
    return total(g, dims).reshape(shape)


def scatter_add(g: Array, positions: Array, shape: Shape) -> Array:
    """Zeros of a shape, with every element of g added at its flat position; equal positions add up in order."""
    size = math.prod(shape)
    return kernels.of(g).embedding_vjp(contiguous(g).reshape(-1, 1), positions.reshape(-1), size).reshape(shape)


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """A @ b; half precision is multiplied and accumulated in float32: NumPy has no half-precision BLAS."""
    if a.dtype.itemsize == 2 and type(a) is np.ndarray:
        wide: Any = np.matmul(a.astype(np.float32), b.astype(np.float32))
        if out is None:
            return wide.astype(a.dtype)  # type: ignore[no-any-return]
        out[...] = wide
        return out
    result: Array = np.matmul(a, b, out=out)
    return result


def rows(x: Array) -> Array:
    """(..., C) -> (R, C): a view where the memory allows it."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
