"""Derivatives of functions: vjp, jvp, grad, jacobian and Hessian-vector products.

    forward mode  x, v ──► f ──► y, J v        one pass = one column of J; keeps no tape
    reverse mode  x ──► f ──► y, v ──► v^T J   one pass = one row of J; keeps the tape of f

`f` takes tensors and returns one tensor; `x` (and `v`) is one array or tensor, or a tuple of them: f(*x). Values of f
and tangents come back as tensors; what a backward computed comes back as arrays: reverse mode is not differentiated
again. Parameters that f uses are constants here: their `.grad` stays as it is. Second derivatives are reverse over
forward (`hvp`): jvp of an input that needs a gradient records its tangent on the tape.
Reference: Griewank and Walther, Evaluating Derivatives, chapters 3 and 5; Pearlmutter 1994 (hvp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dtrain.arrays import Array
from dtrain.autograd import gradients
from dtrain.tape import GraphError, enable_grad, mode, no_grad
from dtrain.tensor import Tensor

Function = Callable[..., Tensor]


def vjp(f: Function, x: Any) -> tuple[Tensor, Callable[[Any], Any]]:
    """(y, pullback): pullback(v) = v^T J, shaped like x; it may be called again and again."""
    leaves = _leaves(x, "vjp")
    with enable_grad():
        y = _value(f, leaves)

    def pullback(v: Any) -> Any:
        cotangent = _array(v, y.dtype)
        if cotangent.shape != y.shape:
            raise GraphError(f"pullback(v) needs v of shape {y.shape}, got {cotangent.shape}")
        found = gradients([(y, cotangent)], leaves, retain_graph=True)
        return tuple(found) if isinstance(x, tuple) else found[0]

    return y.detach(), pullback


def jvp(f: Function, x: Any, v: Any) -> tuple[Tensor, Tensor]:
    """(y, J v). Keeps no tape, unless an element of x is a tensor that requires a gradient: then both are taped."""
    if mode.forward:
        raise GraphError("jvp inside jvp: tangents have one level; for second derivatives use hvp(f, x, v)")
    given, directions = _tuple(x), _tuple(v)
    if len(given) != len(directions):
        raise GraphError(f"jvp needs one tangent for each of the {len(given)} inputs, got {len(directions)}")
    taped = mode.grad and any([isinstance(t, Tensor) and t.requires_grad for t in given])
    primals = []
    with enable_grad() if taped else no_grad():
        for t, direction in zip(given, directions, strict=True):
            # a new tensor on the same tape: the tangent must not stay on the caller's
            primal = t.reshape(t.shape) if taped and isinstance(t, Tensor) and t.requires_grad else Tensor(_array(t))
            primal.tangent = Tensor(_array(direction, primal.dtype))
            if primal.tangent.shape != primal.shape:
                raise GraphError(f"jvp needs a tangent of shape {primal.shape}, got {primal.tangent.shape}")
            primals.append(primal)
        mode.forward = True
        try:
            y = _value(f, primals)
        finally:
            mode.forward = False
    tangent, y.tangent = y.tangent, None
    for primal in primals:
        primal.tangent = None
    return y, Tensor(np.zeros_like(y.data)) if tangent is None else tangent


def grad(f: Function) -> Callable[..., Any]:
    """The function x -> gradient of f at x, for an f with one output element; takes f's arguments, f(*x)."""

    def gradient(*x: Any) -> Any:
        y, pullback = vjp(f, x)
        if y.size != 1:
            raise GraphError(
                f"grad needs a function with one output element; this one has shape {y.shape}: use jacobian"
            )
        found = pullback(np.ones_like(y.data))
        return found if len(x) > 1 else found[0]

    return gradient


def hvp(f: Function, x: Any, v: Any) -> Any:
    """H v for an f with one output element: the gradient of the directional derivative (reverse over forward)."""
    leaves = _leaves(x, "hvp")
    with enable_grad():
        y, slope = jvp(f, tuple(leaves), _tuple(v))
    if y.size != 1:
        raise GraphError(f"hvp needs a function with one output element; this one has shape {y.shape}")
    found = gradients([(slope, np.ones_like(slope.data))], leaves)
    return tuple(found) if isinstance(x, tuple) else found[0]


