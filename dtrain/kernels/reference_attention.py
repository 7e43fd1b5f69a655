# ruff: noqa: D403 - docstrings that begin with a formula
"""Attention and rotary embedding, the reference: one sample at a time, all of its scores at once.

H query heads share G key/value heads (grouped-query attention, Ainslie et al., arXiv:2305.13245): query head h uses
key head h // (H / G). A query that sees no key at all (causal with S < T) yields 0, and logsumexp -inf.
"""

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels.interface import Maybe


def rotary(x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
    """x (B,T,H,D), cos and sin (T,D/2) -> (B,T,H,D): rotates the pair (i, i + D/2) by the angle of (t, i).

    Su et al., arXiv:2104.09864, with the halves of Llama and GPT-NeoX. The inverse rotation is its vjp.
    """
    half = x.shape[-1] // 2
    c, s = cos[:, None, :], sin[:, None, :] * (-1 if inverse else 1)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * c - second * s, second * c + first * s), axis=-1)


def attention(q: Array, k: Array, v: Array, causal: bool, scale: float) -> tuple[Array, Array]:
    """out (B,T,H,D) = softmax(scale * q k^T) v and logsumexp (B,H,T) of the scaled scores."""
    batch, length, heads, _ = q.shape
    out, logsumexp = np.zeros_like(q, order="C"), np.zeros_like(q, shape=(batch, heads, length))
    for b in range(batch):
        scores = _scores(q[b], k[b], causal, scale)
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = weights.sum(axis=-1, keepdims=True)
        seen = total != 0
        logsumexp[b] = np.where(seen, np.log(np.where(seen, total, 1)) + top, -np.inf)[..., 0]
        out[b] = ((weights / np.where(seen, total, 1)) @ _heads_first(v[b], heads)).transpose(1, 0, 2)
    return out, logsumexp


def attention_vjp(
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    logsumexp: Array,
    causal: bool,
    scale: float,
    dq: Maybe = None,
    dk: Maybe = None,
    dv: Maybe = None,
) -> tuple[Array, Array, Array]:
    """P = exp(scale * q k^T - logsumexp), dS = P * (g v^T - rowsum(g * out)) * scale.

    dq = dS k, dk = dS^T q, dv = P^T g; written into the arrays given, if any.
    """
    dq = np.zeros_like(q, order="C") if dq is None else dq
    dk = np.zeros_like(k, order="C") if dk is None else dk
    dv = np.zeros_like(v, order="C") if dv is None else dv
    heads, shared = q.shape[2], (v.shape[2], q.shape[2] // v.shape[2] if v.shape[2] else 0)
    for b in range(len(q)):
        gradient = g[b].transpose(1, 0, 2)  # (H,T,D)
        total = logsumexp[b][..., None]
        weights = np.exp(_scores(q[b], k[b], causal, scale) - np.where(np.isneginf(total), 0, total))
        delta = (g[b] * out[b]).sum(axis=-1).T[..., None]  # (H,T,1): the row sums of P * dP
        dscores = weights * (gradient @ _heads_first(v[b], heads).transpose(0, 2, 1) - delta) * scale
        dq[b] = (dscores @ _heads_first(k[b], heads)).transpose(1, 0, 2)
        for result, left, right in ((dk, dscores, q[b].transpose(1, 0, 2)), (dv, weights, gradient)):
            per_head = left.transpose(0, 2, 1) @ right  # (H,S,D), to be added up within a group
            result[b] = per_head.reshape(*shared, *per_head.shape[1:]).sum(axis=1).transpose(1, 0, 2)
    return dq, dk, dv


def _heads_first(x: Array, heads: int) -> Array:
    """(S,G,D) -> (H,S,D), each key/value head repeated for the query heads that share it."""
    return np.repeat(x.transpose(1, 0, 2), heads // max(x.shape[1], 1), axis=0)


def _scores(q: Array, k: Array, causal: bool, scale: float) -> Array:
    """(T,H,D), (S,G,D) -> (H,T,S), -inf where query i must not see key j: j > i + S - T."""
    scores = (q.transpose(1, 0, 2) @ _heads_first(k, q.shape[1]).transpose(0, 2, 1)) * scale
    if causal:
        length, keys = scores.shape[1:]
        visible = np.tril(np.ones_like(scores, shape=(length, keys), dtype=bool), keys - length)
        scores = np.where(visible, scores, scores.dtype.type(-np.inf))
    return scores
