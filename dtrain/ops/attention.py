"""Scaled dot-product attention, causal or full, with grouped keys and values; rotary position embedding.

    softmax(scale * q k^T + mask) v       q (B,T,H,D), k and v (B,S,G,D), G divides H: head h reads group h / (H/G)

PACKED_ATTENTION takes the output of one projection, [all q heads | all k heads | all v heads] along the last dim: q, k,
v are views of it, their gradients are written into views of one array, and no head is ever copied.
Vaswani et al., arXiv:1706.03762; grouped queries: Ainslie et al., arXiv:2305.13245; rotary: Su et al.,
arXiv:2104.09864.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, Shape, elementwise
from dtrain.ops.common import contiguous, fresh


def _check(q: Shape, k: Shape, v: Shape) -> None:
    if not len(q) == len(k) == len(v) == 4 or k != v or q[0] != k[0] or q[3] != k[3]:
        raise ValueError("q (B,T,H,D) needs k and v of one shape (B,S,G,D)")
    if not k[2] or q[2] % k[2]:
        raise ValueError(f"{q[2]} query heads cannot be shared evenly by {k[2]} key/value heads")


def _inner(x: Array) -> Array:
    return x if x.strides[-1] == x.itemsize or x.shape[-1] <= 1 else x.copy()


def _attention_forward(q: Array, k: Array, v: Array, causal: bool, scale: float) -> tuple[Array, Any]:
    _check(q.shape, k.shape, v.shape)
    q, k, v = _inner(q), _inner(k), _inner(v)
    out, logsumexp = kernels.of(q).attention(q, k, v, causal, scale)
    return out, (q, k, v, out, logsumexp)


def _attention_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    q, k, v, out, logsumexp = node.saved
    causal, scale = node.attributes["causal"], node.attributes["scale"]
    return kernels.of(g).attention_vjp(contiguous(g), q, k, v, out, logsumexp, causal, scale)


def _heads_first(x: Any, heads: int) -> Any:
    """(B,S,G,D) -> (B,H,S,D), each group repeated for the heads that share it."""
    batch, length, groups, width = x.shape
    x = x.permute(0, 2, 1, 3)
    if groups == heads:
        return x
    x = x.reshape(batch, groups, 1, length, width).broadcast_to((batch, groups, heads // groups, length, width))
    return x.reshape(batch, heads, length, width)


def composed(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[Any, Any, Any]:
    """Attention from primitive ops on tensors: (out, weights, mask). The oracle of the kernels, and the jvp's base."""
    heads, length, keys = q.shape[2], q.shape[1], k.shape[1]
    scores = _heads_first(q, heads) @ _heads_first(k, heads).swapaxes(-1, -2) * scale
    mask = (
        np.tril(np.ones((length, keys), dtype=bool), keys - length) if causal else np.ones((length, keys), dtype=bool)
    )
    # -inf would make NaN out of 0 * inf in products: the masked weights are multiplied by 0 after a finite fill.
    weights = (scores * mask + (mask.astype(int) - 1) * 10_000).softmax() * mask
    return (weights @ _heads_first(v, heads)).permute(0, 2, 1, 3), weights, mask


def _attention_jvp(inputs: Any, tangents: Any, output: Any, causal: bool, scale: float) -> Any:
    """With dS: dP = P * (dS - rowsum(P * dS)), d out = dP v + P dv. All scores at once: for checks and small models."""
    (q, k, v), (tq, tk, tv) = inputs, tangents
    heads = q.shape[2]
    _, weights, _ = composed(q, k, v, causal, scale)
    qh, kh, vh, tqh, tkh, tvh = [_heads_first(x, heads) for x in (q, k, v, tq, tk, tv)]
    dscores = (tqh @ kh.swapaxes(-1, -2) + qh @ tkh.swapaxes(-1, -2)) * scale
    scaled = weights * dscores
    dweights = scaled - weights * scaled.sum(dim=-1, keepdims=True)
    return (dweights @ vh + weights @ tvh).permute(0, 2, 1, 3)


def _attention_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    """Both products over all T x S pairs, also when causal (the usual convention), and the softmax."""
    (batch, length, heads, width), keys = inputs[0], inputs[1][1]
    return batch * heads * length * keys * (4 * width + 13)


ATTENTION = Op("attention", _attention_forward, _attention_vjp, _attention_jvp, _attention_flops)


