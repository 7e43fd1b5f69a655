"""What the trainer knows of data: numbered samples, in batches of arrays.

    Data ─┬─ train       Dataset: batch(indices) -> {"inputs": …, "targets": …}
          ├─ validation  Dataset of other samples, None when the fraction is 0
          └─ vocabulary, tokenizer, entropy, …

Two kinds of samples exist: windows of a token stream (`tokens.py`) and rows of a matrix (`rows.py`).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dtrain.arrays import Array
from dtrain.data.tokenizer import Tokenizer


class Dataset(Protocol):
    """Samples 0..len-1, read only; every rank has all of them, mostly memory-mapped."""

    def __len__(self) -> int:
        """The number of samples."""

    def batch(self, indices: Array) -> dict[str, Array]:
        """The samples at `indices` (B,) int64, as new arrays.

        Tokens: inputs (B, T) and targets (B, T) int32; rows: inputs (B, F) float32 and targets (B,) int32,
        with categories also ids (B, columns, longest bag) int32.
        """


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on."""

    train: Dataset
    validation: Dataset | None
    vocabulary: int
    """Ids that inputs and targets can have, with the mask token if asked for; of rows: the number of classes."""
    description: str
    """One line for the log."""
    entropy: float
    """Nats per target of a model that knows only how often each target occurs: a trained model's loss must be lower."""
    fingerprint: str
    """Hash of the content, the same on all machines that read the same data."""
    tokenizer: Tokenizer | None = None
    """None when the data did not start as text."""
    mask_token: int | None = None
    """The id that hides a token from BERT."""
    features: int = 0
    """Width F of the inputs of rows; 0 for tokens."""
    tables: tuple[int, ...] = ()
    """Rows of the embedding table of each categorical column."""


def unigram_entropy(tokens: Array, vocabulary: int) -> float:
    """Entropy in nats of the frequencies of `tokens` (any shape, 0 <= token < vocabulary)."""
    return entropy_of_counts(np.bincount(tokens.ravel(), minlength=vocabulary))


def entropy_of_counts(counts: Array) -> float:
    """Entropy in nats of a distribution given by its counts (N,)."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))
