"""Which token goes to which expert: pure functions on arrays of scores.

    scores (B, T, E) ── top_k ──────────► choices (B, T, k): the k best experts of every token    Switch k=1, GShard k=2
                     ── expert_choice ──► the best tokens of every expert
    choices ── within_capacity ──► the same without those for which an expert has no room
    marks (B, T, E): which expert takes which token ── Plan ──► rows sorted by expert

Room is counted within a sequence: an expert takes at most `capacity` of its tokens. So what is dropped depends on the
sequence alone, never on micro-batch, batch or layout, and no rank needs to ask another but for tokens of the same
sequence. First come the first choices of all tokens in their order, then the second choices, and so on. Among equal
scores the lower index wins.

References: Fedus et al., Switch Transformer, arXiv:2101.03961; Lepikhin et al., GShard, arXiv:2006.16668 (groups of
tokens with room of their own); Zhou et al., expert choice, arXiv:2202.09368.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dtrain import random
from dtrain.arrays import Array


@dataclass(frozen=True)
class Plan:
    """R rows, sorted by expert and within an expert by token."""

    tokens: Array
    """(R,) the token of each row, counted over the whole microbatch."""
    experts: Array
    """(R,) the expert of each row."""
    counts: Array
    """(E,) rows per expert."""

    @classmethod
    def of(cls, taken: Array) -> Plan:
        """The plan where taken[b, t, e] says whether expert e takes token t of sequence b."""
        experts, tokens = np.nonzero(taken.reshape(-1, taken.shape[2]).T)
        return cls(tokens, experts, taken.sum(axis=(0, 1)))


def capacity(tokens: int, experts: int, top: int, factor: float) -> int:
    """Rows that an expert takes of a sequence: its even share of `top` rows per token, times `factor`, rounded up."""
    return min(tokens, math.ceil(round(top * tokens * factor / experts, 9)))


def top_k(scores: Array, top: int) -> Array:
    """Scores (..., E) -> the `top` best experts (..., top), the best first."""
    if top == 1:
        best: Array = scores.argmax(axis=-1)[..., None]
    else:
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :top]
    return best


def within_capacity(choices: Array, experts: int, room: int) -> Array:
    """Choices (B, T, k) -> which of them are kept, booleans of the same shape."""
    batch, tokens, top = choices.shape
    queue = choices.swapaxes(1, 2).reshape(batch, top * tokens)  # the order in which they come
    keys = (queue + np.arange(batch)[:, None] * experts).reshape(-1)
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=batch * experts))[:-1]])
    places = np.empty(len(keys), np.int64)
    places[order] = np.arange(len(keys)) - starts[keys[order]]
    return (places < room).reshape(batch, top, tokens).swapaxes(1, 2)


def marked(choices: Array, experts: int, which: Array | bool = True) -> Array:
    """Choices (B, T, k), and which of them count -> booleans (B, T, E)."""
    marks = np.zeros((*choices.shape[:2], experts), bool)
    np.put_along_axis(marks, choices, which, axis=2)
    return marks


def expert_choice(scores: Array, room: int) -> Array:
    """Scores (B, T, E) -> booleans of the same shape: every expert takes its `room` best tokens of every sequence."""
    marks = np.zeros(scores.shape, bool)
    np.put_along_axis(marks, np.argsort(-scores, axis=1, kind="stable")[:, :room], True, axis=1)
    return marks


def noise(seed: int, name: str, step: int, row_ids: Array, shape: tuple[int, int]) -> Array:
    """N(0, 1) for every sample, (B, T, E): of a sample the same on every rank and in every micro-batch."""
    draws = [random.generator(seed, "router noise " + name, step, row).standard_normal(shape) for row in row_ids]
    return np.stack(draws) if draws else np.zeros((0, *shape))
