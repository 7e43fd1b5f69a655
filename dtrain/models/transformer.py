"""The trunk that GPT and BERT share: token and position embeddings, blocks, a last norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.config import TransformerConfig
from dtrain.errors import UserError
from dtrain.models.base import Model, Sizes
from dtrain.models.blocks import STD, Block, make_norm, rotary_angles
from dtrain.modules import Context, Dropout, Embedding, Module
from dtrain.tensor import Tensor


class Transformer(Model):
    """Ids (B, T) -> hidden states (B, T, dim), for any T up to `sequence`."""

    entrance = ("embedding", "positions", "dropout")
    exit: tuple[str, ...] = ("norm", "head")

    def __init__(self, config: TransformerConfig, sizes: Sizes, causal: bool, dtype: Any = np.float32) -> None:
        self.sequence = config.sequence
        self.vocabulary = sizes.vocabulary if config.vocabulary is None else config.vocabulary
        if self.vocabulary < sizes.vocabulary:
            raise UserError(
                f"model.vocabulary: {self.vocabulary}; must be {sizes.vocabulary} or more, the number of different "
                "tokens of the data, or null for just as many"
            )
        self.embedding = Embedding(self.vocabulary, config.dim, STD, dtype)
        learned = config.position == "learned"
        self.positions = Embedding(config.sequence, config.dim, STD, dtype) if learned else None
        angles = None if learned else rotary_angles(config.sequence, config.dim // config.heads, dtype)
        self.dropout = Dropout(config.dropout)
        self.blocks: list[Module] = [Block(config, causal, angles, dtype) for _ in range(config.layers)]
        self.norm = make_norm(config, dtype)

    def enter(self, inputs: Array, context: Context | None = None) -> Tensor:
        """Ids (B, T) -> what goes into the first block, (B, T, dim)."""
        length = inputs.shape[1]
        if length > self.sequence:
            raise ValueError(
                f"inputs of {length} tokens; the model was built for at most {self.sequence} (model.sequence)"
            )
        x = self.embedding(inputs)
        if self.positions is not None:
            x = x + self.place(length)
        return self.dropout(x, context)

    def place(self, length: int) -> Tensor:
        """What learned positions add to `length` tokens, (length, dim)."""
        assert self.positions is not None
        table: Tensor = self.positions.weight
        return table if length == self.sequence else table[:length]
