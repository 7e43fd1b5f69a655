"""Functions of one variable, element by element. Most vjps use the output: nothing else must be kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import Op, elementwise
from dtrain.ops.common import contiguous


def _saving_output(function: Any) -> Any:
    def forward(x: Array) -> tuple[Array, Array]:
        y = function(x)
        return y, y

    return forward


def _sigmoid(x: Array) -> Array:
    half = x.dtype.type(0.5)
    y: Array = half + half * np.tanh(half * x)  # never overflows
    return y


def erf(x: Array) -> Array:
    """The error function, to a few units in the last place.

    erf(x) = 2 Phi(z) - 1 with z = sqrt(2) x, and Phi is what the vjp of GELU has besides z * phi(z): so it runs on
    every backend. Near zero, where that difference cancels, the Maclaurin series.
    """
    z = contiguous(x) * x.dtype.type(math.sqrt(2))
    slope, _ = kernels.of(x).gelu_vjp(np.ones_like(z), z, None, False)
    density = np.exp(-(z * z) / 2) / x.dtype.type(math.sqrt(2 * math.pi))
    s = x * x
    series = x * (
        1 - s * (1 / 3 - s * (1 / 10 - s * (1 / 42 - s * (1 / 216 - s * (1 / 1320 - s * (1 / 9360 - s / 75600))))))
    )
    y: Array = np.where(np.abs(x) < 0.25, series * (2 / math.sqrt(math.pi)), 2 * (slope - z * density) - 1)
    return y.astype(x.dtype)


def _times(factor: Any) -> Any:
    """Jvp of f with f'(x) = factor(x, y), both tensors."""
    return lambda inputs, tangents, output: tangents[0] * factor(inputs[0], output)


ERF_SLOPE = 2 / math.sqrt(math.pi)

EXP = Op("exp", _saving_output(np.exp), lambda node, g: (g * node.saved,), _times(lambda x, y: y), elementwise(10))
LOG = Op(
    "log", lambda x: (np.log(x), x), lambda node, g: (g / node.saved,), lambda i, t, o: t[0] / i[0], elementwise(10)
)
SQRT = Op(
    "sqrt",
    _saving_output(np.sqrt),
    lambda node, g: (g / (node.saved * 2),),
    lambda i, t, o: t[0] / (o * 2),
    elementwise(2),
)
TANH = Op(
    "tanh",
    _saving_output(np.tanh),
    lambda node, g: (g * (1 - node.saved * node.saved),),
    _times(lambda x, y: 1 - y * y),
    elementwise(10),
)
SIGMOID = Op(
    "sigmoid",
    _saving_output(_sigmoid),
    lambda node, g: (g * node.saved * (1 - node.saved),),
    _times(lambda x, y: y * (1 - y)),
    elementwise(10),
)
ERF = Op(
    "erf",
    lambda x: (erf(x), x),
    lambda node, g: (g * np.exp(-node.saved * node.saved) * g.dtype.type(ERF_SLOPE),),
    _times(lambda x, y: (-(x * x)).exp() * ERF_SLOPE),
    elementwise(15),
)
RELU = Op(
    "relu",
    _saving_output(lambda x: np.maximum(x, x.dtype.type(0))),
    lambda node, g: (g * (node.saved > 0),),
    _times(lambda x, y: y.data > 0),
)
ABS = Op(
    "abs", lambda x: (np.abs(x), x), lambda node, g: (g * np.sign(node.saved),), _times(lambda x, y: np.sign(x.data))
)
SIN = Op(
    "sin",
    lambda x: (np.sin(x), x),
    lambda node, g: (g * np.cos(node.saved),),
    _times(lambda x, y: x.cos()),
    elementwise(10),
)
COS = Op(
    "cos",
    lambda x: (np.cos(x), x),
    lambda node, g: (g * -np.sin(node.saved),),
    _times(lambda x, y: -x.sin()),
    elementwise(10),
)
