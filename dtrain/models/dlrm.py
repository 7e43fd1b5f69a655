"""DLRM, a recommender: numbers through an MLP, categories through embedding tables, all pairs compared, an MLP decides.

    dense  (B, F) ── bottom MLP ──────────► z0 ─┐
    ids    (B, T, L) ── table 0, sum of bag ► z1 ─┼─ z_i · z_j for i < j ─┐
                     ── table 1 ───────────► z2 ─┘                        ├─ top MLP ── head ──► logit of "yes"
                                             z0 ──────────────────────────┘

Nearly all parameters are rows of tables, of which a batch touches few; nearly all work is in the MLPs. So the tables
are cut over ranks while the MLPs are data-parallel (strategies/embedding). The logistic loss is written as the
cross-entropy of the logits (0, x): softmax of two is the logistic function of their difference.
Initial values as the paper's code: tables N(0, 1 / rows), MLPs as in `mlp.py`.
Reference: Naumov et al., "Deep learning recommendation model", arXiv:1906.00091.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.config import DLRMConfig
from dtrain.errors import UserError
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.models.auc import auc
from dtrain.models.base import IGNORED, Model, Sizes
from dtrain.models.mlp import Layer, initial_std
from dtrain.modules import Context, Embedding, Linear, Module
from dtrain.tape import mode
from dtrain.tensor import Tensor


class DLRM(Model):
    """Numbers (B, F) and ids (B, tables, longest bag) -> logits of "no" (always 0) and "yes", (B, 2)."""

    entrance = ("bottom", "tables")
    exit = ("head",)

    def __init__(self, config: DLRMConfig, sizes: Sizes, dtype: Any = np.float32) -> None:
        if sizes.vocabulary != 2:
            raise UserError(f"data.target: {sizes.vocabulary} classes; model.kind: dlrm decides between 2")
        if not sizes.features:
            raise UserError("data.categories: name all columns but the target; model.kind: dlrm needs one of numbers")
        self.dtype = np.dtype(dtype)
        widths = [sizes.features, *config.bottom, config.dim]
        self.bottom: list[Module] = [Layer(widths[i], widths[i + 1], config, dtype) for i in range(len(widths) - 1)]
        self.tables: list[Module] = [Embedding(rows, config.dim, 1 / math.sqrt(rows), dtype) for rows in sizes.tables]
        vectors = 1 + len(self.tables)
        self.first, self.second = np.triu_indices(vectors, 1)  # all pairs of vectors
        widths = [config.dim + len(self.first), *config.top]
        self.blocks = [Layer(widths[i], widths[i + 1], config, dtype) for i in range(len(config.top))]
        self.head = Linear(widths[-1], 1, config.bias, initial_std(widths[-1], "head"), dtype)
        self.judged: list[tuple[Array, Array]] = []
        """Scores and targets of the validation that is under way."""
        self.assign_names()

    def forward(self, dense: Array, ids: Array, context: Context | None = None) -> Tensor:  # type: ignore[override]
        """Numbers (B, F), ids (B, T, L), -1 for none -> logits (B, 2)."""
        return self.leave(self.through_blocks(self.meet(dense, ids, context), context))

    def loss(self, batch: Mapping[str, Array], context: Context | None = None) -> Tensor:
        """The SUM of the logistic losses (nats) of all targets."""
        x = self.meet(batch["inputs"], batch["ids"], context)
        logits = self.leave(self.through_blocks(x, context))
        if not mode.grad:  # a validation
            counts = batch["targets"] != IGNORED
            self.judged.append((logits.data[counts, 1].astype(np.float64), batch["targets"][counts]))
        return self.cross_entropy(logits, batch["targets"])

    def after_validation(self, mesh: Mesh) -> dict[str, float]:
        """The area under the ROC curve, exact: of all samples on all ranks."""
        scores, targets = (np.concatenate([each[i] for each in self.judged] or [np.empty(0)]) for i in range(2))
        self.judged.clear()
        comm = mesh[BATCH_AXES]
        with comm.counters.purpose("validation"):
            counts = comm.all_gather(np.array([len(scores)], np.int64)).tolist()
            everyone = comm.all_gather(np.stack([scores, targets.astype(np.float64)], axis=1), counts=counts)
        return {"auc": auc(everyone[:, 0], everyone[:, 1])} if len(everyone) else {}

    def meet(self, dense: Array, ids: Array, context: Context | None = None) -> Tensor:
        """What goes into the top MLP: the bottom MLP's vector, and the products of all pairs of vectors."""
        x = self.enter(dense, context)
        z = F.concat([x.reshape(len(dense), 1, x.shape[-1]), self.look_up(ids)], dim=1)
        products = z @ z.swapaxes(1, 2)
        return F.concat([x, products[:, self.first, self.second]], dim=1)

    def enter(self, inputs: Array, context: Context | None = None) -> Tensor:
        """Numbers (B, F) -> the vector of the bottom MLP (B, dim)."""
        x = Tensor(inputs.astype(self.dtype, copy=False))
        for layer in self.bottom:
            x = layer(x, context)
        return x

    def look_up(self, ids: Array) -> Tensor:
        """Ids (B, T, L), -1 for none -> the sums of the rows of each bag (B, T, dim)."""
        return F.stack([F.embedding_bag(table.weight, ids[:, t]) for t, table in enumerate(self.tables)], dim=1)  # type: ignore[attr-defined]

    def leave(self, x: Tensor) -> Tensor:
        """From the last hidden layer to the logits (B, 2), of which the first is 0."""
        yes = self.head(x)
        return F.concat([Tensor(np.zeros_like(yes.data)), yes], dim=1)
