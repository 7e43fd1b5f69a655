"""Attention of the fused backend: BLAS products on strided views, compiled passes on a block of scores in the cache.

    for each sample, and block of query rows:             (H heads at once)
        scores  = q k^T        BLAS, into a buffer that is used again
        weights = softmax      compiled, in place, masks and logsumexp included
        out     = weights v    BLAS, into a view of the result

The whole (B,H,T,S) array of scores never exists: memory is O(T). With a causal mask a block multiplies only the keys
that its last row sees. The gradient recomputes the weights from logsumexp. Dao et al., arXiv:2205.14135; the shapes and
conventions of `reference_attention.py`.
"""

from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels.address import address as at
from dtrain.kernels.interface import Maybe
from dtrain.kernels.native import Function

BLOCK_BYTES = 256 * 1024  # of scores: half a second-level cache (measured best on 64 KiB to 2 MiB)
MIN_ROWS = 64  # below, the matrix products lose their speed

Run = dict[str, Function]


def attention(
    run: Run, dtype: np.dtype[Any], q: Array, k: Array, v: Array, causal: bool, scale: float
) -> tuple[Array, Array]:
    """As the reference."""
    q, k, v = _strided(q, dtype), _strided(k, dtype), _strided(v, dtype)
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    out, logsumexp = np.empty(q.shape, dtype), np.empty((batch, heads, length), dtype)
    q_by_head, out_by_head = _by_group(q, k.shape[2]), _by_group(out, k.shape[2])
    k_by_head, v_by_head = _by_group(k, k.shape[2]), _by_group(v, k.shape[2])
    rows = _block_rows(heads, keys, dtype)
    buffer = np.empty(heads * min(rows, length) * keys, dtype)
    for b in range(batch):
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            seen = _seen(stop, length, keys, causal)
            shape = (*q_by_head.shape[1:3], stop - start, seen)
            scores = buffer[: heads * (stop - start) * seen].reshape(shape)
            np.matmul(q_by_head[b, :, :, start:stop], k_by_head[b, :, :, :seen].swapaxes(2, 3), out=scores)
            run["attention_weights"](
                at(scores),
                at(logsumexp) + ((b * heads) * length + start) * dtype.itemsize,
                heads,
                stop - start,
                seen,
                _first(start, length, keys, causal),
                causal,
                length,
                scale,
            )
            np.matmul(scores, v_by_head[b, :, :, :seen], out=out_by_head[b, :, :, start:stop])
    return out, logsumexp


def attention_vjp(
    run: Run,
    dtype: np.dtype[Any],
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    logsumexp: Array,
    causal: bool,
    scale: float,
    results: tuple[Maybe, Maybe, Maybe],
) -> tuple[Array, Array, Array]:
    """As the reference; g, out and logsumexp are contiguous."""
    q, k, v = _strided(q, dtype), _strided(k, dtype), _strided(v, dtype)
    batch, length, heads, depth = q.shape
    keys, groups = k.shape[1:3]
    dq, dk, dv = (
        np.empty(like.shape, dtype) if given is None else given for given, like in zip(results, (q, k, v), strict=True)
    )
    delta = np.empty((batch, heads, length), dtype)
    run["attention_delta"](at(g), at(out), at(delta), batch, length, heads, depth)
    q_, k_, v_, g_, dq_, dk_, dv_ = (_by_group(x, groups) for x in (q, k, v, g, dq, dk, dv))
    rows = _block_rows(heads, keys, dtype)
    size = heads * min(rows, length) * keys
    weight_buffer, gradient_buffer = np.empty(size, dtype), np.empty(size, dtype)
    for b in range(batch):
        for start in reversed(range(0, length, rows)):  # the last block first: it sees all keys, the others add to it
            stop = min(start + rows, length)
            seen = _seen(stop, length, keys, causal)
            count, shape = heads * (stop - start) * seen, (*q_.shape[1:3], stop - start, seen)
            weights, dscores = weight_buffer[:count].reshape(shape), gradient_buffer[:count].reshape(shape)
            queries, gradients = q_[b, :, :, start:stop], g_[b, :, :, start:stop]
            np.matmul(queries, k_[b, :, :, :seen].swapaxes(2, 3), out=weights)
            np.matmul(gradients, v_[b, :, :, :seen].swapaxes(2, 3), out=dscores)
            offset = ((b * heads) * length + start) * dtype.itemsize
            run["attention_gradient"](
                at(weights),
                at(dscores),
                at(logsumexp) + offset,
                at(delta) + offset,
                heads,
                stop - start,
                seen,
                _first(start, length, keys, causal),
                causal,
                length,
                scale,
            )
            np.matmul(dscores, k_[b, :, :, :seen], out=dq_[b, :, :, start:stop])
            for result, left, right in ((dk_, dscores, queries), (dv_, weights, gradients)):
                _product_of_transposed(left, right, result[b, :, 0, :seen], add=stop < length)
    if not length:
        dk[...] = dv[...] = 0
    return dq, dk, dv


def _product_of_transposed(left: Array, right: Array, out: Array, add: bool) -> None:
    """left^T right, (G,R,rows,S) and (G,R,rows,D), summed over R, written or added to out (G,S,D)."""
    left = left.swapaxes(2, 3)
    if left.shape[1] == 1 and not add:
        np.matmul(left[:, 0], right[:, 0], out=out)
        return
    product = np.matmul(left, right).sum(axis=1) if left.shape[1] > 1 else np.matmul(left[:, 0], right[:, 0])
    if add:
        out += product
    else:
        out[...] = product


def _strided(x: Array, dtype: np.dtype[Any]) -> Array:
    """The array itself where BLAS can read it: the last dim contiguous."""
    return x if x.dtype == dtype and x.strides[3] == dtype.itemsize else np.asarray(x, dtype, order="C")


def _by_group(x: Array, groups: int) -> Array:
    """(B,T,H,D) -> (B,G,H/G,T,D): the heads of one key/value head side by side; a view."""
    batch, length, heads, depth = x.shape
    return x.reshape(batch, length, groups, heads // groups, depth).transpose(0, 2, 3, 1, 4)


def _block_rows(heads: int, keys: int, dtype: np.dtype[Any]) -> int:
    """Query rows of a block."""
    return max(MIN_ROWS, BLOCK_BYTES // max(1, heads * keys * dtype.itemsize))


def _seen(stop: int, length: int, keys: int, causal: bool) -> int:
    """Keys that the last row of a block sees."""
    return max(0, stop + keys - length) if causal else keys


def _first(start: int, length: int, keys: int, causal: bool) -> int:
    """Keys that the first row of a block sees (negative where the causal mask begins before the first key)."""
    return start + 1 + keys - length if causal else keys
