"""Recomputation: keep the inputs of a segment instead of its inside, and run it again in the backward.

    forward     x ──► [ f under no_grad ] ──► y              the tape has ONE node, which holds x
    backward    x ──► [ f with a tape   ] ──► y ◄── g        run again, walked at once, freed

Memory falls from all activations to the segment's inputs plus one segment, for one more forward.
Invariant: gradients are those of the plain graph, bit for bit: the same vjps run in the same order and add to the same
`.grad`. (Only a *computed* tensor that is used several times inside and also outside is summed in another order.)
Parameters that the function uses become inputs of the node, so that their callbacks wait for their last use anywhere.
Reference: Chen et al., arXiv:1604.06174; Griewank and Walther 2000 (revolve).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.arrays import Array
from dtrain.autograd import backward, gradients
from dtrain.op import Op
from dtrain.tape import GraphError, Node, enable_grad, mode, no_grad
from dtrain.tensor import Tensor


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), keeping only the inputs; the function must give the same result when it is called again.

    It returns one tensor; tensors computed elsewhere must come in as inputs (parameters and constants need not).
    """
    if not mode.grad or mode.forward or mode.scopes is not None:  # nothing to save, or the inside is to be seen
        return function(*inputs)
    before, mode.captured = mode.captured, {}
    try:
        with no_grad():
            output = function(*[_leaf(t, requires_grad=False) for t in inputs])
        used = list(mode.captured.values())
    finally:
        mode.captured = before
    if not isinstance(output, Tensor):
        raise TypeError(f"checkpoint: the function must return one Tensor, not {type(output).__name__}")
    for tensor in used:
        if tensor.node is not None:
            raise GraphError(
                f"checkpoint: the function uses the result of {tensor.node.describe()}, shape {tensor.shape}, "
                "which is computed outside; pass it as an input of checkpoint(function, *inputs)"
            )
    result = Tensor(output.data)
    if any([t.requires_grad for t in (*inputs, *used)]):
        saved = [(t if t.node is None else None, t.data) for t in inputs]
        result.requires_grad = True
        result.node = Node(CHECKPOINT, (*inputs, *used), {"function": function}, saved, output.data)
    return result


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return Tensor(tensor.data, requires_grad)


def _vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    # A leaf goes in as itself and collects its gradient in place; a computed input is represented by a leaf of its own.
    inputs = [
        leaf if leaf is not None and not mode.collecting else Tensor(data, requires_grad=needed)
        for (leaf, data), needed in zip(node.saved, node.needs, strict=False)
    ]
    with enable_grad():
        output = node.attributes["function"](*inputs)
    outside: list[Array | None] = [None] * (len(node.needs) - len(inputs))
    if not output.requires_grad:
        return (*[None] * len(inputs), *outside)
    if mode.collecting:
        return (*gradients([(output, g)], inputs), *outside)
    backward([(output, g)], complete=False)
    stand_ins = [t.grad if leaf is None else None for (leaf, _), t in zip(node.saved, inputs, strict=True)]
    return (*stand_ins, *outside)


CHECKPOINT = Op("checkpoint", lambda *arrays, **attributes: (arrays[0], None), _vjp)
