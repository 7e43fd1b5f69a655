# ruff: noqa: D403 - docstrings that begin with a formula
# Operators on arrays of any dtype are typed Any:
# mypy: disable-error-code="no-any-return"
"""The reference kernels: plain array formulas, one pass after the other; the oracle of the fused backends.

The formulas call `np.` functions only, and NumPy hands them to CuPy when the arrays are CuPy's
(`__array_ufunc__`, `__array_function__`: NEP 13 and NEP 18), so the CUDA backend takes over what it does not speed up.
Interface and conventions: `dtrain/kernels/interface.py`. Attention: `reference_attention.py`.
"""

import math
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels.constants import GELU_CUBIC, GELU_SLOPE
from dtrain.kernels.interface import Maybe, check_row
from dtrain.kernels.philox import philox, threshold
from dtrain.kernels.reference_attention import attention, attention_vjp, rotary

__all__ = ["attention", "attention_vjp", "rotary"]


# ---- normalisation ----


def layer_norm(x: Array, weight: Maybe, bias: Maybe, eps: float) -> tuple[Array, Array, Array]:
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps). Ba, Kiros, Hinton, arXiv:1607.06450."""
    mean = x.mean(axis=-1)
    centred = x - mean[..., None]
    rstd = 1 / np.sqrt(np.square(centred).mean(axis=-1) + eps)
    return _affine(centred * rstd[..., None], weight, bias), mean, rstd


def layer_norm_vjp(g: Array, x: Array, weight: Maybe, mean: Array, rstd: Array) -> tuple[Array, Maybe, Array]:
    """With h = (x - mean) * rstd, s = g * weight: dx = rstd * (s - mean(s) - h * mean(s * h)), dweight = sum(g * h)."""
    normal = (x - mean[..., None]) * rstd[..., None]
    scaled = g if weight is None else g * weight
    dx = scaled - scaled.mean(axis=-1, keepdims=True) - normal * (scaled * normal).mean(axis=-1, keepdims=True)
    return dx * rstd[..., None], None if weight is None else column_sum(g * normal), column_sum(g)


def rms_norm(x: Array, weight: Maybe, eps: float) -> tuple[Array, Array]:
    """y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). Zhang, Sennrich, arXiv:1910.07467."""
    rstd = 1 / np.sqrt(np.square(x).mean(axis=-1) + eps)
    return _affine(x * rstd[..., None], weight, None), rstd


def rms_norm_vjp(g: Array, x: Array, weight: Maybe, rstd: Array) -> tuple[Array, Maybe]:
    """With h = x * rstd and s = g * weight: dx = rstd * (s - h * mean(s * h)), dweight = sum(g * h)."""
    normal = x * rstd[..., None]
    scaled = g if weight is None else g * weight
    dx = (scaled - normal * (scaled * normal).mean(axis=-1, keepdims=True)) * rstd[..., None]
    return dx, None if weight is None else column_sum(g * normal)


def _affine(x: Array, weight: Maybe, bias: Maybe) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


# ---- elementwise ----


def column_sum(g: Array) -> Array:
    """(..., C) -> (C,): the gradient of a bias."""
    return g.reshape(-1, g.shape[-1]).sum(axis=0)


def bias_residual(x: Array, bias: Maybe, residual: Array) -> Array:
    """x + bias + residual."""
    return x + residual if bias is None else x + bias + residual


def gelu(x: Array, bias: Maybe, approximate: bool) -> Array:
    """z * Phi(z) of z = x + bias, Phi the normal distribution or its tanh form. Hendrycks, Gimpel, arXiv:1606.08415."""
    z = x if bias is None else x + bias
    return z * (_tanh_gate(z) if approximate else _normal_cdf(z))


def gelu_vjp(g: Array, x: Array, bias: Maybe, approximate: bool) -> tuple[Array, Maybe]:
    """dx = g * (Phi(z) + z * Phi'(z)); dbias = column_sum(dx)."""
    z = x if bias is None else x + bias
    if approximate:
        gate = _tanh_gate(z)
        slope = gate * (1 - gate) * (2 * GELU_SLOPE) * (1 + 3 * GELU_CUBIC * z * z)
    else:
        gate = _normal_cdf(z)
        slope = np.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    dx = g * (gate + z * slope)
    return dx, None if bias is None else column_sum(dx)


def _tanh_gate(z: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(GELU_SLOPE * (z + GELU_CUBIC * z * z * z))


def _normal_cdf(z: Array) -> Array:
    # NumPy has no erfc, and SciPy is not a dependency: element by element, slow.
    return np.frompyfunc(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)), 1, 1)(z).astype(z.dtype)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * _sigmoid(x)


