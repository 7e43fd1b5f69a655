"""Differentiable functions on tensors, each one row of the table of ops (`import dtrain.functional as F`).

Arrays that are never differentiated (ids, targets, masks, tables of angles) are passed as NumPy or CuPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.ops import activation, arithmetic, bag, loss, normalization, shape
from dtrain.ops import attention as attentions
from dtrain.ops import linear as linears
from dtrain.recompute import checkpoint
from dtrain.tensor import Tensor, apply

__all__ = [
    "abs", "attention", "bias_residual", "checkpoint", "concat", "cos", "cross_entropy", "dropout", "embedding",
    "embedding_bag", "erf", "exp", "gather", "gelu", "layer_norm", "linear", "log", "log_softmax", "logsumexp",
    "maximum", "packed_attention",
    "relu", "rms_norm", "rotary", "sigmoid", "silu", "sin", "softmax", "sqrt", "stack", "swiglu", "tanh", "where",
]  # fmt: skip

exp, log, sqrt, tanh, sigmoid = Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh, Tensor.sigmoid
erf, relu, abs, sin, cos = Tensor.erf, Tensor.relu, Tensor.abs, Tensor.sin, Tensor.cos


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _array(x: Any) -> Array:
    array: Array = x.data if isinstance(x, Tensor) else x if hasattr(x, "dtype") else np.asarray(x)
    return array


# ---- linear maps ----


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X (..., I), weight (O, I), bias (O,) -> x @ weight.T + bias, (..., O)."""
    return apply(linears.LINEAR, x, weight) if bias is None else apply(linears.LINEAR, x, weight, bias)


def embedding(weight: Tensor, ids: Any) -> Tensor:
    """Weight (V, C), ids (...) of integers in [0, V) -> (..., C)."""
    return apply(linears.EMBEDDING, weight, ids=_array(ids))


def embedding_bag(weight: Tensor, ids: Any) -> Tensor:
    """Weight (V, C), ids (K, L) of integers in [0, V), -1 for none -> the sum of the rows of each bag (K, C)."""
    return apply(bag.EMBEDDING_BAG, weight, ids=_array(ids))


def gather(x: Tensor, indices: Any, dim: int) -> Tensor:
    """Pick along one dim, as np.take_along_axis: indices has the ndim of x and gives the shape of the result."""
    return apply(shape.GATHER, x, indices=_array(indices), dim=dim)


# ---- norms, softmax, loss ----


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """X (..., C), weight and bias (C,): (x - mean) / sqrt(var + eps) * weight + bias over the last dim."""
    if weight is None and bias is not None:
        raise ValueError("layer_norm: a bias needs a weight")
    return apply(normalization.LAYER_NORM, x, *_given(weight, bias), eps=eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """X (..., C), weight (C,): x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    return apply(normalization.RMS_NORM, x, *_given(weight), eps=eps)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) over `dim`."""
    return x.softmax() if dim in (-1, x.ndim - 1) else x.swapaxes(dim, -1).softmax().swapaxes(dim, -1)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """log(softmax(x)) over `dim`."""
    return x.log_softmax() if dim in (-1, x.ndim - 1) else x.swapaxes(dim, -1).log_softmax().swapaxes(dim, -1)


def logsumexp(x: Tensor, dim: int = -1, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) over `dim`, without overflow for any finite x."""
    top = x.data.max(axis=dim, keepdims=True)
    shifted = (x - top).exp().sum(dim=dim, keepdims=keepdims).log()
    result: Tensor = shifted + (top if keepdims else top.squeeze(dim))
    return result


def cross_entropy(logits: Tensor, targets: Any, ignore: int = -1, reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[target]; logits (..., V), targets (...) of integers, `ignore` marks those that do not count.

    reduction: "mean" over the targets that count (0 when there are none), "sum", or "none" for (...).
    """
    return apply(loss.CROSS_ENTROPY, logits, targets=_array(targets), ignore=ignore, reduction=reduction)


# ---- activations ----


def gelu(x: Tensor, bias: Tensor | None = None, approximate: bool = False) -> Tensor:
    """GELU of x (..., C) + bias (C,), exact or in the tanh form of GPT-2."""
    return apply(activation.GELU, x, *_given(bias), approximate=approximate)


def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x)."""
    return apply(activation.SILU, x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, as in Llama."""
    return apply(activation.SWIGLU, gate, up)


def bias_residual(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """X + bias + residual in one pass; x and residual (..., C), bias (C,)."""
    return apply(activation.BIAS_RESIDUAL, x, residual, *_given(bias))


def dropout(x: Tensor, p: float, key: int, row_ids: Any) -> Tensor:
    """Zero each element of x (..., C) with probability p, scale the rest by 1 / (1 - p).

    The mask is a function of (key, row id, column): row_ids (rows,) are global, so no layout changes it.
    """
    return apply(activation.DROPOUT, x, p=p, key=key, row_ids=_array(row_ids)) if p else x


# ---- attention ----


def _angles(x: Tensor, table: Any) -> Array:
    """A table of cosines or sines beside x; for half-precision x it stays in float32."""
    return _array(table).astype(np.float32 if x.data.dtype.itemsize == 2 else x.data.dtype, copy=False)


def rotary(x: Tensor, cos: Any, sin: Any) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B,T,H,D) by the angles whose cos and sin (T, D/2) are given."""
    return apply(attentions.ROTARY, x, cos=_angles(x, cos), sin=_angles(x, sin))


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """Q (B,T,H,D), k and v (B,S,G,D), G divides H -> (B,T,H,D); query i sees keys up to i + S - T when causal."""
    scale = attentions.default_scale(q.shape[-1]) if scale is None else scale
    return apply(attentions.ATTENTION, q, k, v, causal=causal, scale=scale)


def packed_attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    causal: bool = True,
    scale: float | None = None,
    rotary: tuple[Any, Any] | None = None,
) -> Tensor:
    """Qkv (B, T, (H+2G)*D) = [q heads | k heads | v heads] -> (B, T, H*D), without copies of heads.

    rotary: (cos, sin), each (T, D/2), turns q and k first.
    """
    scale = attentions.default_scale(qkv.shape[-1] // max(heads + 2 * kv_heads, 1)) if scale is None else scale
    angles = None if rotary is None else (_angles(qkv, rotary[0]), _angles(qkv, rotary[1]))
    return apply(
        attentions.PACKED_ATTENTION, qkv, heads=heads, kv_heads=kv_heads, causal=causal, scale=scale, rotary=angles
    )


# ---- several tensors ----


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along an existing dim."""
    return apply(shape.CONCAT, *tensors, dim=dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along a new dim."""
    return apply(shape.STACK, *tensors, dim=dim)


def where(mask: Any, x: Any, y: Any) -> Tensor:
    """X where the mask (an array of booleans) is true, else y; one of x and y may be a number or an array."""
    if not isinstance(x, Tensor):
        x = y.constant(x)
    return apply(arithmetic.WHERE, x, y if isinstance(y, Tensor) else x.constant(y), mask=_array(mask))


def maximum(x: Tensor, y: Any) -> Tensor:
    """The larger of both, element by element."""
    return apply(arithmetic.MAXIMUM, x, y if isinstance(y, Tensor) else x.constant(y))
