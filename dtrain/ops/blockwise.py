"""Attention between one block of queries and one block of keys, and how such blocks make up the whole.

    out, logsumexp = block(q, k₁, v₁)      softmax over the keys of the block alone, and the log of its denominator
    merge(out, logsumexp, *block(q, k₂, v₂)) …   as if all keys had been there at once: weigh by exp(lse - new lse)
    dq, dk, dv = block_vjp(g, q, kⱼ, vⱼ, out, logsumexp)      with those of the whole: just this block's contribution

Where two blocks stand to one another is one number: query i of the one sees key j of the other if j <= i + offset. For
runs of tokens that begin at q_start and k_start, offset = q_start - k_start. None: all keys are seen.
References: Milakov and Gimelshein, arXiv:1805.02867; Dao et al. (FlashAttention), arXiv:2205.14135, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.ops.common import contiguous

Rows = tuple[slice, int, bool]


def sees(length: int, keys: int, offset: int | None) -> bool:
    """Whether any of `length` queries sees any of `keys` keys."""
    return bool(length and keys) and (offset is None or length - 1 + offset >= 0)


def block(q: Array, k: Array, v: Array, offset: int | None, scale: float) -> tuple[Array, Array]:
    """Q (B,T,H,D), k and v (B,S,G,D) -> out (B,T,H,D) and logsumexp (B,H,T); 0 and -inf for what sees nothing."""
    parts = list(_rows(q.shape[1], k.shape[1], offset))
    if len(parts) == 1 and parts[0][0] == slice(0, q.shape[1]):
        _, seen, causal = parts[0]
        return kernels.of(q).attention(q, k[:, :seen], v[:, :seen], causal, scale)
    out = np.zeros_like(q, order="C", shape=q.shape)
    logsumexp: Array | None = None
    for rows, seen, causal in parts:
        one, lse = kernels.of(q).attention(q[:, rows], k[:, :seen], v[:, :seen], causal, scale)
        if logsumexp is None:
            logsumexp = np.full_like(lse, -np.inf, shape=(q.shape[0], q.shape[2], q.shape[1]))
        out[:, rows], logsumexp[:, :, rows] = one, lse
    if logsumexp is None:
        logsumexp = np.full_like(q, -np.inf, shape=(q.shape[0], q.shape[2], q.shape[1]))
    return out, logsumexp


def block_vjp(
    g: Array, q: Array, k: Array, v: Array, out: Array, logsumexp: Array, offset: int | None, scale: float
) -> tuple[Array, Array, Array]:
    """What this block adds to dq, dk and dv; g, out and logsumexp are those of attention over all keys."""
    parts = list(_rows(q.shape[1], k.shape[1], offset))
    if len(parts) == 1 and parts[0][:2] == (slice(0, q.shape[1]), k.shape[1]):
        return kernels.of(q).attention_vjp(contiguous(g), q, k, v, out, logsumexp, parts[0][2], scale)
    dq, dk, dv = (np.zeros_like(x, order="C", shape=x.shape) for x in (q, k, v))
    for rows, seen, causal in parts:
        some = [contiguous(x) for x in (g[:, rows], out[:, rows], logsumexp[:, :, rows])]
        one, ofk, ofv = kernels.of(q).attention_vjp(
            some[0], q[:, rows], k[:, :seen], v[:, :seen], some[1], some[2], causal, scale
        )
        dq[:, rows] = one
        dk[:, :seen] += ofk
        dv[:, :seen] += ofv
    return dq, dk, dv


def merge(out: Array, logsumexp: Array, more: Array, more_logsumexp: Array) -> None:
    """Add a block's (out, logsumexp) to that of other keys, in place. Shapes as `block` returns them."""
    total = np.logaddexp(logsumexp, more_logsumexp)
    finite = np.where(np.isneginf(total), 0, total)
    out *= np.exp(logsumexp - finite).swapaxes(1, 2)[..., None]
    out += more * np.exp(more_logsumexp - finite).swapaxes(1, 2)[..., None]
    logsumexp[...] = total


def _rows(length: int, keys: int, offset: int | None) -> Iterator[Rows]:
    """The queries as (rows, keys that they may see, whether causal), so that a kernel whose last query sees the last
    key computes each; those that see nothing are left out."""
    if not length or not keys:
        return
    if offset is None:
        yield slice(0, length), keys, False
        return
    first = min(length, max(0, -offset))  # sees key 0
    full = min(length, max(first, keys - 1 - offset))  # sees all
    if first < full:
        yield slice(first, full), full + offset, True
    if full < length:
        yield slice(full, length), keys, False
