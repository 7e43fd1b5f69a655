"""`Tensor`: an array, its gradient, and its place on the tape; `apply`: the one door through which every op goes.

The methods are the operators of NumPy under NumPy's names (`dim` instead of `axis`: that is an axis of the mesh here).
Everything else that is differentiable stands in `dtrain/functional.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.autograd import backward
from dtrain.op import ITSELF, Op
from dtrain.ops import arithmetic, elementwise, linear, normalization, reduction, shape
from dtrain.tape import GraphError, Node, mode

Dims = int | tuple[int, ...] | None


class OpError(ValueError):
    """An op was given shapes, dtypes or attributes that it cannot take; names the op and the shapes."""


class Tensor:
    """An n-dimensional array that may need a gradient.

    `data` is a NumPy or CuPy array, `grad` an array of the same shape after a backward (None before), `requires_grad`
    says whether the tape records what is computed from it. A tensor that was computed has a `node`, a leaf has none.
    """

    __slots__ = ("__weakref__", "buffer", "data", "grad", "hooks", "node", "requires_grad", "tangent", "version")
    trained = False  # a parameter: nobody waits for its gradient, see `split_backward`
    __array_ufunc__ = None  # `array * tensor` goes to __rmul__ instead of making an array of objects

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Array = data if type(data) is np.ndarray else _array(data)
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
        dims: tuple[int, ...] = self.data.shape
        return dims

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.data.dtype
        return dtype

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.data)  # NumPy's rule: of one element only

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self.requires_grad:
            raise GraphError("a tensor that requires a gradient would leave the tape as an array: use .data knowingly")
        return np.array(self.data, dtype, copy=copy)

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
            seed = np.ones_like(self.data)
        else:
            seed = gradient.data if isinstance(gradient, Tensor) else gradient
            seed = seed if hasattr(seed, "dtype") else np.asarray(seed, self.dtype)
            if seed.shape != self.shape:
                raise GraphError(f"backward(gradient) needs the shape {self.shape}, got {seed.shape}")
        backward([(self, seed)], retain_graph=retain_graph)

    def on_gradient(self, callback: Callable[[Array], Array | None]) -> None:
        """Call `callback(gradient)` once per backward, when the gradient is complete; it may return another one."""
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
        owner = self.node or self
        owner.version += 1

    def __iadd__(self, other: Any) -> Tensor:
        self[...] = self.data + (other.data if isinstance(other, Tensor) else other)
        return self

    def __isub__(self, other: Any) -> Tensor:
        self[...] = self.data - (other.data if isinstance(other, Tensor) else other)
        return self

    def __imul__(self, other: Any) -> Tensor:
        self[...] = self.data * (other.data if isinstance(other, Tensor) else other)
        return self

    def __itruediv__(self, other: Any) -> Tensor:
        self[...] = self.data / (other.data if isinstance(other, Tensor) else other)
        return self

    # Operators

    def through(self, op: Op, *others: Tensor, **attributes: Any) -> Tensor:
        """`apply(op, self, *others, **attributes)`: how a jvp rule reaches an op that has no method."""
        return apply(op, self, *others, **attributes)

    def constant(self, other: Any) -> Tensor:
        """A number, or an array of integers, booleans or this dtype, as a constant beside this tensor."""
        if isinstance(other, (int, float)) or not hasattr(other, "dtype") or other.dtype.kind in "iub":
            if type(self.data) is np.ndarray:
                return Tensor(np.asarray(other, self.data.dtype))
            return Tensor(np.asarray(other, self.data.dtype, like=self.data))
        return Tensor(other)

    def __add__(self, other: Any) -> Tensor:
        return apply(arithmetic.ADD, self, other if isinstance(other, Tensor) else self.constant(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return apply(arithmetic.SUB, self, other if isinstance(other, Tensor) else self.constant(other))

    def __rsub__(self, other: Any) -> Tensor:
        return apply(arithmetic.SUB, self.constant(other), self)

    def __mul__(self, other: Any) -> Tensor:
        if isinstance(other, (int, float)):
            return apply(arithmetic.SCALE, self, factor=self.data.dtype.type(other))
        return apply(arithmetic.MUL, self, other if isinstance(other, Tensor) else self.constant(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        return apply(arithmetic.DIV, self, other if isinstance(other, Tensor) else self.constant(other))

    def __rtruediv__(self, other: Any) -> Tensor:
        return apply(arithmetic.DIV, self.constant(other), self)

    def __neg__(self) -> Tensor:
        return apply(arithmetic.NEG, self)

    def __pow__(self, other: Any) -> Tensor:
        if isinstance(other, (int, float)):
            exponent = other if type(other) is int else float(other)  # np.float64, a float, would widen float32
            return apply(arithmetic.POW, self, exponent=exponent)
        return apply(arithmetic.POWER, self, other if isinstance(other, Tensor) else self.constant(other))

    def __rpow__(self, other: Any) -> Tensor:
        return apply(arithmetic.POWER, self.constant(other), self)

    def __matmul__(self, other: Any) -> Tensor:
        return apply(linear.MATMUL, self, other if isinstance(other, Tensor) else self.constant(other))

    def __rmatmul__(self, other: Any) -> Tensor:
        return apply(linear.MATMUL, self.constant(other), self)

    def astype(self, dtype: Any) -> Tensor:
        """The values in another floating dtype; the gradient is converted back."""
        if np.dtype(dtype).kind in "iub" and self.requires_grad:
            raise TypeError(f"astype({np.dtype(dtype)}) has no gradient; detach() the tensor first")
        return self if self.data.dtype == dtype else apply(arithmetic.ASTYPE, self, dtype=np.dtype(dtype))

    # Reductions; dim is an int, a tuple of ints, or None for all

    def sum(self, dim: Dims = None, keepdims: bool = False) -> Tensor:
        """The sum over `dim`."""
        return apply(reduction.SUM, self, dim=dim, keepdims=keepdims)

    def mean(self, dim: Dims = None, keepdims: bool = False) -> Tensor:
        """The mean over `dim`."""
        return apply(reduction.MEAN, self, dim=dim, keepdims=keepdims)

    def max(self, dim: Dims = None, keepdims: bool = False) -> Tensor:
        """The maximum over `dim`; equal maxima share the gradient."""
        return apply(reduction.MAX, self, dim=dim, keepdims=keepdims)

    def min(self, dim: Dims = None, keepdims: bool = False) -> Tensor:
        """The minimum over `dim`; equal minima share the gradient."""
        return apply(reduction.MIN, self, dim=dim, keepdims=keepdims)

    # Shapes

    def reshape(self, *dims: Any) -> Tensor:
        """The same elements in another shape: reshape(2, 3), reshape((2, 3)), reshape(-1)."""
        return apply(shape.RESHAPE, self, shape=dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)

    def permute(self, *dims: Any) -> Tensor:
        """The dims in another order: all of them must be given."""
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        return apply(shape.PERMUTE, self, dims=tuple([d + self.ndim if d < 0 else d for d in order]))

    def transpose(self, *dims: Any) -> Tensor:
        """As NumPy's: the dims in the order given, or all reversed. For two dims: `swapaxes`."""
        return self.permute(*dims) if dims else self.permute(tuple(reversed(range(self.ndim))))

    def swapaxes(self, first: int, second: int) -> Tensor:
        """The same elements with two dims exchanged."""
        order = list(range(self.ndim))
        order[first], order[second] = order[second], order[first]
        return apply(shape.PERMUTE, self, dims=tuple(order))

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def broadcast_to(self, new: tuple[int, ...]) -> Tensor:
        """This tensor stretched to a larger shape."""
        return apply(shape.BROADCAST_TO, self, shape=tuple(new))

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor):
            index = index.data
        elif isinstance(index, tuple):
            index = tuple([part.data if isinstance(part, Tensor) else part for part in index])
        return apply(shape.INDEX, self, index=index)

    # Functions of one variable (fused and composed ones: dtrain/functional.py)

    def exp(self) -> Tensor:
        """E to the power of x."""
        return apply(elementwise.EXP, self)

    def log(self) -> Tensor:
        """The natural logarithm."""
        return apply(elementwise.LOG, self)

    def sqrt(self) -> Tensor:
        """The square root."""
        return apply(elementwise.SQRT, self)

    def tanh(self) -> Tensor:
        """The hyperbolic tangent."""
        return apply(elementwise.TANH, self)

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-x))."""
        return apply(elementwise.SIGMOID, self)

    def erf(self) -> Tensor:
        """The error function."""
        return apply(elementwise.ERF, self)

    def relu(self) -> Tensor:
        """max(x, 0)."""
        return apply(elementwise.RELU, self)

    def abs(self) -> Tensor:
        """The absolute value; its gradient at 0 is 0."""
        return apply(elementwise.ABS, self)

    __abs__ = abs

    def sin(self) -> Tensor:
        """The sine."""
        return apply(elementwise.SIN, self)

    def cos(self) -> Tensor:
        """The cosine."""
        return apply(elementwise.COS, self)

    def softmax(self) -> Tensor:
        """exp(x) / sum(exp(x)) over the last dim."""
        return apply(normalization.SOFTMAX, self)

    def log_softmax(self) -> Tensor:
        """log(softmax(x)) over the last dim."""
        return apply(normalization.LOG_SOFTMAX, self)


def _array(data: Any) -> Array:
    if isinstance(data, Tensor):
        raise TypeError("Tensor(data): data is a Tensor already; use data.detach() for a new leaf on the same array")
    if isinstance(data, np.generic) or not (hasattr(data, "dtype") and hasattr(data, "ndim")):
        return np.asarray(data)
    array: Array = data  # of another library, CuPy
    return array


def apply(op: Op, *inputs: Tensor, **attributes: Any) -> Tensor:
    """Run one op on tensors; record it when an input needs a gradient; carry tangents in forward mode.

    Raises OpError with the op's name and all shapes when the op cannot take them. All inputs share one floating dtype.
    """
    arrays = [t.data for t in inputs]
    if len(arrays) > 1:
        dtype = arrays[0].dtype
        for array in arrays:
            if array.dtype is not dtype and array.dtype != dtype:
                raise OpError(
                    f"{_call(op, arrays, attributes)}: the inputs differ in dtype; convert one with .astype()"
                )
    try:
        data, saved = op.forward(*arrays, **attributes)
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise OpError(f"{_call(op, arrays, attributes)}: {error}") from error
    if mode.watch is not None:
        mode.watch(op, arrays, data, attributes)
    output = Tensor(data)
    if mode.grad:
        for t in inputs:
            if t.requires_grad:
                output.requires_grad = True
                output.node = Node(op, inputs, attributes, saved, output.data)
                break
    elif mode.captured is not None:
        for t in inputs:
            if t.requires_grad:
                mode.captured[id(t)] = t
    if mode.forward and any([t.tangent is not None for t in inputs]):
        output.tangent = _tangent(op, inputs, output, attributes)
    return output


def _tangent(op: Op, inputs: tuple[Tensor, ...], output: Tensor, attributes: dict[str, Any]) -> Tensor:
    if op.jvp is None:
        raise OpError(f"{op.name} has no jvp: it cannot be differentiated in forward mode; give its Op a jvp")
    tangents = tuple([Tensor(np.zeros_like(t.data)) if t.tangent is None else t.tangent for t in inputs])
    mode.forward = False  # the rule computes with the primals, which must not carry tangents once more
    try:
        if op.jvp is ITSELF:
            tangent = apply(op, *tangents, **attributes)
        else:
            tangent = op.jvp(inputs, tangents, output, **attributes)
    finally:
        mode.forward = True
    if tangent.shape != output.shape:
        raise OpError(f"the jvp of {op.name} returned shape {tangent.shape} for an output of shape {output.shape}")
    return tangent


def _call(op: Op, arrays: Sequence[Array], attributes: dict[str, Any]) -> str:
    words = [f"{a.dtype}{list(a.shape)}" for a in arrays]
    for name, value in attributes.items():
        text = (
            f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") and hasattr(value, "dtype") else repr(value)
        )
        words.append(f"{name}={text}")
    return f"{op.name}({', '.join(words)})"
