"""The blocks of a transformer, with the norm before each branch ("pre-norm").

    x ──┬── norm ── qkv ── attention ── out ──┬── + ──┬── norm ── up ── GELU ── down ──┬── + ──►
        └─────────────────────────────────────┘       └────────────────────────────────┘

Shapes: B samples, T tokens, C = dim, H query heads and G key/value heads of width D = C / H. Biases are added in one
pass with what follows them: with GELU, or with the residual sum. There is dropout on the two branches, none on
attention weights: the kernel never holds them, and large models are trained without it.
References: Vaswani et al., arXiv:1706.03762; Radford et al., "Language models are unsupervised multitask learners"
(GPT-2), 2019; Touvron et al. (Llama: RMS norm, SwiGLU, rotary positions), arXiv:2302.13971.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.config import TransformerConfig
from dtrain.modules import Context, Dropout, LayerNorm, Linear, Module, RMSNorm
from dtrain.tensor import Tensor

STD = 0.02  # of all initial weights; branches that add to the residual stream divide by sqrt(2 * layers), as GPT-2 does
ROTARY_BASE = 10000.0

Angles = tuple[Array, Array]


def make_norm(config: TransformerConfig, dtype: Any) -> LayerNorm | RMSNorm:
    """The norm that the configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(config.dim, dtype=dtype)
    return LayerNorm(config.dim, config.bias, dtype=dtype)


def rotary_angles(length: int, width: int, dtype: Any) -> Angles:
    """Cosines and sines (length, width / 2) of t * base^(-2i / width): rotary positions, arXiv:2104.09864."""
    frequencies = ROTARY_BASE ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    return np.cos(angles).astype(wide), np.sin(angles).astype(wide)


def add_branch(residual: Tensor, linear: Linear, x: Tensor, dropout: Dropout, context: Context | None) -> Tensor:
    """Residual + dropout(linear(x)); without dropout, bias and sum are one pass."""
    if dropout.active(context):
        return F.bias_residual(dropout(linear(x), context), None, residual)
    return F.bias_residual(linear.product(x), linear.bias, residual)


class Attention(Module):
    """Multi-head attention in which kv_heads key/value heads are shared by the query heads."""

    def __init__(self, config: TransformerConfig, causal: bool, angles: Angles | None, dtype: Any) -> None:
        self.heads = config.heads
        self.kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        self.causal, self.angles = causal, angles
        width = config.dim // config.heads
        packed = (self.heads + 2 * self.kv_heads) * width
        self.qkv = Linear(config.dim, packed, config.bias, STD, dtype)  # [all q heads | all k heads | all v heads]
        self.out = Linear(config.dim, config.dim, config.bias, STD / math.sqrt(2 * config.layers), dtype)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, context: Context | None = None) -> Tensor:
        """X (B, T, C), normed; residual (B, T, C) -> residual + attention(x)."""
        return add_branch(residual, self.out, self.mix(self.qkv(x)), self.dropout, context)

    def mix(self, qkv: Tensor) -> Tensor:
        """From (B, T, [q heads | k heads | v heads]) to (B, T, all heads): the one place where tokens meet."""
        length = qkv.shape[1]
        rotary = None if self.angles is None else (self.angles[0][:length], self.angles[1][:length])
        return F.packed_attention(qkv, self.heads, self.kv_heads, causal=self.causal, rotary=rotary)


class MLP(Module):
    """Two layers with GELU between them, or SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, dtype: Any) -> None:
        hidden = 4 * config.dim if config.hidden is None else config.hidden
        self.kind = config.mlp
        self.gate = Linear(config.dim, hidden, config.bias, STD, dtype) if self.kind == "swiglu" else None
        self.up = Linear(config.dim, hidden, config.bias, STD, dtype)
        self.down = Linear(hidden, config.dim, config.bias, STD / math.sqrt(2 * config.layers), dtype)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, context: Context | None = None) -> Tensor:
        """X (B, T, C), normed; residual (B, T, C) -> residual + mlp(x)."""
        if self.gate is None:
            inner = F.gelu(self.up.product(x), self.up.bias, approximate=self.kind == "gelu_tanh")
        else:
            inner = F.swiglu(self.gate(x), self.up(x))
        return add_branch(residual, self.down, inner, self.dropout, context)


class Block(Module):
    """One layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, causal: bool, angles: Angles | None, dtype: Any) -> None:
        self.norm1 = make_norm(config, dtype)
        self.attention = Attention(config, causal, angles, dtype)
        self.norm2 = make_norm(config, dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From (B, T, C) to (B, T, C)."""
        x = self.attention(self.norm1(x), x, context)
        return self.mlp(self.norm2(x), x, context)
