"""What trainer and strategies know of a model: logits, a summed loss, a count of targets, and its three parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.checkpoint import Piece, Reader
from dtrain.mesh import Mesh
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

    @property
    def tables(self) -> tuple[int, ...]:
        """The rows of the embedding table of each categorical column."""


class Model(Module):
    """A module from inputs to logits, in three parts that a strategy may place apart: `enter`, `blocks`, `leave`.

        inputs ── enter ──► x ── blocks[0] ── … ── blocks[-1] ──► x ── leave ──► logits ── cross_entropy ──► loss

    What goes from block to block is one tensor of one shape. `entrance` and `exit` name the modules with the parameters
    of the two ends; all others are those of `blocks`.
    """

    blocks: list[Module]
    recompute = False
    """Keep only the inputs of each block for the backward, and compute the rest again."""

    entrance: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()

    enter: Callable[[Array, Context | None], Tensor]
    leave: Callable[[Tensor], Tensor]

    def forward(self, inputs: Array, context: Context | None = None) -> Tensor:
        """Logits, in the shape of the targets and one dim more."""
        return self.leave(self.through_blocks(self.enter(inputs, context), context))

    def loss(self, batch: Mapping[str, Array], context: Context | None = None) -> Tensor:
        """The SUM of the cross-entropies (nats) of all targets; targets of -1 do not count."""
        return self.loss_from(self.through_blocks(self.enter(batch["inputs"], context), context), batch)

    def loss_from(self, x: Tensor, batch: Mapping[str, Array]) -> Tensor:
        """The loss, from what leaves the last block."""
        return self.cross_entropy(self.leave(x), batch["targets"])

    def cross_entropy(self, logits: Tensor, targets: Array) -> Tensor:
        """The sum over all targets but those of -1."""
        return F.cross_entropy(logits, targets, ignore=IGNORED, reduction="sum")

    def count(self, batch: Mapping[str, Array]) -> int:
        """How many targets a loss of this batch sums over."""
        return int(np.count_nonzero(batch["targets"] != IGNORED))

    def through_blocks(self, x: Tensor, context: Context | None, blocks: Sequence[Module] | None = None) -> Tensor:
        """One block after the other (default: all), each recomputed in the backward if that is asked for."""
        for block in self.blocks if blocks is None else blocks:
            x = F.checkpoint(lambda x, block=block: block(x, context), x) if self.recompute else block(x, context)
        return x

    def after_step(self, contexts: Sequence[Context], mesh: Mesh) -> dict[str, Any]:
        """After a step, from what the modules told of its microbatches; returns what the log should tell, the same on
        all ranks. Collective over the mesh."""
        return {}

    def after_validation(self, mesh: Mesh) -> dict[str, float]:
        """After a validation: what it found beside the loss, the same on all ranks. Collective over the mesh."""
        return {}

    def state(self) -> list[Piece]:
        """What a checkpoint must hold beside the parameters, the same on all ranks."""
        return []

    def load_state(self, reader: Reader) -> None:
        """Take it back from a checkpoint, as far as it is there."""
