"""BERT: an encoder in which every token sees all others, trained to fill in masked tokens.

    the [M] sat on the mat ──► hidden states ──► only those of asked positions ──► transform ── GELU ── norm ── head
                                                 (targets are -1 elsewhere)

The loss computes logits for the asked positions alone, about 15 % of them. Differences from the paper: the norm
stands before each branch, which trains without a long warm-up (Xiong et al., arXiv:2002.04745); one segment; no
next-sentence task, which does not help (Liu et al., RoBERTa, arXiv:1907.11692).
Reference: Devlin, Chang, Lee, Toutanova, "BERT", arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.config import BERTConfig
from dtrain.models.base import IGNORED, Sizes
from dtrain.models.blocks import STD, make_norm
from dtrain.models.transformer import Transformer
from dtrain.modules import Linear
from dtrain.tensor import Tensor


class BERT(Transformer):
    """Ids (B, T) -> logits of the token that belongs at each place (B, T, vocabulary)."""

    exit = ("norm", "transform", "transform_norm", "head")

    def __init__(self, config: BERTConfig, sizes: Sizes, dtype: Any = np.float32) -> None:
        super().__init__(config, sizes, causal=False, dtype=dtype)
        self.transform = Linear(config.dim, config.dim, config.bias, STD, dtype)
        self.transform_norm = make_norm(config, dtype)
        shared = self.embedding.weight if config.tied else None
        self.head = Linear(config.dim, self.vocabulary, config.bias, STD, dtype, weight=shared)
        self.assign_names()

    def leave(self, x: Tensor) -> Tensor:
        """Hidden states (..., dim) -> logits (..., vocabulary)."""
        hidden = self.transform.product(self.norm(x))
        return self.head(self.transform_norm(F.gelu(hidden, self.transform.bias)))

    def loss_from(self, x: Tensor, batch: Mapping[str, Array]) -> Tensor:
        """The loss of the asked positions; the others never become logits."""
        targets = batch["targets"].reshape(-1)
        asked = np.flatnonzero(targets != IGNORED)
        rows = F.embedding(x.reshape(-1, x.shape[-1]), asked)
        return self.cross_entropy(self.leave(rows), targets[asked])
