"""The graph of a step of any batch and any length, from traces of one and two samples of a few tokens.

    traces   1 sample, 20 tokens │ 2 samples, 20 tokens │ 1 sample, 40 tokens │ 1 sample, 60 tokens

A dim that doubles with the samples is one of samples, with the tokens one of tokens; FLOPs are linear in samples and a
polynomial of degree two in tokens. So a batch of 64 x 1024 tokens and a vocabulary of 10^5 is described without being
computed. Weights are zeros that were never written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from dtrain import models
from dtrain.arrays import Array
from dtrain.config import BERTConfig, Config, GPTConfig
from dtrain.data import Data
from dtrain.graph import Graph, Leaf, capture, tracing
from dtrain.launch.plan.trace import LENGTHS, sample
from dtrain.op import Shape


def recorded(config: Config, data: Data, samples: int) -> Graph:
    """The ops of a forward of `samples` samples, with their shapes, FLOPs and bytes."""
    if not isinstance(config.model, GPTConfig | BERTConfig):
        one, two = (_trace(config, data, _rows(data, number)) for number in (1, 2))
        return _extended(one, two, [one], [1], samples, 1)
    alone = [_trace(_of_length(config, each), data, sample(config, data, each, 1)) for each in LENGTHS]
    two = _trace(_of_length(config, LENGTHS[0]), data, sample(config, data, LENGTHS[0], 2))
    return _extended(alone[0], two, alone, LENGTHS, samples, config.model.sequence)


def _of_length(config: Config, length: int) -> Config:
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, sequence=length))


def _rows(data: Data, number: int) -> dict[str, Array]:
    return data.train.batch(np.arange(number))


def _trace(config: Config, data: Data, batch: dict[str, Array]) -> Graph:
    model = models.outline(config.model, data, config.train.dtype)
    for parameter in model.named_parameters().values():
        parameter.data = np.zeros(parameter.shape, parameter.dtype)
    with tracing():
        loss = model.loss(batch)
    return capture(loss)


def _extended(
    one: Graph, two: Graph, alone: Sequence[Graph], lengths: Sequence[int], samples: int, length: int
) -> Graph:
    """The graph of `samples` samples of `length` tokens."""
    weights = [math.prod([(length - b) / (a - b) for b in lengths if b != a]) for a in lengths]
    leaves: dict[int, Leaf] = {}
    lines = []
    for i, line in enumerate(one.lines):
        same = [graph.lines[i] for graph in alone]
        longer = same[min(1, len(same) - 1)]

        def at(shape: Shape, more: Shape, long: Shape) -> Shape:
            return tuple(
                round(a * (samples if b != a else 1) * (length / lengths[0] if c != a else 1))
                for a, b, c in zip(shape, more, long, strict=True)
            )

        shape = at(line.shape, two.lines[i].shape, longer.shape)
        inputs = tuple(map(at, line.input_shapes, two.lines[i].input_shapes, longer.input_shapes))
        flops = sum(w * each.flops for w, each in zip(weights, same, strict=True))
        flops *= samples if two.lines[i].flops != line.flops else 1
        nbytes = line.bytes // max(1, math.prod(line.shape)) * math.prod(shape)
        sources = tuple(
            leaves.setdefault(id(s), _leaf(s, own)) if isinstance(s, Leaf) else s
            for s, own in zip(line.inputs, inputs, strict=True)
        )
        lines.append(replace(line, inputs=sources, input_shapes=inputs, shape=shape, flops=round(flops), bytes=nbytes))
    return Graph(tuple(lines))


def _leaf(leaf: Leaf, shape: Shape) -> Leaf:
    return replace(leaf, shape=shape, bytes=leaf.bytes // max(1, math.prod(leaf.shape)) * math.prod(shape))


def heads(config: Config) -> int:
    """Key/value heads, 1 where there are none."""
    model = config.model
    if not isinstance(model, GPTConfig | BERTConfig):
        return 1
    return model.heads if model.kv_heads is None else model.kv_heads
