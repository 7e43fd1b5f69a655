"""Embedding parallelism: every rank has a part of the tables, and looks up for the samples of all ranks.

    rank 0   dense 0 ── bottom ─────────────────────────────┐
             ids 0 ─┐                    ┌─ all_to_all ─► vectors of samples 0 ── pairs ── top ── loss
                    ├─ all_gather ── look up in my part     (backward: their gradients go the same way back)
             ids 1 ─┘  (integers)        └─ all_to_all ─► vectors of samples 1 ── …
    rank 1   dense 1 ── bottom ─────────────────────────────┘

The tables are model-parallel and the MLPs data-parallel on the same ranks; one all_to_all turns the one cut into the
other, forward, and one backward. How the tables are cut is data (`plan.py`): whole tables, rows, or columns. A bag is
summed where its rows are, and only bags with ids there travel: b·T·dim numbers to a rank of b samples and T tables
(of rows, with bags of several ids, up to as many sums as a bag has owners).

Invariant: a table's gradient is that of the whole batch on its owner. It lies cut over `dp`, so nobody sums it again.
References: Naumov et al., arXiv:1906.00091, section 3; Mudigere et al., arXiv:2104.05158 (table-, row-, column-wise).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.mesh import Mesh
from dtrain.models.dlrm import DLRM
from dtrain.modules import Module
from dtrain.strategies.embedding.exchange import exchange
from dtrain.strategies.embedding.plan import PLANS, Plan
from dtrain.strategy import Microbatch, Strategy
from dtrain.tensor import Tensor

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

NONE = -1


class EmbeddingParallel(Strategy):
    """Parts of the embedding tables along the `dp` axis."""

    axis = "dp"
    alone = False

    def __init__(self, kind: str, micro_batch: int) -> None:
        """kind: a row of PLANS; micro_batch: the most samples that a rank looks up at once."""
        self.kind, self.micro_batch = kind, micro_batch

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Cut the tables; the model asks us for its vectors."""
        assert isinstance(model, DLRM)
        self.comm, self.model = mesh["dp"], model
        self.weights = [table.named_parameters()["weight"] for table in model.tables]
        self.plan: Plan = PLANS[self.kind]([weight.whole for weight in self.weights], self.comm.size)
        for weight, shard in zip(self.weights, self.plan.shards, strict=True):
            weight.cut(mesh, weight.layout.with_(dp=shard))
        model.look_up = self.look_up  # type: ignore[method-assign]
        return model

    def look_up(self, ids: Array) -> Tensor:
        """Ids (b, T, L) of my samples -> the sums of their bags (b, T, dim). Collective."""
        if len(ids) > self.micro_batch:
            raise ValueError(f"{len(ids)} samples at once; the strategy was made for {self.micro_batch} at most")
        # Samples that are not there have empty bags, so all ranks send as much: one all_gather without lengths.
        padded = np.full((self.micro_batch, *ids.shape[1:]), NONE, np.int32)
        padded[: len(ids)] = ids
        everyone = self.comm.all_gather(padded.reshape(-1)).reshape(-1, *ids.shape[1:])
        mine = self.plan.bags(everyone, self.comm.rank)
        sums = []
        for t, weight in enumerate(self.weights):
            bags = everyone[mine[:, t], t]
            first, last = self.plan.rows[self.comm.rank][t]
            here = (bags >= first) & (bags < last)
            sums.append(F.embedding_bag(weight, np.where(here, bags - first, NONE)))
        arriving = [self.plan.bags(ids, owner) for owner in range(self.comm.size)]
        return exchange(F.concat(sums, dim=0), self.comm, mine, arriving, self.plan.columns)

    def evaluate(self, trainer: Trainer, microbatches: Iterable[Microbatch]) -> tuple[float, float]:
        """The forwards; a rank that has fewer of them than others still looks up for these."""
        portions = list(microbatches)
        rounds = int(self.comm.all_reduce(np.array([len(portions)]), "max")[0])
        result = trainer.evaluate(portions)
        shape = (0, len(self.weights), 1) if not portions else (0, *portions[0][0]["ids"].shape[1:])
        for _ in range(rounds - len(portions)):
            self.look_up(np.zeros(shape, np.int32))
        return result

    def notes(self) -> list[str]:
        """How much of the tables this rank has, and how even that is."""
        held = self.plan.elements()
        return [
            f"embedding tables by {self.kind}: {sum(held):,} numbers, this rank has {held[self.comm.rank]:,}, "
            f"the most of any rank is {max(held) * len(held) / max(1, sum(held)):.2f} of an even share"
        ]
