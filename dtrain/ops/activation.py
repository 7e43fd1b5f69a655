"""Activations and what is fused around them: bias + GELU, SwiGLU, bias + residual, dropout."""

from __future__ import annotations

import math
from typing import Any

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, elementwise
from dtrain.ops.common import contiguous, rows


def _gelu_forward(x: Array, bias: Array | None = None, *, approximate: bool) -> tuple[Array, Any]:
    """GELU of x (..., C) + bias (C,)."""
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError("the bias needs the shape of the last dim of x")
    x = contiguous(x)
    return kernels.of(x).gelu(x, bias, approximate), (x, bias)


def _gelu_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    x, bias = node.saved
    dx, dbias = kernels.of(g).gelu_vjp(contiguous(g), x, bias, node.attributes["approximate"])
    return (dx,) if bias is None else (dx, dbias)


def _gelu_jvp(inputs: Any, tangents: Any, output: Any, approximate: bool) -> Any:
    """GELU'(z) = gate + z * gate', with the gate Phi(z), or 1/2 + tanh(u)/2 of u = sqrt(2/pi) (z + 0.044715 z^3)."""
    z, t = (inputs[0], tangents[0]) if len(inputs) == 1 else (inputs[0] + inputs[1], tangents[0] + tangents[1])
    if approximate:
        root = math.sqrt(2 / math.pi)
        gate = ((z + z * z * z * 0.044715) * root).tanh() * 0.5 + 0.5
        slope = gate * (1 - gate) * (z * z * (3 * 0.044715) + 1) * (2 * root)
    else:
        gate = (z * math.sqrt(0.5)).erf() * 0.5 + 0.5
        slope = (z * z * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
    return t * (gate + z * slope)


GELU = Op("gelu", _gelu_forward, _gelu_vjp, _gelu_jvp, elementwise(15))


def _silu_forward(x: Array) -> tuple[Array, Any]:
    x = contiguous(x)
    return kernels.of(x).silu(x), x


def _silu_vjp(node: Any, g: Array) -> tuple[Array]:
    return (kernels.of(g).silu_vjp(contiguous(g), node.saved),)


def _silu_slope(x: Any) -> Any:
    gate = x.sigmoid()
    return gate * (x * (1 - gate) + 1)


def _silu_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    return tangents[0] * _silu_slope(inputs[0])


SILU = Op("silu", _silu_forward, _silu_vjp, _silu_jvp, elementwise(12))


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    """silu(gate) * up."""
    if gate.shape != up.shape:
        raise ValueError("gate and up need the same shape")
    gate, up = contiguous(gate), contiguous(up)
    return kernels.of(gate).swiglu(gate, up), (gate, up)


def _swiglu_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    return kernels.of(g).swiglu_vjp(contiguous(g), *node.saved)


def _swiglu_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    gate, up = inputs
    return tangents[0] * _silu_slope(gate) * up + gate * gate.sigmoid() * tangents[1]


SWIGLU = Op("swiglu", _swiglu_forward, _swiglu_vjp, _swiglu_jvp, elementwise(13))


def _bias_residual_forward(x: Array, residual: Array, bias: Array | None = None) -> tuple[Array, Any]:
    """X (..., C) + bias (C,) + residual (..., C)."""
    if x.shape != residual.shape or (bias is not None and bias.shape != x.shape[-1:]):
        raise ValueError("x and residual need the same shape (..., C), the bias (C,)")
    return kernels.of(x).bias_residual(contiguous(x), bias, contiguous(residual)), None


def _bias_residual_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    if len(node.needs) == 2:
        return g, g
    return g, g, kernels.of(g).column_sum(contiguous(rows(g))) if node.needs[2] else None


BIAS_RESIDUAL = Op("bias_residual", _bias_residual_forward, _bias_residual_vjp, ITSELF, elementwise(2))


def _dropout(x: Array, p: float, key: int, row_ids: Array) -> Array:
    flat = contiguous(rows(x))
    return kernels.of(x).dropout(flat, p, key, row_ids).reshape(x.shape)


def _dropout_forward(x: Array, p: float, key: int, row_ids: Array) -> tuple[Array, Any]:
    """X (..., C); the mask of a row depends on (key, its row id) alone, never on where the row is computed."""
    if not 0 <= p <= 1:
        raise ValueError("p must lie in [0, 1]")
    if x.ndim == 0 or row_ids.shape != (math.prod(x.shape[:-1]),):
        raise ValueError("x (..., C) needs one row id per row: row_ids of shape (rows,)")
    return _dropout(x, p, key, row_ids), None


DROPOUT = Op("dropout", _dropout_forward, lambda node, g: (_dropout(g, **node.attributes),), ITSELF, elementwise(1))
