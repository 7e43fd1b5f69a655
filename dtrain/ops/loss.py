"""Cross-entropy of logits against integer targets, fused with log-softmax; rows whose target is `ignore` do not count.

The loss of half-precision logits is float32: a sum over many tokens would not fit into 8 or 11 bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import Op, Shape
from dtrain.ops.common import contiguous, rows

REDUCTIONS = ("mean", "sum", "none")


def _forward(logits: Array, targets: Array, ignore: int, reduction: str) -> tuple[Array, Any]:
    """Logits (..., V), targets (...) -> a scalar, or (...) for reduction "none"."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}")
    if logits.ndim == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError("logits (..., V) need targets of shape (...)")
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    flat, labels = contiguous(rows(logits)), targets.reshape(-1)
    kept = labels != ignore
    safe = np.where(kept, labels, 0)
    if safe.size and (int(safe.min()) < 0 or int(safe.max()) >= flat.shape[1]):
        raise IndexError(
            f"the targets reach from {int(safe.min())} to {int(safe.max())}; logits of {flat.shape[1]} classes have "
            f"0 to {flat.shape[1] - 1} (and {ignore} is ignored)"
        )
    losses, logsumexp = kernels.of(logits).cross_entropy(flat, labels, ignore)
    # The mean of no targets is 0 and not NaN: a microbatch of padding alone contributes nothing.
    count = max(int(kept.sum()), 1) if reduction == "mean" else 1
    output = losses.reshape(targets.shape) if reduction == "none" else losses.sum() / losses.dtype.type(count)
    return output, (flat, labels, logsumexp, count)


def _vjp(node: Any, g: Array) -> tuple[Array]:
    flat, labels, logsumexp, count = node.saved
    per_row = (
        g.reshape(-1)
        if node.attributes["reduction"] == "none"
        else np.broadcast_to(g / g.dtype.type(count), labels.shape)
    )
    dlogits = kernels.of(flat).cross_entropy_vjp(
        contiguous(per_row), flat, labels, logsumexp, node.attributes["ignore"]
    )
    return (dlogits.reshape(node.shapes[0]),)


def _jvp(inputs: Any, tangents: Any, output: Any, targets: Array, ignore: int, reduction: str) -> Any:
    """D loss = sum(softmax * t) - t[target]."""
    classes = inputs[0].shape[-1]
    logits, t = inputs[0].reshape(-1, classes), tangents[0].reshape(-1, classes)
    labels = targets.reshape(-1)
    kept = labels != ignore
    picked = t[np.cumsum(np.ones_like(labels)) - 1, np.where(kept, labels, 0)]
    losses = ((logits.softmax() * t).sum(dim=-1) - picked).astype(output.dtype) * kept
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() / (max(int(kept.sum()), 1) if reduction == "mean" else 1)


def _flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return 13 * math.prod(inputs[0])


CROSS_ENTROPY = Op("cross_entropy", _forward, _vjp, _jvp, _flops)
