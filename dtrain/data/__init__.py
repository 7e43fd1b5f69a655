"""Data: what the samples are (`DATASETS`, one row per kind) and in which order they come (`sampler`).

config.data ──open_data──► Data(train, validation, …) ──batch(sampler.indices(start, count))──► arrays
"""

from collections.abc import Callable
from typing import Any

from dtrain.config import Config, DataConfig, DLRMConfig, MLPConfig
from dtrain.data.dataset import Data, Dataset, unigram_entropy
from dtrain.data.images import open_images
from dtrain.data.masking import masked
from dtrain.data.sampler import Sampler, share
from dtrain.data.tables import open_table
from dtrain.data.text import open_text
from dtrain.data.tokenizer import Tokenizer
from dtrain.data.tokenizer import load as load_tokenizer
from dtrain.data.tokens import open_tokens

DATASETS: dict[str, Callable[[Any, int, int, int | None, bool], Data]] = {
    "text": open_text,
    "tokens": open_tokens,
    "images": open_images,
    "table": open_table,
}


def open_data(
    config: DataConfig, sequence: int = 0, seed: int = 0, vocabulary: int | None = None, mask: bool = False
) -> Data:
    """Open the data of a run; every rank does this for itself, and the first on a machine fills the cache.

    `sequence` is the window of token data; `vocabulary` what the model has (of rows: its classes), None to follow the
    data; `mask` adds the id that hides tokens to the vocabulary. A UserError names the key, the path and the remedy.
    """
    return DATASETS[config.kind](config, sequence, seed, vocabulary, mask)


def data_of(config: Config) -> Data:
    """The data of a run, as its model asks for it."""
    model = config.model
    if isinstance(model, MLPConfig | DLRMConfig):
        return open_data(config.data, seed=config.seed)
    return open_data(config.data, model.sequence, config.seed, model.vocabulary, mask=model.kind == "bert")


__all__ = [
    "DATASETS",
    "Data",
    "Dataset",
    "Sampler",
    "Tokenizer",
    "data_of",
    "load_tokenizer",
    "masked",
    "open_data",
    "share",
    "unigram_entropy",
]
