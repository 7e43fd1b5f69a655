"""Tensor parallelism on a grid: `parallel.tensor: 2d`, every matrix and every activation in blocks of 1/tp.

    tp = q x r ranks      row i     samples i of every microbatch (all tokens of each: attention needs no message)
                          column j  columns j of all activations, heads j, hidden units j, part j of the vocabulary

    embedding   own rows of the table for all samples, reduce_scatter along the column: every row keeps its samples
    block       norm ── SUMMA qkv ── own heads, own samples ── SUMMA out ── + ── norm ── SUMMA up ── SUMMA down ── +
    loss        own samples, from logits that are cut over columns (as in 1-D); the sum over the rows is the loss

Every rank of tp reads the same samples, as in 1-D; they are cut where the entrance ends, and what comes out is whole
again (`Model.forward`), or the same number everywhere (`Model.loss`). So other strategies see nothing new, and layouts
say the rest: matrices are cut over `tp_row` and `tp_column`; vectors over `tp_column`, with gradients to be summed over
`tp_row`.

Per rank 1/tp of the matrices and of all activations; vectors and learned positions 1/r. In 1-D the activations between
the branches are whole on every rank, or 1/tp with `sequence`, but gathered for every product.
Reference: Xu, Li, Gong, You, "An efficient 2D method for training super-large deep learning models" (Optimus),
arXiv:2104.05343.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dtrain import conjugate
from dtrain.arrays import Array
from dtrain.collectives.dtypes import cut
from dtrain.errors import UserError
from dtrain.layout import Partial, Shard
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.models.bert import BERT
from dtrain.models.blocks import Attention
from dtrain.models.gpt import GPT
from dtrain.models.mlp import MLP
from dtrain.modules import Context, Dropout, Embedding, LayerNorm, Linear, Module, RMSNorm
from dtrain.parameter import Parameter
from dtrain.strategies.tensor import layers
from dtrain.strategies.tensor.summa import Grid, Panels, panels
from dtrain.strategies.tensor.summa_layers import GridDropout, GridHead, GridLinear, GridNorm, block
from dtrain.strategy import Strategy
from dtrain.tensor import Tensor

ROWS, COLUMNS = "tp_row", "tp_column"
SAMPLES = 0  # the dim of activations that the rows cut
FIRST = Shard(0)


class SummaParallel(Strategy):
    """Blocks of all layers on the grid of `tp_row` and `tp_column`."""

    axis = "tp"

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Cut the parameters, replace the modules."""
        if type(model) not in CUTS:
            allowed = ", ".join(kind.__name__ for kind in CUTS)
            raise UserError(f"parallel.tensor: 2d; cannot cut {type(model).__name__}; allowed: {allowed}")
        assert isinstance(model, Model)
        self.mesh, self.model = mesh, model
        self.grid = Grid(along_row=mesh[COLUMNS], along_column=mesh[ROWS])
        CUTS[type(model)](self, model)
        self._loss_of_my_samples(model)
        return model

    def notes(self) -> list[str]:
        """The grid."""
        rows, columns = self.grid.along_column.size, self.grid.along_row.size
        return [f"tensor: blocks on a grid of {rows} x {columns} ranks; this one is in row {self.grid.row}, column "
                f"{self.grid.column}"]  # fmt: skip

    # What the modules are replaced with

    def panels(self, length: int, by_column: list[int] | None = None) -> Panels:
        """Of a dim that columns and rows cut evenly, or columns into these lengths."""
        size = self.grid.along_row.size
        return panels(by_column or cut(length, size), cut(length, self.grid.along_column.size))

    def linear(self, module: Linear, outputs: Shard = FIRST, by_column: list[int] | None = None) -> Linear:
        """outputs: how the columns cut them; by_column: how they cut the inputs (None: evenly)."""
        self.cut(module.weight, {COLUMNS: outputs, ROWS: Shard(1)})
        self.vector(module.bias, outputs)
        return GridLinear(module, self.panels(module.weight.whole[1], by_column), self.grid)

    def head(self, module: Linear) -> Linear:
        """A head of logits, that are cut over columns."""
        self.cut(module.weight, {ROWS: Shard(0), COLUMNS: Shard(1)})
        self.vector(module.bias)
        return GridHead(module, self.panels(module.weight.whole[0]), self.grid)

    def norm(self, module: LayerNorm | RMSNorm) -> GridNorm:
        """A norm of activations that are cut over columns."""
        width = module.weight.whole[0]
        self.vector(module.weight)
        self.vector(getattr(module, "bias", None))
        return GridNorm(module, width, self.grid.along_row)

    def embedding(self, module: Embedding) -> Embedding:
        """Ids of all samples -> the vectors of mine."""
        count = module.weight.whole[0]
        self.cut(module.weight, {ROWS: Shard(0), COLUMNS: Shard(1)})
        comm = self.grid.along_column
        return layers.VocabularyEmbedding(module, comm, count, lambda y: conjugate.reduce_scatter(y, comm, SAMPLES))

    def attention(self, module: Attention) -> Attention:
        """Own heads of own samples."""
        heads = layers.cut_heads(module, self.grid.along_row.size)
        module.qkv = self.linear(module.qkv, Shard(0, heads.packed))
        module.out = self.linear(module.out, by_column=[stop - start for ((start, stop),) in heads.mixed])
        module.heads, module.kv_heads = heads.counts[self.grid.column]
        return module if module.heads else layers.NoHeads(module)

    def cut(self, parameter: Parameter, shards: Mapping[str, Shard]) -> None:
        """Keep this rank's block."""
        if not set(parameter.layout.axes(Shard)) & {ROWS, COLUMNS}:  # tied ones are met twice
            parameter.cut(self.mesh, parameter.layout.with_(**shards))

    def vector(self, parameter: Parameter | None, shard: Shard = FIRST) -> None:
        """Keep this column's part of what all rows have; the gradient comes from my samples only."""
        if parameter is not None:
            self.cut(parameter, {COLUMNS: shard})
            parameter.gradient_layout = parameter.gradient_layout.with_(tp_row=Partial())

    # What goes in and comes out

    def mine(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """My samples."""
        return {name: array[block(len(array), self.grid.along_column)] for name, array in batch.items()}

    def _loss_of_my_samples(self, model: Model) -> None:
        loss_from, forward, classes = model.loss_from, model.forward, model.head.weight.whole[0]  # type: ignore[attr-defined]

        def loss(x: Tensor, batch: Mapping[str, Array]) -> Tensor:
            return conjugate.all_reduce(loss_from(x, self.mine(batch)), self.grid.along_column)

        def logits(inputs: Array, context: Context | None = None) -> Tensor:
            own = conjugate.gather(forward(inputs, context), self.grid.along_row, -1, classes)
            return conjugate.gather(own, self.grid.along_column, SAMPLES, len(inputs))

        model.loss_from, model.forward = loss, logits  # type: ignore[method-assign]
        model.cross_entropy = partial(layers.cross_entropy, comm=self.grid.along_row, vocabulary=classes)  # type: ignore[method-assign]


def _transformer(strategy: SummaParallel, model: Any) -> None:
    width = model.embedding.weight.whole[1]
    model.embedding = strategy.embedding(model.embedding)
    if model.positions is not None:
        strategy.vector(model.positions.weight, Shard(1))
    model.head = strategy.head(model.head)
    for part in model.blocks:
        part.attention = strategy.attention(part.attention)
    _replace(model, strategy, lambda dropout: width)


def _mlp(strategy: SummaParallel, model: Any) -> None:
    enter = model.enter
    widths: dict[Module, int] = {part.dropout: part.linear.weight.whole[0] for part in model.blocks}

    def enter_cut(inputs: Array, context: Context | None = None) -> Tensor:
        x = enter(inputs[block(len(inputs), strategy.grid.along_column)], context).data
        return Tensor(np.ascontiguousarray(x[:, block(x.shape[1], strategy.grid.along_row)]))

    model.enter = enter_cut
    _replace(model, strategy, lambda dropout: widths[dropout])


def _replace(module: Module, strategy: SummaParallel, width: Callable[[Dropout], int]) -> None:
    """Every linear layer, norm and dropout below; those that are replaced already stay."""
    styles: dict[type[Module], Callable[[Any], Module]] = {
        Linear: strategy.linear,
        LayerNorm: strategy.norm,
        RMSNorm: strategy.norm,
        Dropout: lambda dropout: GridDropout(dropout, width(dropout), strategy.grid),
    }
    for name, part in list(vars(module).items()):
        if type(part) in styles:
            setattr(module, name, styles[type(part)](part))
            continue
        for each in part if isinstance(part, list) else [part]:
            if isinstance(each, Module):
                _replace(each, strategy, width)


CUTS: dict[type[Module], Callable[[SummaParallel, Any], None]] = {GPT: _transformer, BERT: _transformer, MLP: _mlp}

__all__ = ["SummaParallel"]
