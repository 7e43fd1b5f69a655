"""Layers of which every tensor-parallel rank has a slice, beside the whole ones that they replace.

    column   weight cut by rows (outputs)     x replicated ─► y cut              enter: copy    (backward: all_reduce)
    row      weight cut by columns (inputs)   x cut ─► partial y ─► y            leave: all_reduce      (backward: copy)
    vocabulary-parallel embedding: ids outside the own rows count as 0, then all_reduce
    vocabulary-parallel cross-entropy: the maximum, the sum of exponentials and the target's logit are reduced, each
        (b, s); no rank ever has (b, s, V)

With sequence parallelism what lies between the branches is cut along the tokens: then enter is all_gather and leave is
reduce_scatter, of the same volume. Slices may be of different lengths, also empty.
References: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198 (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import dtrain.functional as F
from dtrain import conjugate, random
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import accumulator, spans
from dtrain.layout import Run
from dtrain.models.base import IGNORED
from dtrain.models.blocks import Attention, add_branch
from dtrain.modules import Context, Dropout, Embedding, Linear, Module
from dtrain.op import Op
from dtrain.tensor import Tensor, apply

Way = Callable[[Tensor], Tensor]

TOKENS = 1  # the dim of (B, T, C) that sequence parallelism cuts


class RowLinear(Linear):
    """A linear layer that has the columns of the weight for its part of the inputs; the bias is added to the sum."""

    def __init__(self, whole: Linear, leave: Way) -> None:
        self.weight, self.bias, self.name = whole.weight, whole.bias, whole.name
        self._leave = leave

    def product(self, x: Tensor) -> Tensor:
        """Without the bias: from my part of (..., inputs) to (..., outputs)."""
        return self._leave(self.multiply(x, None))

    def forward(self, x: Tensor) -> Tensor:
        """From my part of (..., inputs) to (..., outputs)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias


class ColumnLinear(Linear):
    """A linear layer that has the rows of the weight for its part of the outputs."""

    def __init__(self, whole: Linear, enter: Way, leave: Way = lambda y: y) -> None:
        self.weight, self.bias, self.name = whole.weight, whole.bias, whole.name
        self._enter, self._leave = enter, leave

    def product(self, x: Tensor) -> Tensor:
        """Without the bias: from (..., inputs) to my part of (..., outputs)."""
        return self.multiply(self._enter(x), None)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs), or my part of them."""
        return self._leave(self.multiply(self._enter(x), self.bias))


class VocabularyEmbedding(Embedding):
    """An embedding that has the rows first .. first + len(weight)."""

    def __init__(self, whole: Embedding, comm: Communicator, rows: int, leave: Way | None = None) -> None:
        """rows: of the whole table; leave: the sum over the ranks."""
        self.weight, self.name = whole.weight, whole.name
        self.rows = rows
        self._leave = leave or (lambda y: conjugate.all_reduce(y, comm))
        self.first = spans(rows, comm.size)[comm.rank][0]

    def forward(self, ids: Array) -> Tensor:
        """Ids (...) -> (..., dim), the same on all ranks."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise IndexError(f"the ids reach from {ids.min()} to {ids.max()}; a vocabulary of {self.rows}")
        mine = (ids >= self.first) & (ids < self.first + self.weight.shape[0])
        if not self.weight.shape[0]:
            nothing = np.zeros((*ids.shape, self.weight.shape[1]), self.weight.dtype)
            return self._leave(Tensor(nothing, requires_grad=True))  # so that it takes part in the walk back
        rows = F.embedding(self.weight, np.where(mine, ids - self.first, 0))
        return self._leave(rows * mine[..., None].astype(self.weight.dtype))


class Branch(Module):
    """Attention or MLP on heads or hidden units of this rank; what comes in is made ready once for all its products."""

    def __init__(self, inner: Module, enter: Way) -> None:
        self.inner, self.name = inner, inner.name
        self._enter = enter

    def forward(self, x: Tensor, residual: Tensor, *context: Any) -> Tensor:
        """As the whole branch."""
        return self.inner(self._enter(x), residual, *context)


class Heads(NamedTuple):
    """What of an attention each of several ranks has: whole groups, a key/value head with all queries that use it."""

    packed: tuple[tuple[Run, ...], ...]
    """By rank, of the outputs of qkv."""
    mixed: tuple[tuple[Run, ...], ...]
    """By rank, of the inputs of out."""
    counts: list[tuple[int, int]]
    """By rank: heads, key/value heads."""


