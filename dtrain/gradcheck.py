"""The gradient check: reverse and forward mode against central differences, in float64.

    (s(x + h e_i) - s(x - h e_i)) / 2h  ≈  (v^T J)_i            s = <v, f>, every element i of every input
    (f(x + h r) - f(x - h r)) / 2h      ≈  J r                  every element of the output, a random direction r

The error of the difference is O(h^2) + O(eps / h): h = 1e-6 times the size of x leaves about 1e-9 relative.
Second order checks the same for x -> J(x) r, whose reverse mode is reverse over forward (what `hvp` uses).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.autograd import gradients
from dtrain.tape import no_grad
from dtrain.tensor import Tensor
from dtrain.transforms import jvp


class GradcheckError(AssertionError):
    """A derivative that differs from its central difference; names the input, the element and both values."""


def gradcheck(
    function: Callable[..., Tensor],
    inputs: Any,
    *,
    step: float = 1e-6,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    forward: bool = True,
    second_order: bool = False,
    seed: int = 0,
) -> list[float]:
    """Check the derivatives of function(*inputs) and return the largest absolute error for each input.

    `inputs` is a float64 array or tensor or a tuple of them. Raises GradcheckError at the worst element where
    |analytic - numeric| > atol + rtol * |numeric|. `forward` also checks the jvp, `second_order` also its gradient.
    The function must be smooth at the inputs (no ties in max, no relu at 0).
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    arrays = [np.array(t.data if isinstance(t, Tensor) else t) for t in given]
    for position, array in enumerate(arrays):
        if array.dtype != np.float64:
            raise TypeError(
                f"gradcheck: input {position} is {array.dtype}; central differences need float64 (convert with .astype)"
            )
    random = np.random.default_rng(seed)
    worst = _reverse("reverse mode", function, arrays, random, step, rtol, atol)
    if forward or second_order:
        direction = tuple([random.standard_normal(a.shape) for a in arrays])
        if forward:
            _forward(function, arrays, direction, step, rtol, atol)
        if second_order:
            second = _reverse(
                "second order (reverse over forward)",
                lambda *xs: jvp(function, xs, direction)[1],
                arrays,
                random,
                step,
                rtol,
                atol,
            )
            worst = [max(pair) for pair in zip(worst, second, strict=True)]
    return worst


def _reverse(
    what: str,
    function: Callable[..., Tensor],
    arrays: list[Array],
    random: np.random.Generator,
    step: float,
    rtol: float,
    atol: float,
) -> list[float]:
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    y = function(*leaves)
    weights = random.standard_normal(y.shape)
    found = gradients([(y, weights)], leaves)
    worst = []
    for position, (array, analytic) in enumerate(zip(arrays, found, strict=True)):
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept, h = array[index], step * max(1.0, abs(float(array[index])))
            values = []
            for moved in (kept + h, kept - h):
                array[index] = moved
                # the difference of the outputs, and not of the sums, loses less to rounding
                values.append(_plain(function, arrays))
            array[index] = kept
            numeric[index] = (weights * (values[0] - values[1])).sum() / (2 * h)
        worst.append(_compare(f"{what}, input {position}", analytic, numeric, rtol, atol))
    return worst


def _forward(
    function: Callable[..., Tensor],
    arrays: list[Array],
    direction: tuple[Array, ...],
    step: float,
    rtol: float,
    atol: float,
) -> None:
    _, tangent = jvp(function, tuple(arrays), direction)
    ahead = _plain(function, [a + step * r for a, r in zip(arrays, direction, strict=True)])
    behind = _plain(function, [a - step * r for a, r in zip(arrays, direction, strict=True)])
    _compare("forward mode, output", tangent.data, (ahead - behind) / (2 * step), rtol, atol)


def _plain(function: Callable[..., Tensor], arrays: list[Array]) -> Array:
    with no_grad():
        value: Array = function(*[Tensor(a) for a in arrays]).data
    return value.copy()  # it may be a view of an input that is moved next


def _compare(what: str, analytic: Array, numeric: Array, rtol: float, atol: float) -> float:
    if analytic.shape != numeric.shape:
        raise GradcheckError(f"gradcheck, {what}: shape {analytic.shape} for a value of shape {numeric.shape}")
    if not numeric.size:
        return 0.0
    error = np.abs(analytic - numeric)
    excess = error - (atol + rtol * np.abs(numeric))
    bad = ~(excess <= 0)  # NaN is bad as well
    if bad.any():
        worst = np.where(np.isnan(excess), np.inf, excess).argmax()
        entry = tuple([int(i) for i in np.unravel_index(worst, numeric.shape)])
        raise GradcheckError(
            f"gradcheck, {what}, element {entry}: computed {analytic[entry]:.12g}, "
            f"central difference {numeric[entry]:.12g}, difference {error[entry]:.3g} "
            f"(allowed {atol:g} + {rtol:g} * |value|); {int(bad.sum())} of {numeric.size} elements differ"
        )
    return float(error.max())
