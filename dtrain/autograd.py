"""The engine of reverse mode: a tape of nodes and one walk over it. It knows no op.

        x ──► node ──► y ──► node ──► loss          forward: every op that needs a gradient leaves a Node
        ▲              ▲
      x.grad ◄─ vjp ◄─ g ◄── vjp ◄─── 1             backward: newest node first, gradients of several uses are summed

Invariants:
- Nodes are numbered as they are made, so "newest first" is a topological order; no other sort is needed.
- A leaf's callbacks (`on_gradient`) run when its *last* use has been walked: its gradient is then complete.
- The graph is freed as it is walked; a second walk is an error unless `retain_graph=True`.
- A leaf with a `buffer` (a slice of a flat gradient buffer) receives its gradient there, without a copy where the vjp can
  write to a given place (`node.into`).

Reference: Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, chapters 3 and 4.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.arrays import Array
from dtrain.op import Op

if TYPE_CHECKING:
    from dtrain.tensor import Tensor

_numbers = itertools.count()
_FREED = object()


class Mode(threading.local):
    """What this thread records: in-process ranks are threads, so the mode belongs to the thread."""

    grad: bool = True
    forward: bool = False
    captured: dict[int, Tensor] | None = None


mode = Mode()


class no_grad:  # noqa: N801 - reads as a word: `with no_grad():`
    """Within this context ops leave no tape. Also usable as a decorator."""

    def __enter__(self) -> None:
        self._before = mode.grad
        mode.grad = False

    def __exit__(self, *exc: object) -> None:
        mode.grad = self._before

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return wrapped


class enable_grad(no_grad):  # noqa: N801
    """The opposite of `no_grad`, for recomputation inside a backward."""

    def __enter__(self) -> None:
        self._before = mode.grad
        mode.grad = True


class GraphError(RuntimeError):
    """A walk over a graph that cannot be walked: freed, or changed in place since."""


class Node:
    """One application of an op on the tape; also the context that its vjp receives."""

    __slots__ = (
        "attributes", "dtype", "hooks", "inputs", "needs", "op", "order", "saved", "scope", "shape", "versions",
    )  # fmt: skip

    def __init__(
        self, op: Op, inputs: tuple[Tensor, ...], attributes: dict[str, Any], saved: Any, output: Array, scope: str = ""
    ) -> None:
        self.op, self.inputs, self.attributes, self.saved = op, inputs, attributes, saved
        self.needs = tuple([t.requires_grad for t in inputs])
        self.versions = tuple([t.version for t in inputs])
        self.shape, self.dtype, self.scope = output.shape, output.dtype, scope
        self.order = next(_numbers)
        self.hooks: list[Callable[[Array], Array | None]] | None = None

    def into(self, position: int) -> Array | None:
        """Where the gradient of this input may be written (overwritten) directly, or None. Return that array then."""
        leaf = self.inputs[position]
        if leaf.node is None and leaf.buffer is not None and leaf.grad is None and self._once(leaf):
            return leaf.buffer
        return None

    def onto(self, position: int) -> Array | None:
        """The gradient that this input already has, to be added to in place, or None. Return that array then."""
        leaf = self.inputs[position]
        return leaf.grad if leaf.node is None and leaf.grad is not None and self._once(leaf) else None

    def _once(self, leaf: Tensor) -> bool:
        return sum([t is leaf for t in self.inputs]) == 1

    def describe(self) -> str:
        shapes = ", ".join(f"{t.data.dtype}{list(t.shape)}" for t in self.inputs)
        return f"{self.op.name}({shapes})"


def backward(
    roots: Sequence[tuple[Tensor, Array]], *, retain_graph: bool = False, complete: bool = True
) -> None:
    """Add the vector-Jacobian products of `roots` (tensor, gradient of it) to `.grad` of every leaf that needs one.

    `complete=False` is for a backward inside a backward (recomputation): leaf callbacks then wait for the outer walk.
    """
    gradients: dict[Node, Array] = {}
    owned: set[Node] = set()  # whose gradient is an array of ours, so that the next one may be added in place
    uses: dict[Tensor, int] = {}
    for tensor, gradient in roots:
        if tensor.node is not None:
            _add(gradients, owned, tensor.node, gradient)
    for node in (order := _newest_first([t.node for t, _ in roots if t.node is not None], uses)):
        _check(node)
    for tensor, gradient in roots:
        if tensor.node is None and tensor.requires_grad:
            _accumulate(tensor, gradient)
            uses.setdefault(tensor, 0)
    for leaf in [leaf for leaf, count in uses.items() if count == 0] if complete else ():
        _finish(leaf)

    for node in order:
        gradient = gradients.pop(node)
        for hook in node.hooks or ():
            gradient = _replaced(hook(gradient), gradient)
        results = node.op.vjp(node, gradient)
        if len(results) != len(node.inputs):
            raise GraphError(f"the vjp of {node.describe()} returned {len(results)} gradients, not {len(node.inputs)}")
        for tensor, needed, result in zip(node.inputs, node.needs, results, strict=True):
            if not needed:
                continue
            if result is not None:
                if result.shape != tensor.data.shape:
                    raise GraphError(
                        f"the vjp of {node.describe()} returned a gradient of shape {result.shape} "
                        f"for an input of shape {tensor.data.shape}"
                    )
                if tensor.node is None:
                    _accumulate(tensor, result)
                else:
                    _add(gradients, owned, tensor.node, result)
            elif tensor.node is not None and tensor.node not in gradients:
                gradients[tensor.node] = _zeros(tensor.data)
                owned.add(tensor.node)
            if tensor.node is None:
                uses[tensor] -= 1
                if uses[tensor] == 0 and complete:
                    _finish(tensor)
        if not retain_graph:
            node.saved = _FREED
            node.inputs = ()


def _newest_first(starts: list[Node], uses: dict[Tensor, int]) -> list[Node]:
    """All nodes that the walk must visit, newest first; counts on the way how often each leaf is used."""
    seen = set(starts)
    stack = list(seen)
    while stack:
        node = stack.pop()
        for tensor, needed in zip(node.inputs, node.needs, strict=False):
            if not needed:
                continue
            if tensor.node is None:
                uses[tensor] = uses.get(tensor, 0) + 1
            elif tensor.node not in seen:
                seen.add(tensor.node)
                stack.append(tensor.node)
    return sorted(seen, key=lambda node: node.order, reverse=True)


def _check(node: Node) -> None:
    if node.saved is _FREED:
        raise GraphError(
            f"backward through {node.op.name} a second time: its graph was freed by the first backward. "
            "Pass retain_graph=True to the first backward, or run the forward again."
        )
    for position, (tensor, version) in enumerate(zip(node.inputs, node.versions, strict=True)):
        if tensor.version != version:
            raise GraphError(
                f"input {position} of {node.describe()} was changed in place after the forward "
                f"(version {version}, now {tensor.version}): its gradient would be wrong. "
                "Change a copy, or change it before it is used."
            )


def _add(gradients: dict[Node, Array], owned: set[Node], node: Node, gradient: Array) -> None:
    present = gradients.get(node)
    if present is None:
        gradients[node] = gradient
    elif node in owned:
        present += gradient
    else:  # the first one may be shared with another input (x + y hands the same array to both)
        gradients[node] = present + gradient
        owned.add(node)


def _accumulate(leaf: Tensor, gradient: Array) -> None:
    if leaf.grad is not None:
        if leaf.grad is not gradient:
            leaf.grad += gradient
    elif leaf.buffer is not None:
        if leaf.buffer is not gradient:
            leaf.buffer[...] = gradient
        leaf.grad = leaf.buffer
    else:
        leaf.grad = gradient.copy()


def _finish(leaf: Tensor) -> None:
    for hook in leaf.hooks or ():
        if leaf.grad is not None:
            replacement = hook(leaf.grad)
            if replacement is not None and replacement is not leaf.grad:
                leaf.grad[...] = replacement


def _replaced(replacement: Array | None, gradient: Array) -> Array:
    return gradient if replacement is None else replacement


def _zeros(like: Array) -> Array:
    zeros: Array = like * 0
    return zeros
