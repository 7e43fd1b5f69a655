"""Modules: parameters with names, and the layers that every model is built from.

    class Block(Module):
        def __init__(self): self.norm = LayerNorm(…); self.layers = [Linear(…), Linear(…)]
        def forward(self, x): …

A module finds its parts by its attributes (Parameter, Module, list of Modules), in the order of their definition;
there is no registration. Parameters have no memory until `materialise(seed)` (see `dtrain/parameter.py`).

Invariant: no module keeps state between calls, and there is no training mode: dropout is on where forward is given a
Context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

import dtrain.functional as F
from dtrain import random
from dtrain.arrays import Array
from dtrain.parameter import Constant, Normal, Parameter
from dtrain.tape import mode, scope
from dtrain.tensor import Tensor


@dataclass(frozen=True)
class Context:
    """What dropout needs to know of a training step. A forward without a context has no dropout."""

    seed: int
    step: int
    row_ids: Array
    """(B,) int64: the consumed position of each sample of the batch, so that its mask is the same on any rank."""
    loss_gradient: float = 1.0
    """What the backward of the loss begins with: auxiliary losses begin theirs with the same."""
    recorded: dict[str, Array] = field(default_factory=dict)
    """What modules tell of this microbatch, by their name; a recomputation tells the same again."""
    places: Array | None = None
    """(T,) int64: where in their samples the tokens at hand stand, where these are not all; else None."""
    length: int = 0
    """Tokens of a whole sample, where there are `places`."""

    def rows(self, count: int, first: int = 0, total: int | None = None) -> Array:
        """The ids (B * count,) of rows first .. first + count of each sample, of the `total` (default: count) rows at
        hand: the same ids that these rows have where a sample is whole."""
        if self.places is None:
            places, total = np.arange(first, first + count), count if total is None else total
        else:
            places, total = self.places[first : first + count], self.length
        return (self.row_ids[:, None] * total + places).reshape(-1)


class Module:
    """A part of a model. Subclasses define `forward`; a call of the module runs it."""

    forward: Callable[..., Tensor]
    name = ""  # dotted path, given by the root module; "" is the root

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        inside = "" if mode.scopes is None else self.name.removeprefix(".".join(mode.scopes)).removeprefix(".")
        if not inside:
            return self.forward(*inputs, **options)
        with scope(inside):  # drawing a graph
            return self.forward(*inputs, **options)

    def parts(self) -> Iterator[tuple[str, Module | Parameter]]:
        """The modules and parameters right below, with their names below this one, in the order of definition."""
        for attribute, value in vars(self).items():
            if isinstance(value, Module | Parameter):
                yield attribute, value
            elif isinstance(value, list | tuple):
                yield from ((f"{attribute}.{i}", each) for i, each in enumerate(value) if isinstance(each, Module))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Module | Parameter]]:
        """This module and all modules and parameters below with dotted paths; shared ones at each of their paths."""
        yield prefix, self
        for name, part in self.parts():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(part, Module):
                yield from part.walk(path)
            else:
                yield path, part

    def named_modules(self) -> dict[str, Module]:
        """This module ("") and all below by dotted path, parents first; a shared one once, under its first path."""
        return _first_of_each({path: part for path, part in self.walk() if isinstance(part, Module)})

    def named_parameters(self) -> dict[str, Parameter]:
        """All parameters by dotted path, in the order of their definition; a shared one once, under its first path."""
        return _first_of_each({path: part for path, part in self.walk() if isinstance(part, Parameter)})

    def num_parameters(self) -> int:
        """How many numbers are trained; shared ones count once."""
        return sum(parameter.size for parameter in self.named_parameters().values())

    def assign_names(self) -> None:
        """Tell all modules and parameters their dotted paths; the root does it at the end of its construction."""
        for path, module in self.named_modules().items():
            module.name = path
        for path, parameter in self.named_parameters().items():
            parameter.name = path

    def materialise(self, seed: int) -> None:
        """Give the parameters that are still placeholders their initial values (the whole of each)."""
        for parameter in self.named_parameters().values():
            if parameter.is_placeholder:
                parameter.data = parameter.initial_values(seed)


_Part = TypeVar("_Part")


def _first_of_each(parts: dict[str, _Part]) -> dict[str, _Part]:
    first: dict[int, str] = {}
    for path, part in parts.items():
        first.setdefault(id(part), path)
    return {path: parts[path] for path in first.values()}


class Linear(Module):
    """y = x weightᵀ + bias: x (..., inputs), weight (outputs, inputs), bias (outputs,) or none."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        std: float = 0.02,
        dtype: Any = np.float32,
        weight: Parameter | None = None,
    ) -> None:
        self.weight = Parameter((outputs, inputs), Normal(std), dtype) if weight is None else weight
        self.bias = Parameter((outputs,), Constant(0.0), dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs)."""
        return self.multiply(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias, for those who add it in one pass with what follows (`F.gelu`, `F.bias_residual`)."""
        return self.multiply(x, None)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The one place where the weight is used: what stands beside it (an adapter) replaces this."""
        return F.linear(x, self.weight, bias)


class Embedding(Module):
    """One row per id: ids (...) -> (..., dim)."""

    def __init__(self, rows: int, dim: int, std: float = 0.02, dtype: Any = np.float32) -> None:
        self.weight = Parameter((rows, dim), Normal(std), dtype)

    def forward(self, ids: Array) -> Tensor:
        """Ids (...) of any integer dtype -> (..., dim)."""
        return F.embedding(self.weight, ids)


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim. Ba, Kiros, Hinton, arXiv:1607.06450."""

    def __init__(self, dim: int, bias: bool = True, eps: float = 1e-5, dtype: Any = np.float32) -> None:
        self.weight = Parameter((dim,), Constant(1.0), dtype)
        self.bias = Parameter((dim,), Constant(0.0), dtype) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """From (..., dim) to the same shape."""
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dim. Zhang, Sennrich, arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-5, dtype: Any = np.float32) -> None:
        self.weight = Parameter((dim,), Constant(1.0), dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """From (..., dim) to the same shape."""
        return F.rms_norm(x, self.weight, self.eps)


class Dropout(Module):
    """Each element is 0 with probability p, else scaled by 1 / (1 - p); nothing happens without a context."""

    def __init__(self, p: float) -> None:
        self.p = p

    def active(self, context: Context | None) -> bool:
        """Whether forward would change anything."""
        return context is not None and self.p > 0

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From (B, ..., C) to the same shape; B are the samples of the context.

        The mask is a function of (seed, name of this layer, step, sample, place in the sample): any rank, any
        micro-batch and a recomputation draw the same one.
        """
        if context is None or self.p == 0:
            return x
        row_ids = context.rows(int(np.prod(x.shape[1:-1])))
        return F.dropout(x, self.p, random.key(context.seed, "dropout " + self.name, context.step), row_ids)
