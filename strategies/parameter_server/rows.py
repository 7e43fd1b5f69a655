"""Embeddings whose rows travel alone: a worker pulls those that its samples look up, and pushes their gradients.

    ids of a microbatch   3 7 3 9  ─►  distinct 3 7 9  ─►  not here yet: 7 9  ─►  pull, from the servers that have them

So a table costs the distinct ids of a work, whatever its length. What else uses the weight would find old rows: only
the weight of one embedding, used nowhere else, may travel so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.errors import UserError
from dtrain.models import Model
from dtrain.modules import Embedding
from dtrain.tensor import Tensor


class Rows:
    """An embedding whose rows come when they are needed: `forward` pulls those that this work has not pulled yet."""

    def __init__(self, embedding: Embedding, pull: Callable[[str, Array], None]) -> None:
        """pull(name, ids): get these rows of the table."""
        self.weight, self._pull = embedding.weight, pull
        self.ids = np.empty(0, np.int64)
        """Distinct, ascending: those whose rows are of this work."""
        embedding.forward = self.forward  # type: ignore[method-assign]

    def forward(self, ids: Array) -> Tensor:
        """As Embedding.forward."""
        distinct = np.unique(ids).astype(np.int64)
        fresh = np.setdiff1d(distinct, self.ids, assume_unique=True)
        if fresh.size:
            self._pull(self.weight.name, fresh)
            self.ids = np.union1d(self.ids, fresh)
        return F.embedding(self.weight, ids)


def check_sparse(model: Model, modules: Mapping[str, object], name: str) -> Embedding:
    """The embedding of that name, whose weight is used nowhere else; UserError."""
    paths: dict[int, int] = {}
    for _, part in model.walk():
        paths[id(part)] = paths.get(id(part), 0) + 1
    fitting = {
        path: each for path, each in modules.items() if isinstance(each, Embedding) and paths[id(each.weight)] == 1
    }
    if name not in fitting:
        allowed = f"allowed: {', '.join(fitting)}" if fitting else "this model has none (model.tied: false?)"
        raise UserError(
            f"parameter_server.sparse: {name}; must be an embedding whose weight nothing else uses; {allowed}"
        )
    return fitting[name]
