"""Optimizers: fused updates of flat buffers, one row each in OPTIMIZERS.

optimizer = build(config.optimizer, flat)
norm = global_norm(flat)
optimizer.step(learning_rate, scale=clip_factor(norm, config.optimizer.clip_norm))
"""

from collections.abc import Sequence

from dtrain.config import OptimizerConfig
from dtrain.flat import FlatBuffers
from dtrain.optimizers.adafactor import Adafactor
from dtrain.optimizers.adam import Adam, AdamW
from dtrain.optimizers.base import Optimizer
from dtrain.optimizers.clipping import clip_factor, global_norm, sum_squares
from dtrain.optimizers.lamb import LAMB
from dtrain.optimizers.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "lamb": LAMB,
    "adafactor": Adafactor,
}


def build(config: OptimizerConfig, flat: FlatBuffers, ranges: Sequence[slice] | None = None) -> Optimizer:
    """The optimizer that the configuration names, for all of `flat` or for one range of elements per group of it."""
    return OPTIMIZERS[config.kind](config, flat, ranges)


__all__ = ["OPTIMIZERS", "Optimizer", "build", "clip_factor", "global_norm", "sum_squares"]
