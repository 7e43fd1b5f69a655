"""What an op is: a forward on arrays, its vector-Jacobian product, and (for forward mode) its Jacobian-vector product.

An op is one row of a table (`dtrain/ops/`), or a row that a user writes; the engine (`dtrain/autograd.py`) knows none.

    forward(*arrays, **attributes)                    -> (output array, saved)    saved: whatever the vjp needs
    vjp(node, g)                                      -> one array or None per input; has node.saved, node.needs,
                                                         node.attributes, node.shapes
    jvp(inputs, tangents, output, **attributes)       -> tangent of the output, written with tensors: so it can be
                                                         differentiated again (Hessian-vector products);
                                                         ITSELF for a linear op: the op of the tangents
    flops(input shapes, output shape, attributes)     -> floating-point operations of the forward

Arrays that are never differentiated (token ids, masks, shapes) are attributes, not inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


def elementwise(factor: int = 1) -> Callable[[tuple[Shape, ...], Shape, dict[str, Any]], int]:
    """FLOP count of an op that spends `factor` operations on every element of its output."""
    return lambda inputs, output, attributes: factor * math.prod(output)


def ITSELF(*_: Any, **__: Any) -> Any:
    """Stands for "the tangent of the output is this op applied to the tangents"; the engine does it, without a call."""
    raise AssertionError("the engine applies a linear op to the tangents itself")


_one_per_element = elementwise()


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One differentiable operation; apply it with `dtrain.tensor.apply(op, *tensors, **attributes)`."""

    name: str
    forward: Callable[..., tuple[Any, Any]]
    vjp: Callable[..., tuple[Any, ...]]
    jvp: Callable[..., Any] | None = None
    flops: Callable[[tuple[Shape, ...], Shape, dict[str, Any]], int] = _one_per_element
    splits: bool = False
    """Whether the vjp computes for each input only what `node.needs` says, so that two calls share the work."""
    start: Callable[[Any, Any], Callable[[], tuple[Any, ...]]] | None = None
    """The vjp begun: (node, g) -> a function that ends it and returns what vjp does. The walk computes in between the
    gradients of the parameters that this op's output was multiplied with, for which nobody waits."""
