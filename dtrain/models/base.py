"""What the trainer and the strategies know of a model: logits, a summed loss, a count of targets, a list of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.modules import Context, Module
from dtrain.tensor import Tensor

IGNORED = -1  # a target that is not asked for


class Sizes(Protocol):
    """What a model must know of the data; a `dtrain.data.Data` has it."""

    @property
    def vocabulary(self) -> int:
        """The number of different ids of inputs and targets; of classes, for rows."""

    @property
    def features(self) -> int:
        """The width of a row; 0 for tokens."""


class Model(Module):
    """A module from inputs to logits; `forward(inputs, context=None)`. Its `blocks` follow one another."""

    blocks: list[Module]
    recompute = False
    """Keep only the inputs of each block for the backward, and compute the rest again."""

    def loss(self, batch: Mapping[str, Array], context: Context | None = None) -> Tensor:
        """The SUM of the cross-entropies (nats) of all targets; targets of -1 do not count."""
        return F.cross_entropy(self(batch["inputs"], context), batch["targets"], ignore=IGNORED, reduction="sum")

    def count(self, batch: Mapping[str, Array]) -> int:
        """How many targets a loss of this batch sums over."""
        return int(np.count_nonzero(batch["targets"] != IGNORED))

    def through_blocks(self, x: Tensor, context: Context | None) -> Tensor:
        """One block after the other, each recomputed in the backward if that is asked for."""
        for block in self.blocks:
            x = F.checkpoint(lambda x, block=block: block(x, context), x) if self.recompute else block(x, context)
        return x
