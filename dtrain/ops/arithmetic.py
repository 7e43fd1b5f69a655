"""Arithmetic with NumPy's broadcasting: the gradient of a stretched operand is summed back to its shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, elementwise
from dtrain.ops.common import unbroadcast


def _add_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (a, b), (needs_a, needs_b) = node.shapes, node.needs
    return unbroadcast(g, a) if needs_a else None, unbroadcast(g, b) if needs_b else None


ADD = Op("add", lambda a, b: (a + b, None), _add_vjp, ITSELF)


def _sub_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (a, b), (needs_a, needs_b) = node.shapes, node.needs
    return unbroadcast(g, a) if needs_a else None, unbroadcast(-g, b) if needs_b else None


SUB = Op("sub", lambda a, b: (a - b, None), _sub_vjp, ITSELF)


def _mul_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (a, b), (needs_a, needs_b) = node.saved, node.needs
    return unbroadcast(g * b, a.shape) if needs_a else None, unbroadcast(g * a, b.shape) if needs_b else None


def _mul_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    return tangents[0] * inputs[1] + inputs[0] * tangents[1]


MUL = Op("mul", lambda a, b: (a * b, (a, b)), _mul_vjp, _mul_jvp)

# By a Python number: nothing needs to be saved.
SCALE = Op("scale", lambda x, factor: (x * factor, None), lambda node, g: (g * node.attributes["factor"],), ITSELF)


def _div_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (a, b), (needs_a, needs_b) = node.saved, node.needs
    da = g / b
    return unbroadcast(da, a.shape) if needs_a else None, unbroadcast(-da * a / b, b.shape) if needs_b else None


def _div_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    return (tangents[0] - output * tangents[1]) / inputs[1]


DIV = Op("div", lambda a, b: (a / b, (a, b)), _div_vjp, _div_jvp)

NEG = Op("neg", lambda x: (-x, None), lambda node, g: (-g,), ITSELF)


def _pow_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    x, exponent = node.saved, node.attributes["exponent"]
    if exponent == 2:
        return (g * (x * 2),)
    return (g * (x ** (exponent - 1) * exponent) if exponent else np.zeros_like(g),)


def _pow_jvp(inputs: Any, tangents: Any, output: Any, exponent: float) -> Any:
    return tangents[0] * inputs[0] ** (exponent - 1) * exponent if exponent else tangents[0] * 0


POW = Op("pow", lambda x, exponent: (x**exponent, x), _pow_vjp, _pow_jvp, elementwise(2))


def _power_forward(x: Array, y: Array) -> tuple[Array, Any]:
    z = x**y
    return z, (x, y, z)


def _power_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (x, y, z), (needs_x, needs_y) = node.saved, node.needs
    dx = unbroadcast(g * y * x ** (y - 1), x.shape) if needs_x else None
    # d(x^y)/dy = x^y log x, which tends to 0 at x = 0 and does not exist below
    return dx, unbroadcast(g * z * np.log(np.where(x > 0, x, x.dtype.type(1))), y.shape) if needs_y else None


def _power_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    (x, y), (tx, ty) = inputs, tangents
    positive = (x.data > 0).astype(x.dtype)
    return tx * y * x ** (y - 1) + ty * output * (x * positive + (1 - positive)).log()


POWER = Op("power", _power_forward, _power_vjp, _power_jvp, elementwise(2))


def _maximum_forward(a: Array, b: Array) -> tuple[Array, Any]:
    return np.maximum(a, b), (a >= b, a.shape, b.shape)


def _maximum_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    first, a, b = node.saved  # equal elements: the first operand gets the gradient
    return unbroadcast(g * first, a), unbroadcast(g * ~first, b)


def _maximum_jvp(inputs: Any, tangents: Any, output: Any) -> Any:
    first = inputs[0].data >= inputs[1].data
    return tangents[0] * first + tangents[1] * ~first


MAXIMUM = Op("maximum", _maximum_forward, _maximum_vjp, _maximum_jvp)


def _where_vjp(node: Any, g: Array) -> tuple[Array, ...]:
    mask, zero = node.attributes["mask"], g.dtype.type(0)
    return unbroadcast(np.where(mask, g, zero), node.shapes[0]), unbroadcast(np.where(mask, zero, g), node.shapes[1])


WHERE = Op("where", lambda x, y, mask: (np.where(mask, x, y), None), _where_vjp, ITSELF, elementwise(0))


def _astype_forward(x: Array, dtype: Any) -> tuple[Array, Any]:
    return x.astype(dtype), x.dtype


ASTYPE = Op("astype", _astype_forward, lambda node, g: (g.astype(node.saved),), ITSELF, elementwise(0))
