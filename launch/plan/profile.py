"""What one sample costs in each part of a model: FLOPs, bytes moved, bytes kept for the backward, parameters.

    entrance │ block 0 │ block 1 │ … │ exit        a Part each, by how tensor parallelism cuts it: amounts.py

Nothing is estimated: a model with one block is run on short inputs (trace.py). A mixture of experts is traced without
a limit of its capacity: as many rows in all as even routing has, and how they are spread over experts changes neither
FLOPs nor bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dtrain import models
from dtrain.arrays import named_dtype
from dtrain.config import BERTConfig, Config, GPTConfig, MLPConfig, MoEGPTConfig
from dtrain.launch.plan.amounts import Amount, Part, total
from dtrain.launch.plan.trace import LENGTHS, add, extended, trace
from dtrain.models import Model, Sizes
from dtrain.models.moe import MoEBlock


@dataclass
class Profile:
    """A model for the planner."""

    entrance: Part
    blocks: list[Part]
    exit: Part
    boundary: float
    """Bytes of one sample between two blocks."""
    tied: float
    """Elements of parameters that both ends have."""
    kv_heads: int
    """What limits tensor parallelism of attention; 1 where there is none."""
    itemsize: int
    tensor_reduces: int
    """all_reduces of the boundary's size in the forward of a block, under tensor parallelism."""
    tokens: bool
    """Whether `parallel.sequence` means something."""
    length: int = 1
    """Tokens of a sample."""
    kv_bytes: float = 0.0
    """Bytes of the keys and values of one sample in one block."""
    query_heads: int = 1
    causal: bool = True
    """Whether a token sees those before it only."""
    experts: int = 0
    """Of a mixture; 0: there are none."""

    @property
    def parameters(self) -> float:
        """Elements of the whole model."""
        return sum(total(part.parameters) for part in (self.entrance, *self.blocks, self.exit)) - self.tied


def profile(config: Config, sizes: Sizes) -> Profile:
    """Of the model of `config` on data of these sizes (vocabulary, features)."""
    model = models.outline(config.model, sizes, config.train.dtype)
    itemsize = named_dtype(config.train.dtype).itemsize
    if isinstance(config.model, MLPConfig):
        parts = trace(config, sizes, 0, range(len(model.blocks)))
        number, kv_heads, tokens = 1, 1, False
        boundary = itemsize * float(max(config.model.hidden, default=0))
    else:
        assert isinstance(config.model, GPTConfig | BERTConfig)
        length = config.model.sequence
        lengths = [length] if length <= LENGTHS[-1] else LENGTHS
        short, blocks = _shortened(config)
        traces = [trace(short, sizes, each, blocks) for each in lengths]
        parts = traces[0] if len(traces) == 1 else extended(traces, lengths, length)
        number, tokens = 2, True
        kv_heads = config.model.heads if config.model.kv_heads is None else config.model.kv_heads
        boundary = itemsize * float(length * config.model.dim)
    _count(model, parts)
    mixture = config.model.moe if isinstance(config.model, MoEGPTConfig) else None
    for block, part in zip(model.blocks, parts[1:-1], strict=True):
        if mixture is not None and isinstance(block, MoEBlock):
            part.rows = boundary * mixture.top * min(1.0, mixture.capacity or 1.0)
    shared = {id(p) for p in _ends(model, model.entrance)} & {id(p) for p in _ends(model, model.exit)}
    tied = sum(p.size for p in model.named_parameters().values() if id(p) in shared)
    found = Profile(parts[0], list(parts[1:-1]), parts[-1], boundary, float(tied), kv_heads, itemsize, number, tokens)
    if isinstance(config.model, GPTConfig | BERTConfig):
        found.length, found.query_heads = config.model.sequence, config.model.heads
        found.causal = config.model.kind != "bert"
        found.kv_bytes = 2 * boundary * kv_heads / config.model.heads
    found.experts = 0 if mixture is None else mixture.experts
    return found


def _shortened(config: Config) -> tuple[Config, list[int]]:
    """With one block of each kind, and which of them each block of the whole model is like."""
    model = config.model
    assert isinstance(model, GPTConfig | BERTConfig)
    if not isinstance(model, MoEGPTConfig):
        return msgspec.structs.replace(config, model=msgspec.structs.replace(model, layers=1)), [0] * model.layers
    every = model.moe.every
    free = model.moe.router == "top"  # the other router needs a capacity, and all experts have rows
    moe = msgspec.structs.replace(model.moe, capacity=None if free else model.moe.capacity)
    short = msgspec.structs.replace(config, model=msgspec.structs.replace(model, layers=every, moe=moe))
    return short, [every - 1 if i % every == every - 1 else 0 for i in range(model.layers)]


def _ends(model: Model, names: Sequence[str]) -> list[Any]:
    modules = [getattr(model, name) for name in names]
    return [p for module in modules if module is not None for p in module.named_parameters().values()]


def _count(model: Model, parts: Sequence[Part]) -> None:
    """Elements of the parameters of each part, from the outline of the whole model."""
    groups = [_ends(model, model.entrance), *(list(b.named_parameters().values()) for b in model.blocks)]
    for part, parameters in zip(parts, [*groups, _ends(model, model.exit)], strict=True):
        part.parameters = Amount()
        for parameter in parameters:
            name = parameter.name
            if re.search(r"attention\.(qkv\.|out\.weight)", name):
                kind = "heads"
            elif ".moe.experts." in name:
                kind = "experts"
            elif re.search(r"(mlp|shared)\.((up|gate)\.|down\.weight)|^(embedding|head)\.|\.linear\.", name):
                kind = "units"
            else:
                kind = "whole"
            add(part.parameters, kind, parameter.size)