def _split(packed: Any, heads: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """(B,T,(H+2G)*D), array or tensor -> the views (B,T,H+G,D) of queries and keys together, v, and all of it."""
    width = packed.shape[-1] // (heads + 2 * kv_heads)
    grouped = packed.reshape(*packed.shape[:2], heads + 2 * kv_heads, width)
    return grouped[:, :, : heads + kv_heads], grouped[:, :, heads + kv_heads :], grouped


def _packed_forward(
    qkv: Array, heads: int, kv_heads: int, causal: bool, scale: float, rotary: tuple[Array, Array] | None
) -> tuple[Array, Any]:
    if qkv.ndim != 3 or heads < 1 or kv_heads < 1 or qkv.shape[-1] % (heads + 2 * kv_heads):
        raise ValueError("qkv needs the shape (B, T, (heads + 2 * kv_heads) * width)")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot be shared evenly by {kv_heads} key/value heads")
    k = kernels.of(qkv)
    qk, v, _ = _split(contiguous(qkv), heads, kv_heads)
    if rotary is not None:
        _check_rotary(qk.shape, *rotary)
        qk = k.rotary(qk, *rotary)
    out, logsumexp = k.attention(qk[:, :, :heads], qk[:, :, heads:], v, causal, scale)
    return out.reshape(*qkv.shape[:2], heads * v.shape[-1]), (qk, v, out, logsumexp)


def _packed_vjp(node: Any, g: Array) -> tuple[Array]:
    qk, v, out, logsumexp = node.saved
    heads, kv_heads = node.attributes["heads"], node.attributes["kv_heads"]
    rotary = node.attributes["rotary"]
    k = kernels.of(g)
    dqkv = fresh(g, node.shapes[0])
    dqk, dv, _ = _split(dqkv, heads, kv_heads)
    rotated = dqk if rotary is None else fresh(g, dqk.shape)
    k.attention_vjp(
        contiguous(g).reshape(out.shape),
        qk[:, :, :heads],
        qk[:, :, heads:],
        v,
        out,
        logsumexp,
        node.attributes["causal"],
        node.attributes["scale"],
        rotated[:, :, :heads],
        rotated[:, :, heads:],
        dv,
    )
    if rotary is not None:
        cos, sin = rotary
        dqk[...] = k.rotary(rotated, cos, sin, inverse=True)
    return (dqkv,)


def _packed_jvp(
    inputs: Any, tangents: Any, output: Any, heads: int, kv_heads: int, causal: bool, scale: float, rotary: Any
) -> Any:
    parts = []
    for packed in (inputs[0], tangents[0]):
        qk, v, _ = _split(packed, heads, kv_heads)
        qk = qk if rotary is None else _rotated(qk, *rotary)
        parts.append((qk[:, :, :heads], qk[:, :, heads:], v))
    return _attention_jvp(parts[0], parts[1], output, causal, scale).reshape(output.shape)


def _packed_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    heads: int = attributes["heads"]
    batch, length, width = output
    flops = batch * length * length * (4 * width + 13 * heads)
    kv_heads: int = attributes["kv_heads"]
    turned = batch * length * (width // heads) * (heads + kv_heads)
    return flops if attributes["rotary"] is None else flops + 3 * turned


PACKED_ATTENTION = Op("packed_attention", _packed_forward, _packed_vjp, _packed_jvp, _packed_flops)


def _check_rotary(x: Shape, cos: Array, sin: Array) -> None:
    if len(x) != 4 or x[3] % 2 or cos.shape != (x[1], x[3] // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotary needs x (B,T,H,D) with D even, cos and sin (T, D/2); cos has {cos.shape}")


def _rotary_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, Any]:
    _check_rotary(x.shape, cos, sin)
    return kernels.of(x).rotary(_inner(x), cos, sin), None


def _rotary_vjp(node: Any, g: Array) -> tuple[Array]:
    return (kernels.of(g).rotary(_inner(g), node.attributes["cos"], node.attributes["sin"], inverse=True),)


ROTARY = Op("rotary", _rotary_forward, _rotary_vjp, ITSELF, elementwise(3))


def _rotated(x: Any, cos: Array, sin: Array) -> Any:
    return x.through(ROTARY, cos=cos, sin=sin)


def default_scale(width: int) -> float:
    """1 / sqrt(D): the scores of random q and k then have variance 1."""
    return 1 / math.sqrt(width) if width else 1.0
