"""Norms and softmax over the last dim.

The jvps are written out with tensors; they also define the second derivatives.
"""

from __future__ import annotations

from typing import Any

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import Op, elementwise
from dtrain.ops.common import contiguous


def _check_affine(x: Array, *vectors: Array | None) -> None:
    if not x.ndim or any([v is not None and v.shape != x.shape[-1:] for v in vectors]):
        raise ValueError("x (..., C) needs a weight and a bias of shape (C,)")


def _layer_norm_forward(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float
) -> tuple[Array, Any]:
    _check_affine(x, weight, bias)
    x = contiguous(x)
    y, mean, rstd = kernels.of(x).layer_norm(x, weight, bias, eps)
    return y, (x, weight, mean, rstd)


def _layer_norm_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    results = kernels.of(g).layer_norm_vjp(contiguous(g), *node.saved)
    return results[: len(node.needs)]


def _layer_norm_jvp(inputs: Any, tangents: Any, output: Any, eps: float) -> Any:
    """With h = (x - mean) rstd and c = t - mean(t): dh = rstd (c - h mean(h c))."""
    x, t = inputs[0], tangents[0]
    centred = x - x.mean(dim=-1, keepdims=True)
    rstd = ((centred * centred).mean(dim=-1, keepdims=True) + eps) ** -0.5
    h = centred * rstd
    c = t - t.mean(dim=-1, keepdims=True)
    tangent = rstd * (c - h * (h * c).mean(dim=-1, keepdims=True))
    if len(inputs) > 1:
        tangent = tangent * inputs[1] + h * tangents[1]
    return tangent + tangents[2] if len(inputs) > 2 else tangent


LAYER_NORM = Op("layer_norm", _layer_norm_forward, _layer_norm_vjp, _layer_norm_jvp, elementwise(8))


def _rms_norm_forward(x: Array, weight: Array | None = None, *, eps: float) -> tuple[Array, Any]:
    _check_affine(x, weight)
    x = contiguous(x)
    y, rstd = kernels.of(x).rms_norm(x, weight, eps)
    return y, (x, weight, rstd)


def _rms_norm_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    return kernels.of(g).rms_norm_vjp(contiguous(g), *node.saved)[: len(node.needs)]


def _rms_norm_jvp(inputs: Any, tangents: Any, output: Any, eps: float) -> Any:
    x, t = inputs[0], tangents[0]
    rstd = ((x * x).mean(dim=-1, keepdims=True) + eps) ** -0.5
    h = x * rstd
    tangent = rstd * (t - h * (h * t).mean(dim=-1, keepdims=True))
    return tangent * inputs[1] + h * tangents[1] if len(inputs) > 1 else tangent


RMS_NORM = Op("rms_norm", _rms_norm_forward, _rms_norm_vjp, _rms_norm_jvp, elementwise(5))


def _softmax_forward(x: Array) -> tuple[Array, Any]:
    y = kernels.of(x).softmax(contiguous(x))
    return y, y


def _softmax_vjp(node: Any, g: Array) -> tuple[Array]:
    return (kernels.of(g).softmax_vjp(contiguous(g), node.saved),)


def _softmax_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    scaled = output * tangents[0]
    return scaled - output * scaled.sum(dim=-1, keepdims=True)


SOFTMAX = Op("softmax", _softmax_forward, _softmax_vjp, _softmax_jvp, elementwise(13))


def _log_softmax_forward(x: Array) -> tuple[Array, Any]:
    y = kernels.of(x).log_softmax(contiguous(x))
    return y, y


def _log_softmax_vjp(node: Any, g: Array) -> tuple[Array]:
    return (kernels.of(g).log_softmax_vjp(contiguous(g), node.saved),)


def _log_softmax_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    return tangents[0] - (output.exp() * tangents[0]).sum(dim=-1, keepdims=True)


LOG_SOFTMAX = Op("log_softmax", _log_softmax_forward, _log_softmax_vjp, _log_softmax_jvp, elementwise(13))
