"""GPT: a decoder that predicts the next token from those before it.

The defaults are GPT-2's (layer norm, GELU in the tanh form, learned positions, biases, head tied to the embedding);
with norm: rms, mlp: swiglu, position: rotary, bias: false, tied: false and fewer kv_heads it is Llama. Initial values
as GPT-2: N(0, 0.02²), smaller for what adds to the residual stream; norms begin as the identity, biases at 0.
References: Radford et al., GPT-2, 2019; Press and Wolf (tied head), arXiv:1608.05859; Touvron et al. (Llama),
arXiv:2302.13971.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.config import GPTConfig
from dtrain.models.base import Sizes
from dtrain.models.blocks import STD
from dtrain.models.transformer import Transformer
from dtrain.modules import Linear
from dtrain.tensor import Tensor


class GPT(Transformer):
    """Ids (B, T) -> logits of the next token (B, T, vocabulary)."""

    def __init__(self, config: GPTConfig, sizes: Sizes, dtype: Any = np.float32) -> None:
        super().__init__(config, sizes, causal=True, dtype=dtype)
        shared = self.embedding.weight if config.tied else None
        self.head = Linear(config.dim, self.vocabulary, bias=False, std=STD, dtype=dtype, weight=shared)
        self.assign_names()

    def leave(self, x: Tensor) -> Tensor:
        """Hidden states (..., dim) -> logits (..., vocabulary)."""
        return self.head(self.norm(x))
