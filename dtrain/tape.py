"""The tape: what the forward leaves for the backward, and when it leaves anything.

    x ──► matmul ──► h ──► gelu ──► y       what the program computes
            │                │      │
    x ◄── node 1 ◄──────── node 2 ◄─┘       the tape: a node per op that needs a gradient, with what its vjp asked for

A node refers to the nodes before it (and to leaves), not to their outputs: an array lives on only where a vjp saved it.
Nodes are numbered as they are made, so "newest first" is a topological order. The walk over them: `autograd.py`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.arrays import Array
from dtrain.op import Op, Shape

if TYPE_CHECKING:
    from dtrain.tensor import Tensor

_numbers = itertools.count()


class Mode(threading.local):
    """What this thread records: in-process ranks are threads, so the mode belongs to the thread."""

    grad: bool = True
    forward: bool = False  # carry tangents
    captured: dict[int, Tensor] | None = None  # under no_grad: collects the tensors that would have needed a gradient
    collecting: bool = False  # this walk returns gradients and leaves every `.grad` alone
    deferred: list[Callable[[], None]] | None = None  # this walk leaves the gradients of weights for later
    watch: Callable[[Op, Sequence[Array], Array, dict[str, Any]], None] | None = None  # sees every op
    scopes: list[str] | None = None  # while tracing: the names of the modules being called


mode = Mode()


class no_grad:
    """Within this context ops leave no tape. Also usable as a decorator."""

    value = False

    def __enter__(self) -> None:
        self._before = mode.grad
        mode.grad = self.value

    def __exit__(self, *exc: object) -> None:
        mode.grad = self._before

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with type(self)():
                return function(*args, **kwargs)

        return wrapped


class enable_grad(no_grad):
    """The opposite of `no_grad`, for recomputation inside a backward."""

    value = True


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Within this context nodes remember the modules that made them (`scope`), and `checkpoint` keeps its graph."""
    before, mode.scopes = mode.scopes, []
    try:
        yield
    finally:
        mode.scopes = before


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Name the nodes made within this context; only of use (and only to be called) while `mode.scopes` is not None."""
    scopes = [] if mode.scopes is None else mode.scopes
    scopes.append(name)
    try:
        yield
    finally:
        scopes.pop()


class GraphError(RuntimeError):
    """A walk over a graph that cannot be walked: freed, or changed in place since."""


class Node:
    """One application of an op on the tape; also the context that its vjp receives.

    `inputs` has for every input the node that computed it, or the leaf tensor itself; `shapes` are the inputs' shapes,
    `needs` says which of them need a gradient, `shape` and `dtype` describe the output.
    """

    __slots__ = (
        "attributes", "dtype", "hooks", "inputs", "needs", "op", "order", "saved", "scope", "shape", "shapes",
        "version", "versions",
    )  # fmt: skip
    trained = False

    def __init__(self, op: Op, inputs: Sequence[Tensor], attributes: dict[str, Any], saved: Any, output: Array) -> None:
        self.op = op
        self.attributes = attributes
        self.saved = saved
        self.version = 0  # of the output: counts changes in place
        self.inputs: tuple[Node | Tensor, ...] = tuple([t.node or t for t in inputs])
        self.needs = tuple([t.requires_grad for t in inputs])
        self.shapes: tuple[Shape, ...] = tuple([t.data.shape for t in inputs])
        self.versions = tuple([source.version for source in self.inputs])
        self.shape: Shape = output.shape
        self.dtype = output.dtype
        self.scope = ".".join(mode.scopes) if mode.scopes else ""
        self.order = next(_numbers)
        self.hooks: list[Callable[[Array], Array | None]] | None = None

    def into(self, position: int) -> Array | None:
        """Where the gradient of this input may be written (overwritten) directly, or None. Return that array then."""
        leaf: Any = self.inputs[position]
        return leaf.buffer if self._delivers(leaf) and leaf.grad is None else None

    def onto(self, position: int) -> Array | None:
        """The gradient that this input already has, to be added to in place, or None. Return that array then."""
        leaf: Any = self.inputs[position]
        return leaf.grad if self._delivers(leaf) else None

    def _delivers(self, source: Node | Tensor) -> bool:
        """Whether this walk fills the `.grad` of the input, a leaf, and this op reads it once."""
        if type(source) is Node or mode.collecting:
            return False
        return sum([other is source for other in self.inputs]) == 1

    def describe(self) -> str:
        """The op with the shapes of its inputs, for error messages."""
        return f"{self.op.name}({', '.join([str(list(shape)) for shape in self.shapes])}) in {self.dtype}"