def silu_vjp(g: Array, x: Array) -> Array:
    """g * s * (1 + x * (1 - s)), s = sigmoid(x)."""
    gate = _sigmoid(x)
    return g * gate * (1 + x * (1 - gate))


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up. Shazeer, arXiv:2002.05202."""
    return silu(gate) * up


def swiglu_vjp(g: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """The product rule."""
    return silu_vjp(g * up, gate), g * silu(gate)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # never overflows


# ---- softmax family ----


def softmax(x: Array) -> Array:
    """exp(x - max) / sum(exp(x - max)) over the last dim."""
    y = np.exp(x - _row_max(x))
    y /= y.sum(axis=-1, keepdims=True)
    return y


def softmax_vjp(g: Array, y: Array) -> Array:
    """y * (g - sum(g * y))."""
    return y * (g - (g * y).sum(axis=-1, keepdims=True))


def log_softmax(x: Array) -> Array:
    """x - logsumexp(x) over the last dim."""
    shifted = x - _row_max(x)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_softmax_vjp(g: Array, y: Array) -> Array:
    """g - exp(y) * sum(g)."""
    return g - np.exp(y) * g.sum(axis=-1, keepdims=True)


def cross_entropy(logits: Array, targets: Array, ignore: int) -> tuple[Array, Array]:
    """losses (R,) = logsumexp(logits) - logits[target], 0 where the target is `ignore`; logsumexp (R,)."""
    rows, safe, kept = _targets(logits, targets, ignore)
    top = _row_max(logits)[..., 0]
    logarithm = np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    losses = logarithm + (top - logits[rows, safe])  # not logsumexp - logit: two large numbers may be near each other
    return np.where(kept, losses, logits.dtype.type(0)), logarithm + top


def cross_entropy_vjp(g: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int) -> Array:
    """(softmax(logits) - onehot(targets)) * g, and 0 in the ignored rows."""
    rows, safe, kept = _targets(logits, targets, ignore)
    dlogits = np.exp(logits - logsumexp[:, None])
    dlogits[rows, safe] -= 1
    dlogits *= g[:, None]
    dlogits[~kept] = 0
    return dlogits


def _targets(logits: Array, targets: Array, ignore: int) -> tuple[Array, Array, Array]:
    kept = targets != ignore
    safe = np.where(kept, targets, 0)
    check_row(safe, "targets", logits.shape[1])
    return np.cumsum(np.ones_like(safe)) - 1, safe, kept  # the row numbers, on the device of the targets


def _row_max(x: Array) -> Array:
    return x.max(axis=-1, keepdims=True) if x.shape[-1] else x.sum(axis=-1, keepdims=True)  # no maximum of nothing


# ---- dropout and embedding ----


def dropout(x: Array, p: float, key: int, row_ids: Array) -> Array:
    """Element (row r, column j) is kept, and scaled by 1 / (1 - p), iff word j % 4 of Philox at the counter
    (row_ids[r] low, row_ids[r] high, j // 4, 0) is >= p * 2^32. The vjp is the same call on g."""
    if p >= 1:
        return np.zeros_like(x)
    columns = x.shape[-1]
    ids = row_ids.astype(np.uint64)[:, None]
    blocks = -(-columns // 4)
    block = np.cumsum(np.ones_like(ids, shape=(1, blocks)), axis=1, dtype=np.uint64) - np.uint64(1)
    words = philox((ids & 0xFFFFFFFF, ids >> 32, block, 0 * block), (key & 0xFFFFFFFF, key >> 32))
    keep = np.stack(words, axis=-1).reshape(ids.size, 4 * blocks)[:, :columns] >= threshold(p)
    return np.where(keep.reshape(x.shape), x * (1 / (1 - float(p))), x.dtype.type(0))


def embedding(weight: Array, ids: Array) -> Array:
    """weight (V,C), ids (...) -> (..., C)."""
    check_row(ids, "ids", len(weight))
    return weight[ids]


def embedding_vjp(g: Array, ids: Array, num_rows: int, out: Maybe = None) -> Array:
    """dweight (V,C): the rows of g added up by id in the order they come; into `out` where given."""
    check_row(ids, "ids", num_rows)
    if out is None:
        out = np.zeros_like(g, shape=(num_rows, g.shape[-1]))
    np.add.at(out, ids.reshape(-1), g.reshape(-1, g.shape[-1]))
    return out


# ---- optimizers ----


def sum_squares(x: Array) -> float:
    """The sum of x^2, accumulated in float64."""
    return float(np.square(x, dtype=np.float64).sum())


def sgd(p: Array, g: Array, m: Maybe, lr: float, momentum: float, nesterov: bool, decay: float, scale: float) -> None:
    """m = momentum * m + g; p -= lr * (g + momentum * m if nesterov else m). Without m: p -= lr * g."""
    step = g * float(scale) + p * float(decay)
    if m is not None:
        m *= float(momentum)
        m += step
        step = step + m * float(momentum) if nesterov else m
    p -= step * float(lr)


def adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
    correction1: float,
    correction2: float,
    scale: float,
) -> None:
    """p -= lr * (m^ / (sqrt(v^) + eps) [+ decay * p]), m^ = m / correction1, v^ = v / correction2.

    Kingma, Ba, arXiv:1412.6980; decoupled decay (AdamW): Loshchilov, Hutter, arXiv:1711.05101.
    """
    g = g * float(scale) if decoupled else g * float(scale) + p * float(decay)
    step = _adam_moments(g, m, v, beta1, beta2, eps, correction1, correction2)
    if decoupled:
        step += p * float(decay)
    p -= step * float(lr)


def adam_direction(
    g: Array,
    m: Array,
    v: Array,
    p: Array,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    correction1: float,
    correction2: float,
    scale: float,
    out: Array,
) -> Array:
    """out = m^ / (sqrt(v^) + eps) + decay * p: LAMB before its layer-wise ratio. You et al., arXiv:1904.00962."""
    out[...] = _adam_moments(g * float(scale), m, v, beta1, beta2, eps, correction1, correction2) + p * float(decay)
    return out


def _adam_moments(
    g: Array, m: Array, v: Array, beta1: Any, beta2: Any, eps: Any, correction1: Any, correction2: Any
) -> Array:
    m *= float(beta1)
    m += g * (1 - float(beta1))
    v *= float(beta2)
    v += g * g * (1 - float(beta2))
    return m / float(correction1) / (np.sqrt(v / float(correction2)) + float(eps))


def axpy(p: Array, u: Array, a: float) -> None:
    """p += a * u."""
    p += u * float(a)
