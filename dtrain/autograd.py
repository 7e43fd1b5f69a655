"""The engine of reverse mode: one walk over the tape, from the newest node to the leaves. It knows no op.

        x ──► node ──► y ──► node ──► loss          forward: every op that needs a gradient leaves a Node (`tape.py`)
        ▲              ▲
      x.grad ◄─ vjp ◄─ g ◄── vjp ◄─── 1             backward: newest node first, gradients of several uses are summed

Invariants:
- "Newest first" is a topological order; no other sort is needed.
- A leaf's callbacks (`on_gradient`) run when its *last* use has been walked: its gradient is then complete.
- The graph is freed as it is walked; a second walk is an error unless `retain_graph=True`.
- A gradient that can be started (`Op.start`: a sum over ranks on other hosts) is under way while the products for the
  gradients of parameters are computed that came before it on the walk.
- A leaf with a `buffer` (a slice of a flat gradient buffer) receives its gradient there, without a copy where the vjp
  can write to a given place (`node.into`).

Reference: Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, chapters 3 and 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.arrays import Array
from dtrain.tape import GraphError, Node, enable_grad, mode, no_grad, scope, tracing

if TYPE_CHECKING:
    from dtrain.tensor import Tensor

# What programs import from here, names of the tape among it.
__all__ = [
    "GraphError", "Node", "backward", "enable_grad", "gradients", "mode", "no_grad", "scope", "split_backward",
    "tracing",
]  # fmt: skip

_newest = attrgetter("order")
_FREED = object()


def backward(roots: Sequence[tuple[Tensor, Array]], *, retain_graph: bool = False, complete: bool = True) -> None:
    """Add the vector-Jacobian products of `roots` (tensor, gradient of it) to `.grad` of every leaf that needs one.

    `complete=False` is for a backward inside a backward (recomputation): leaf callbacks then wait for the outer walk.
    """
    uses: dict[Tensor, int] = {tensor: 1 for tensor, _ in roots if tensor.node is None and tensor.requires_grad}
    order = _newest_first(roots, uses)

    def deliver(leaf: Tensor, gradient: Array | None) -> None:
        if gradient is not None:
            _accumulate(leaf, gradient)
        uses[leaf] -= 1
        if complete and uses[leaf] == 0 and leaf.hooks is not None:
            _finish(leaf)

    _walk(roots, order, deliver, retain_graph)


def split_backward(roots: Sequence[tuple[Tensor, Array]]) -> Callable[[], None]:
    """The half of `backward` that others wait for: the gradients of inputs. The function returned does the other half.

    Put off are the products for the gradients of parameters, of the ops that can compute them apart (`Op.splits`);
    callbacks of the parameters come with them. The arrays that both halves need live until then. Both halves together
    are one `backward`, to rounding: a parameter that is used several times may be summed in another order.
    Reference: Qi et al., Zero bubble pipeline parallelism, arXiv:2401.10241, section 2.
    """
    before, mode.deferred = mode.deferred, []
    later = mode.deferred
    try:
        backward(roots)
    finally:
        mode.deferred = before

    return functools.partial(_run, later)


def gradients(
    roots: Sequence[tuple[Tensor, Array]], leaves: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Array]:
    """The gradients with respect to `leaves` alone, returned: no `.grad` is touched, no callback runs.

    Only nodes that lie between the leaves and the roots are walked (and freed).
    """
    for tensor, _ in roots:
        if tensor.node is not None:
            _check(tensor.node)  # a freed graph has no way to the leaves: that must not look like a zero gradient
    found: dict[Tensor, Array] = {}
    wanted = set(leaves)
    reached: dict[Node, tuple[bool, ...]] = {}  # what they need in a backward to all leaves
    for node in reversed(_newest_first(roots, {})):
        needs = tuple([source in reached or source in wanted for source in node.inputs])
        if any(needs):  # made from the leaves: the others may belong to an outer graph and stay as they are
            reached[node], node.needs = node.needs, needs

    def deliver(leaf: Tensor, gradient: Array | None) -> None:
        if gradient is not None:
            found[leaf] = found[leaf] + gradient if leaf in found else gradient

    order = sorted(reached, key=_newest, reverse=True)
    before, mode.collecting = mode.collecting, True
    try:
        _walk([(t, g) for t, g in roots if t in wanted or t.node in reached], order, deliver, retain_graph)
    finally:
        mode.collecting = before
        for node, needs in reached.items():
            node.needs = needs
    return [_like(leaf.data, found[leaf]) if leaf in found else np.zeros_like(leaf.data) for leaf in leaves]


def _walk(
    roots: Sequence[tuple[Tensor, Array]],
    order: Sequence[Node],
    deliver: Callable[[Tensor, Array | None], None],
    retain_graph: bool,
) -> None:
    """Apply the vjps in the given order (newest first) and hand what arrives at a leaf to `deliver`."""
    for node in order:
        _check(node)
    waiting: dict[Node, Array] = {}
    owned: set[Node] = set()  # whose gradient is an array of ours, so that the next one may be added in place
    meanwhile: list[Callable[[], None]] = []  # to be computed while the next gradient that is started comes
    for tensor, gradient in roots:
        if tensor.node is not None:
            _add(waiting, owned, tensor.node, gradient)
        elif tensor.requires_grad:
            deliver(tensor, gradient)
    for node in order:
        gradient = waiting.pop(node)
        if node.hooks is not None:
            for hook in node.hooks:
                gradient = _replaced(hook(gradient), gradient)
        weights = _put_off(node)
        for source, result in _results(node, gradient, meanwhile):
            if type(source) is not Node:
                if mode.deferred is not None and result is None:  # recomputed: its parts are put off, and so its end
                    mode.deferred.append(functools.partial(deliver, source, None))  # type: ignore[arg-type]
                else:
                    deliver(source, result)  # type: ignore[arg-type]
            elif result is not None:
                _add(waiting, owned, source, result)
            elif source not in waiting:
                waiting[source] = np.zeros_like(gradient, shape=source.shape, dtype=source.dtype)
                owned.add(source)
        if weights is not None:
            later = meanwhile if mode.deferred is None else mode.deferred
            later.append(functools.partial(_weights, node, gradient, weights, deliver, retain_graph))
        elif not retain_graph:
            _free(node)
    _run(meanwhile)


def _run(works: list[Callable[[], None]]) -> None:
    for work in works:
        work()
    works.clear()


def _results(
    node: Node, gradient: Array, meanwhile: list[Callable[[], None]]
) -> Iterator[tuple[Node | Tensor, Array | None]]:
    """What the vjp gives to each of the inputs that need something."""
    if not any(node.needs):
        return
    if node.op.start is not None and meanwhile:
        finish = node.op.start(node, gradient)
        _run(meanwhile)
        results = finish()
    else:
        results = node.op.vjp(node, gradient)
    if len(results) != len(node.inputs):
        raise GraphError(f"the vjp of {node.describe()} returned {len(results)} gradients, not {len(node.inputs)}")
    for source, needed, shape, result in zip(node.inputs, node.needs, node.shapes, results, strict=True):
        if needed and result is not None and result.shape != shape:
            raise GraphError(
                f"the vjp of {node.describe()} returned a gradient of shape {result.shape} "
                f"for an input of shape {shape}"
            )
        if needed:
            yield source, result


def _put_off(node: Node) -> tuple[bool, ...] | None:
    """Take the parameters out of what this node needs now, and return what it needs later; None: nothing."""
    if not node.op.splits or (mode.deferred is None and not any([_can_start(source) for source in node.inputs])):
        return None
    weights = [needed and source.trained for needed, source in zip(node.needs, node.inputs, strict=True)]
    if not any(weights):
        return None
    node.needs = tuple([needed and not weight for needed, weight in zip(node.needs, weights, strict=True)])
    return tuple(weights)


def _can_start(source: Node | Tensor) -> bool:
    return type(source) is Node and source.op.start is not None


def _weights(
    node: Node,
    gradient: Array,
    needs: tuple[bool, ...],
    deliver: Callable[[Tensor, Array | None], None],
    retain_graph: bool,
) -> None:
    """The half that was put off: the gradients of the parameters that enter this node."""
    _check(node)
    before, node.needs = node.needs, needs
    for leaf, result in _results(node, gradient, []):
        deliver(leaf, result)  # type: ignore[arg-type]
    node.needs = tuple([now or later for now, later in zip(before, needs, strict=True)])
    if not retain_graph:
        _free(node)


def _free(node: Node) -> None:
    node.saved = _FREED
    node.inputs = ()


def _newest_first(roots: Sequence[tuple[Tensor, Array]], uses: dict[Tensor, int]) -> list[Node]:
    """All nodes that the walk must visit, newest first; counts on the way how often each leaf is used."""
    seen: set[Any] = {tensor.node for tensor, _ in roots if tensor.node is not None}
    stack = list(seen)
    while stack:
        node = stack.pop()
        for source, needed in zip(node.inputs, node.needs, strict=False):  # a freed node has no inputs
            if not needed:
                continue
            if type(source) is not Node:
                uses[source] = uses.get(source, 0) + 1
            elif source not in seen:
                seen.add(source)
                stack.append(source)
    return sorted(seen, key=_newest, reverse=True)


def _check(node: Node) -> None:
    if node.saved is _FREED:
        raise GraphError(
            f"backward through {node.op.name} a second time: its graph was freed by the first backward. "
            "Pass retain_graph=True to the first backward, or run the forward again."
        )
    for position, source in enumerate(node.inputs):
        if source.version != node.versions[position]:
            raise GraphError(
                f"input {position} of {node.describe()} was changed in place after the forward "
                f"(version {node.versions[position]}, now {source.version}): its gradient would be wrong. "
                "Change a copy, or change it before it is used."
            )


def _add(waiting: dict[Node, Array], owned: set[Node], node: Node, gradient: Array) -> None:
    """One more part of the gradient of a node's output."""
    present = waiting.get(node)
    if present is None:
        waiting[node] = gradient
    elif node in owned and present.ndim:
        present += gradient
    else:  # the first one may be shared with another input (x + y hands the same array to both)
        waiting[node] = present + gradient
        owned.add(node)


def _accumulate(leaf: Tensor, gradient: Array) -> None:
    """Add to `leaf.grad`; the first one goes to its buffer, if it has one."""
    if leaf.grad is not None:
        if leaf.grad is not gradient:
            leaf.grad += gradient
    elif leaf.buffer is not None:
        if leaf.buffer is not gradient:
            leaf.buffer[...] = gradient
        leaf.grad = leaf.buffer
    else:
        leaf.grad = _like(leaf.data, gradient)


def _like(data: Array, gradient: Array) -> Array:
    """A copy that belongs to nobody else, in the dtype of the data."""
    copy = np.empty_like(data)
    copy[...] = gradient
    return copy


def _finish(leaf: Tensor) -> None:
    """The gradient is complete: call the callbacks."""
    for hook in leaf.hooks or ():
        if leaf.grad is not None:
            replacement = hook(leaf.grad)
            if replacement is not None and replacement is not leaf.grad:
                leaf.grad[...] = replacement


def _replaced(replacement: Array | None, gradient: Array) -> Array:
    return gradient if replacement is None else replacement
