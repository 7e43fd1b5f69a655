"""`Tensor`: an array, its gradient, and its place on the tape; `apply`: the one door through which every op goes.

The methods are the operators of NumPy under NumPy's names (`dim` instead of `axis`, which means an axis of the mesh here).
Everything else that is differentiable stands in `dtrain/functional.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.autograd import GraphError, Node, backward, mode
from dtrain.op import Op

Number = int | float


class OpError(ValueError):
    """An op was given shapes, dtypes or attributes that it cannot take; names the op and the shapes."""


class Tensor:
    """An n-dimensional array that may need a gradient.

    `data` is a NumPy or CuPy array, `grad` an array of the same shape after a backward (None before), `requires_grad` says
    whether the tape records what is computed from it. A tensor that was computed has a `node`, a leaf has none.
    """

    __slots__ = ("__weakref__", "buffer", "data", "grad", "hooks", "node", "requires_grad", "tangent", "version")
    __array_ufunc__ = None  # `array * tensor` goes to __rmul__ instead of making an array of objects

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            raise TypeError("Tensor(data): data is a Tensor already; use data.detach() for a new leaf on the same array")
        self.data: Array = data if hasattr(data, "dtype") and hasattr(data, "ndim") else np.asarray(data)
        if requires_grad and self.data.dtype.kind in "iub":
            raise TypeError(f"requires_grad=True needs a floating dtype; this tensor has dtype {self.data.dtype}")
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.tangent: Tensor | None = None
        self.buffer: Array | None = None
        self.hooks: list[Callable[[Array], Array | None]] | None = None
        self.version = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        made = f", from {self.node.op.name}" if self.node else ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({self.data!r}{made})"

    def item(self) -> float:
        """The value of a tensor of one element as a Python number."""
        return float(self.data.item())

    def detach(self) -> Tensor:
        """A new leaf on the same memory that needs no gradient."""
        return Tensor(self.data)

    # The tape

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf), weighted by `gradient` (default 1, for scalars only), to `.grad` of every leaf."""
        if not self.requires_grad:
            raise GraphError(
                "backward() on a tensor that needs no gradient: none of its inputs has requires_grad=True, "
                "or it was computed under no_grad()"
            )
        if gradient is None:
            if self.size != 1:
                raise GraphError(f"backward() without a gradient needs one element; this tensor has shape {self.shape}")
            seed = self.data * 0 + 1
        else:
            seed = gradient.data if isinstance(gradient, Tensor) else gradient
            seed = seed if hasattr(seed, "dtype") else np.asarray(seed, self.dtype)
            if seed.shape != self.shape:
                raise GraphError(f"backward(gradient) needs the shape {self.shape}, got {seed.shape}")
        backward([(self, seed)], retain_graph=retain_graph)

    def on_gradient(self, callback: Callable[[Array], Array | None]) -> None:
        """Call `callback(gradient)` once per backward, when this tensor's gradient is complete; it may return another."""
        if not self.requires_grad:
            raise GraphError("on_gradient() on a tensor that needs no gradient")
        owner: Any = self if self.node is None else self.node
        owner.hooks = [*(owner.hooks or ()), callback]

    def zero_grad(self) -> None:
        """Forget the gradient. The next backward overwrites instead of adding."""
        self.grad = None

    # Changes in place: allowed where no gradient can go wrong

    def assign(self, value: Any) -> None:
        """Overwrite the values. A graph that used the old ones refuses its backward afterwards."""
        self[...] = value

    def __setitem__(self, index: Any, value: Any) -> None:
        if mode.grad and self.requires_grad:
            what = f"the result of {self.node.op.name}" if self.node else "a leaf that requires a gradient"
            raise GraphError(
                f"in-place change of {what} (shape {self.shape}) would be invisible to the tape: "
                "compute a new tensor, or wrap the change in `with no_grad():`"
            )
        self.data[index] = value.data if isinstance(value, Tensor) else value
        self.version += 1

    def __iadd__(self, other: Any) -> Tensor:
        self[...] = self.data + (other.data if isinstance(other, Tensor) else other)
        return self

    def __imul__(self, other: Any) -> Tensor:
        self[...] = self.data * (other.data if isinstance(other, Tensor) else other)
        return self


def apply(op: Op, *inputs: Tensor, **attributes: Any) -> Tensor:
    """Run one op on tensors; record it when an input needs a gradient; carry tangents in forward mode.

    Raises OpError with the op's name and all shapes when the op cannot take them. All inputs share one floating dtype.
    """
    arrays = [t.data for t in inputs]
    for array in arrays:
        if array.dtype is not arrays[0].dtype and array.dtype != arrays[0].dtype:
            raise OpError(f"{_call(op, arrays, attributes)}: the inputs have different dtypes; convert one with .astype()")
    try:
        data, saved = op.forward(*arrays, **attributes)
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise OpError(f"{_call(op, arrays, attributes)}: {error}") from error
    output = Tensor(data)
    if mode.grad:
        for t in inputs:
            if t.requires_grad:
                output.requires_grad = True
                output.node = Node(op, inputs, attributes, saved, data)
                break
    elif mode.captured is not None:
        for t in inputs:
            if t.requires_grad and t.node is None:
                mode.captured[id(t)] = t
    if mode.forward and any([t.tangent is not None for t in inputs]):
        output.tangent = _tangent(op, inputs, output, attributes)
    return output


def _tangent(op: Op, inputs: tuple[Tensor, ...], output: Tensor, attributes: dict[str, Any]) -> Tensor:
    if op.jvp is None:
        raise OpError(f"{op.name} has no jvp: it cannot be differentiated in forward mode; give its Op a jvp")
    tangents = tuple(Tensor(t.data * 0) if t.tangent is None else t.tangent for t in inputs)
    mode.forward = False  # the rule computes with the primals, which must not carry tangents once more
    try:
        tangent: Tensor = op.jvp(inputs, tangents, output, **attributes)
    finally:
        mode.forward = True
    if tangent.shape != output.shape:
        raise OpError(f"the jvp of {op.name} returned shape {tangent.shape} for an output of shape {output.shape}")
    return tangent


def _call(op: Op, arrays: Sequence[Array], attributes: dict[str, Any]) -> str:
    words = [f"{a.dtype}{list(a.shape)}" for a in arrays]
    for name, value in attributes.items():
        text = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") and hasattr(value, "dtype") else repr(value)
        words.append(f"{name}={text}")
    return f"{op.name}({', '.join(words)})"