def cut_heads(attention: Attention, size: int) -> Heads:
    """For `size` ranks."""
    width = attention.qkv.weight.whole[0] // (attention.heads + 2 * attention.kv_heads)
    per_group = attention.heads // attention.kv_heads
    ends = spans(attention.kv_heads, size)
    mixed = tuple(((start * per_group * width, stop * per_group * width),) for start, stop in ends)
    first_key = attention.heads * width
    first_value = first_key + attention.kv_heads * width
    keys = [(first_key + start * width, first_key + stop * width) for start, stop in ends]
    values = [(first_value + start * width, first_value + stop * width) for start, stop in ends]
    packed = tuple((*queries, key, value) for queries, key, value in zip(mixed, keys, values, strict=True))
    return Heads(packed, mixed, [((stop - start) * per_group, stop - start) for start, stop in ends])


class NoHeads(Attention):
    """The attention of a rank that has no heads: its contribution is 0, and the collectives still take part."""

    def __init__(self, whole: Attention) -> None:
        self.qkv, self.out, self.dropout, self.name = whole.qkv, whole.out, whole.dropout, whole.name
        self.causal = whole.causal

    def forward(self, x: Tensor, residual: Tensor, context: Context | None = None) -> Tensor:
        """From (B, T, C) and the residual to their sum."""
        return add_branch(residual, self.out, self.qkv(x), self.dropout, context)


class Then(Module):
    """A module, and then something that moves its result."""

    def __init__(self, inner: Module, then: Way) -> None:
        self.inner, self.name = inner, inner.name
        self._then = then

    def forward(self, *inputs: Any) -> Tensor:
        """As the module, moved."""
        return self._then(self.inner(*inputs))


class SequenceDropout(Dropout):
    """Dropout on my tokens of (B, T, C): the mask is that of the same tokens in the whole."""

    def __init__(self, whole: Dropout, comm: Communicator, length: Callable[[], int]) -> None:
        """length: T, as of now: the tokens that tp cuts, which may be a part of each sample already."""
        super().__init__(whole.p)
        self.name, self.comm, self.length = whole.name, comm, length

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From my part of (B, T, C) to the same shape."""
        if context is None or self.p == 0:
            return x
        total = self.length()
        first = spans(total, self.comm.size)[self.comm.rank][0]
        row_ids = context.rows(x.shape[TOKENS], first, total)
        return F.dropout(x, self.p, random.key(context.seed, "dropout " + self.name, context.step), row_ids)


# Cross-entropy of logits that are cut along the vocabulary


def _forward(logits: Array, comm: Communicator, targets: Array, first: int) -> tuple[Array, Any]:
    """Logits (R, V of this rank), targets (R,) of the whole vocabulary or IGNORED -> the sum of the losses."""
    wide = accumulator(logits.dtype)
    largest = comm.all_reduce(
        logits.max(axis=1).astype(wide) if logits.shape[1] else np.full(len(logits), -np.inf, wide), op="max"
    )
    exponentials = np.exp(logits.astype(wide) - largest[:, None])
    here = (targets >= first) & (targets < first + logits.shape[1])
    rows = np.flatnonzero(here)
    chosen = np.zeros(len(logits), wide)
    chosen[rows] = logits[rows, targets[rows] - first]
    sums = comm.all_reduce(exponentials.sum(axis=1))
    chosen = comm.all_reduce(chosen)
    counted = targets != IGNORED
    loss = np.where(counted, np.log(sums) + largest - chosen, 0).sum()
    exponentials *= (counted / sums)[:, None]
    # As of whole logits: the loss of half precision is float32, a sum over many tokens would not fit.
    return np.asarray(loss, wide), (exponentials, rows, targets[rows] - first, logits.dtype)


def _backward(node: Any, g: Array) -> tuple[Array]:
    softmax, rows, columns, dtype = node.saved
    gradient = softmax * g
    gradient[rows, columns] -= g
    return (gradient.astype(dtype, copy=False),)


CROSS_ENTROPY = Op("vocabulary_cross_entropy", _forward, _backward)


def cross_entropy(logits: Tensor, targets: Array, comm: Communicator, vocabulary: int) -> Tensor:
    """The SUM of the cross-entropies of targets (...) by logits (..., V of this rank); targets of IGNORED do not count.

    Three all_reduces of as many numbers as there are targets; equal on all ranks.
    """
    first = spans(vocabulary, comm.size)[comm.rank][0]
    targets = np.asarray(targets).reshape(-1)
    return apply(CROSS_ENTROPY, logits.reshape(len(targets), logits.shape[-1]), comm=comm, targets=targets, first=first)