class Plan(NamedTuple):
    """How a Jacobian is computed: forward mode takes a pass per input element, reverse mode one per output element."""

    mode: str
    passes: int
    inputs: int
    outputs: int


def jacobian_plan(f: Function, x: Any, mode: str = "auto") -> Plan:
    """What `jacobian` will do: runs f once to learn the number of outputs."""
    with no_grad():
        y = _value(f, [Tensor(_array(t)) for t in _tuple(x)])
    return _plan(mode, sum([_array(t).size for t in _tuple(x)]), y.size)


def _plan(mode: str, inputs: int, outputs: int) -> Plan:
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f"jacobian: mode must be forward, reverse or auto, not {mode!r}")
    chosen = mode if mode != "auto" else "forward" if outputs > inputs else "reverse"
    return Plan(chosen, inputs if chosen == "forward" else outputs, inputs, outputs)


def jacobian(f: Function, x: Any, mode: str = "auto") -> Any:
    """J as an array of shape y.shape + x.shape (a tuple of them for a tuple x).

    mode: forward (a pass per input element), reverse (a pass per output element), or auto: the one with fewer passes.
    """
    arrays = [_array(t) for t in _tuple(x)]
    plan = jacobian_plan(f, x, mode)
    blocks = _columns(f, arrays) if plan.mode == "forward" else _rows(f, arrays, plan.outputs)
    return tuple(blocks) if isinstance(x, tuple) else blocks[0]


def _columns(f: Function, arrays: list[Array]) -> list[Array]:
    blocks = []
    for position, array in enumerate(arrays):
        directions = [np.zeros_like(a) for a in arrays]
        columns = []
        for index in np.ndindex(array.shape):
            directions[position][index] = 1
            columns.append(jvp(f, tuple(arrays), tuple([d.copy() for d in directions]))[1].data)
            directions[position][index] = 0
        if columns:
            blocks.append(np.stack(columns, axis=-1).reshape(*columns[0].shape, *array.shape))
        else:
            with no_grad():
                shape = _value(f, [Tensor(a) for a in arrays]).shape
            blocks.append(np.zeros_like(array, shape=(*shape, *array.shape)))
    return blocks


def _rows(f: Function, arrays: list[Array], outputs: int) -> list[Array]:
    y, pullback = vjp(f, tuple(arrays))
    blocks = [np.zeros_like(a, shape=(outputs, *a.shape)) for a in arrays]
    for row, index in enumerate(np.ndindex(y.shape)):
        v = np.zeros_like(y.data)
        v[index] = 1
        for block, gradient in zip(blocks, pullback(v), strict=True):
            block[row] = gradient
    return [b.reshape(y.shape + a.shape) for b, a in zip(blocks, arrays, strict=True)]


def _leaves(x: Any, what: str) -> list[Tensor]:
    if mode.forward:
        raise GraphError(
            f"{what} inside jvp: its result would carry no tangent; for second derivatives use hvp(f, x, v)"
        )
    if mode.grad and any([isinstance(t, Tensor) and t.requires_grad for t in _tuple(x)]):
        raise GraphError(
            f"{what} of a tensor that requires a gradient: a gradient is an array and would leave the outer tape. "
            "For second derivatives use hvp(f, x, v), or differentiate a jvp; else pass x.detach()"
        )
    return [Tensor(_array(t), requires_grad=True) for t in _tuple(x)]


def _value(f: Function, inputs: list[Tensor]) -> Tensor:
    y = f(*inputs)
    if not isinstance(y, Tensor):
        raise GraphError(f"the function must return one Tensor, not {type(y).__name__}")
    return y


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _array(x: Any, dtype: Any = None) -> Array:
    data = x.data if isinstance(x, Tensor) else x
    if isinstance(data, np.generic) or not hasattr(data, "dtype"):
        return np.asarray(data, dtype or np.float64)
    array: Array = data
    return array
