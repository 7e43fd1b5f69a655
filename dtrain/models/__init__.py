"""Models, one row each in MODELS. They contain no parallel code: strategies transform them.

    model = build(config.model, data, dtype="float32", seed=0)
    loss = model.loss(batch)

A loss is the SUM over the model.count(batch) targets of the batch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.arrays import named_dtype
from dtrain.config import ModelConfig
from dtrain.models.base import Model, Sizes
from dtrain.models.bert import BERT
from dtrain.models.dlrm import DLRM
from dtrain.models.gpt import GPT
from dtrain.models.mlp import MLP
from dtrain.models.moe import MoEGPT

MODELS: dict[str, Callable[[Any, Sizes, Any], Model]] = {
    "gpt": GPT,
    "moe_gpt": MoEGPT,
    "bert": BERT,
    "mlp": MLP,
    "dlrm": DLRM,
}


def outline(config: ModelConfig, data: Sizes, dtype: Any = "float32") -> Model:
    """The model with shapes and names but without values or memory for them: to be counted, or cut and then filled."""
    return MODELS[config.kind](config, data, named_dtype(dtype) if isinstance(dtype, str) else np.dtype(dtype))


def build(config: ModelConfig, data: Sizes, dtype: Any = "float32", seed: int = 0) -> Model:
    """The model that the configuration describes, with its initial values: a function of the seed alone.

    UserError where the model's vocabulary is smaller than that of the data.
    """
    model = outline(config, data, dtype)
    model.materialise(seed)
    return model


__all__ = ["MODELS", "Model", "Sizes", "build", "outline"]
