"""Amounts of work and memory, by what tensor parallelism does to them, and those of a part of a model.

whole    on every rank of tp               the input of a column-parallel layer
tokens   on every rank, or 1/tp            norms, the residual stream: cut with `parallel.sequence`
heads    whole key/value heads             qkv, attention; uneven where tp does not divide the heads
units    1/tp                              MLP, embedding, head, logits
experts  1/tp of 1/ep                      parameters of experts
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Amount:
    """A number by how tensor parallelism cuts it."""

    whole: float = 0.0
    tokens: float = 0.0
    heads: float = 0.0
    units: float = 0.0
    experts: float = 0.0

    def on_grid(self, rows: int, columns: int, kv_heads: int) -> float:
        """What the fullest rank of a grid has, where samples are cut over rows and all else over columns."""
        share = -(-kv_heads // columns) / kv_heads
        return ((self.whole + self.tokens + self.units) / columns + self.heads * share) / rows

    def on_rank(self, tp: int, sequence: bool, kv_heads: int, ep: int = 1) -> float:
        """What the fullest of `tp` x `ep` ranks has."""
        share = -(-kv_heads // tp) / kv_heads
        cut = self.units / tp + self.experts / tp / ep
        return self.whole + self.tokens / (tp if sequence else 1) + self.heads * share + cut


@dataclass
class Part:
    """One block, or one of the two ends; FLOPs, bytes and ops are of one sample and of the forward."""

    flops: Amount = field(default_factory=Amount)
    moved: Amount = field(default_factory=Amount)
    """Bytes of all outputs."""
    saved: Amount = field(default_factory=Amount)
    """Bytes kept for the backward."""
    parameters: Amount = field(default_factory=Amount)
    """Elements."""
    ops: Amount = field(default_factory=Amount)
    """Ops of the forward: each costs some time however small it is."""
    largest: Amount = field(default_factory=Amount)
    """Bytes of the largest output: the working memory of a backward is a few of them."""
    rows: float = 0.0
    """Bytes that go to the experts of a mixture, and come back."""
    matrices: int = 0
    """Products with weights."""
    norms: int = 0
    fed: float = 0.0
    """Bytes that a grid of ranks broadcasts along its rows for them: what goes in, of logits what comes out."""
    made: float = 0.0
    """Bytes of their results."""


def total(amount: Amount) -> float:
    """The number when nothing is cut."""
    return amount.whole + amount.tokens + amount.heads + amount.units + amount.experts
