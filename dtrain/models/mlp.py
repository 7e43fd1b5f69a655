"""A multilayer perceptron that classifies images or rows of a table.

Hidden weights begin with variance 2 / inputs, so that signals neither die nor grow through half-open activations (He
et al., arXiv:1502.01852); tanh and the head with 1 / inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.config import DLRMConfig, MLPConfig
from dtrain.errors import UserError
from dtrain.models.base import Model, Sizes
from dtrain.modules import Context, Dropout, Linear, Module
from dtrain.tensor import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": F.tanh}


class Layer(Module):
    """Linear, activation, dropout."""

    def __init__(self, inputs: int, outputs: int, config: MLPConfig | DLRMConfig, dtype: Any) -> None:
        self.linear = Linear(inputs, outputs, config.bias, initial_std(inputs, config.activation), dtype)
        self.activation = config.activation
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From (B, inputs) to (B, outputs)."""
        return self.dropout(ACTIVATIONS[self.activation](self.linear(x)), context)


class MLP(Model):
    """Features (B, ...) -> logits of the classes (B, classes)."""

    exit = ("head",)

    def __init__(self, config: MLPConfig, sizes: Sizes, dtype: Any = np.float32) -> None:
        widths = [sizes.features, *config.hidden]
        classes = sizes.vocabulary if config.classes is None else config.classes
        if classes < sizes.vocabulary:
            raise UserError(f"model.classes: {classes}; must be {sizes.vocabulary} or more, the classes of the data")
        self.dtype = np.dtype(dtype)
        self.blocks: list[Module] = [Layer(widths[i], widths[i + 1], config, dtype) for i in range(len(config.hidden))]
        self.head = Linear(widths[-1], classes, config.bias, initial_std(widths[-1], "head"), dtype)
        self.assign_names()

    def enter(self, inputs: Array, context: Context | None = None) -> Tensor:
        """Features (B, ...) of any real dtype -> (B, features)."""
        rows = inputs.reshape(len(inputs), math.prod(inputs.shape[1:]))
        return Tensor(rows.astype(self.dtype, copy=False))

    def leave(self, x: Tensor) -> Tensor:
        """From the last hidden layer (B, width) to logits (B, classes)."""
        return self.head(x)


def initial_std(inputs: int, activation: str) -> float:
    """Of the weights of a layer by its inputs and its activation (or "head")."""
    return math.sqrt((1 if activation in ("tanh", "head") else 2) / max(1, inputs))
