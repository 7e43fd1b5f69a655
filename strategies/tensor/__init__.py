"""Tensor parallelism after Megatron: every rank of the `tp` axis has a slice of each layer and computes its part of it.

    block      norm ── enter ── qkv │ own heads │ out ── leave ── + ── norm ── enter ── up │ … │ down ── leave ── +
    ends       embedding and head by rows of the vocabulary; the loss without ever having all logits

Per block and microbatch two all_reduces of b·s·h forward and two backward (Megatron's f and g). With `sequence` what
lies between the branches is cut along the tokens: norms, dropout and their activations are 1/tp, and each all_reduce
becomes a reduce_scatter and an all_gather of together the same volume.

Which module is cut how is a table of paths, ours or the user's (`parallel.plan`): plans.py; what no path fits is whole
on all ranks. A model without parallel code becomes a parallel one by replacing modules.
Any size works: heads, widths and vocabularies that tp does not divide are cut unevenly (a rank may even have none).

References: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from dtrain import conjugate
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.errors import UserError
from dtrain.layout import Partial, Shard
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.models.blocks import MLP, Attention
from dtrain.models.moe import Experts, MoE
from dtrain.modules import Context, Dropout, Embedding, Linear, Module
from dtrain.parameter import Parameter
from dtrain.strategies.tensor import layers
from dtrain.strategies.tensor.layers import TOKENS, Branch, ColumnLinear, RowLinear, SequenceDropout, Then
from dtrain.strategies.tensor.plans import PLANS, of_samples, styled
from dtrain.strategies.tensor.samples import cut_samples
from dtrain.strategy import Strategy
from dtrain.tensor import Tensor


class TensorParallel(Strategy):
    """Slices of all layers along the `tp` axis."""

    axis = "tp"

    def __init__(self, plan: dict[str, str], sequence: bool = False) -> None:
        """plan: path pattern -> style, see PLANS and STYLES; sequence: cut the tokens between the branches too."""
        self.plan, self.sequence = plan, sequence

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Cut the parameters, replace the modules."""
        assert isinstance(model, Model)
        self.comm, self.mesh, self.model = mesh["tp"], mesh, model
        self.seen = 0
        """Tokens of the current microbatch, on a rank that sees its begin."""
        for path, (module, style) in styled(model, self.plan, self.sequence).items():
            self._replace(path, STYLES[style](self, module))
        if of_samples(self.plan):
            cut_samples(model, self.comm, mesh.size("pp") > 1)
        if self.sequence:
            self._cut_tokens(model)
        return model

    # What goes into a branch and what comes out of it

    def enter(self, x: Tensor) -> Tensor:
        """From what lies between the branches to the whole input of one."""
        if self.sequence:
            return conjugate.all_gather(x, self.comm, TOKENS, self.tokens)
        return conjugate.copy(x, self.comm)

    def leave(self, y: Tensor) -> Tensor:
        """From partial results to what lies between the branches."""
        if self.sequence:
            return conjugate.reduce_scatter(y, self.comm, TOKENS)
        return conjugate.all_reduce(y, self.comm)

    @property
    def tokens(self) -> int:
        """The tokens that this axis cuts: of the current microbatch, or as the model has them here."""
        return self.seen or getattr(self.model, "sequence", 0)

    def cut(self, parameter: Parameter | None, shard: Shard) -> None:
        """Keep this rank's slice."""
        if parameter is not None and "tp" not in parameter.layout.axes(Shard):  # tied ones are met twice
            parameter.cut(self.mesh, parameter.layout.with_(tp=shard))

    def summed(self, parameter: Parameter | None) -> None:
        """Its gradient comes from my tokens only."""
        if parameter is not None and self.sequence:
            parameter.gradient_layout = parameter.gradient_layout.with_(tp=Partial())

    def _replace(self, path: str, module: Module) -> None:
        parent_path, _, attribute = path.rpartition(".")
        parent: Any = self.model
        for name in parent_path.split(".") if parent_path else ():
            parent = parent[int(name)] if isinstance(parent, list) else getattr(parent, name)
        if isinstance(parent, list):
            parent[int(attribute)] = module
        else:
            setattr(parent, attribute, module)

    def _cut_tokens(self, model: Model) -> None:
        """The tokens are cut where the entrance ends, and whole again where the last block ends."""
        if not hasattr(model, "dropout"):
            raise UserError(f"parallel.sequence: {type(model).__name__} has no tokens; allowed: gpt, bert")
        dropouts = {path: m for path, m in model.named_modules().items() if type(m) is Dropout}
        for path, dropout in dropouts.items():
            self._replace(path, SequenceDropout(dropout, self.comm, lambda: self.tokens))
        enter = model.enter

        def cut_tokens(inputs: Array, context: Context | None = None) -> Tensor:
            self.seen = inputs.shape[TOKENS]
            dropout, model.dropout = model.dropout, _First(self.comm, model.dropout)
            try:
                return enter(inputs, context)
            finally:
                model.dropout = dropout

        model.enter = cut_tokens
        for path, module in model.named_modules().items():
            if re.fullmatch(r"blocks\.\d+\.norm\d", path):
                for parameter in module.named_parameters().values():
                    self.summed(parameter)
        model.blocks[-1] = Then(model.blocks[-1], lambda x: conjugate.gather(x, self.comm, TOKENS, self.tokens))


class _First(Module):
    """Cut the tokens, then drop out."""

    def __init__(self, comm: Communicator, inner: Module) -> None:
        self.comm, self.inner = comm, inner

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return self.inner(conjugate.split(x, self.comm, TOKENS), context)


# The styles: from a whole module to the one that has this rank's slice


def _vocabulary(strategy: TensorParallel, module: Module) -> Module:
    assert isinstance(module, Embedding)
    rows = module.weight.whole[0]
    strategy.cut(module.weight, Shard(0))
    return layers.VocabularyEmbedding(module, strategy.comm, rows)


def _head(strategy: TensorParallel, module: Module) -> Module:
    """The head's columns, and a loss that takes them as they are."""
    assert isinstance(module, Linear)
    comm, model, vocabulary = strategy.comm, strategy.model, module.weight.whole[0]
    strategy.cut(module.weight, Shard(0))
    strategy.cut(module.bias, Shard(0))
    model.cross_entropy = partial(layers.cross_entropy, comm=comm, vocabulary=vocabulary)  # type: ignore[method-assign]
    forward = model.forward
    model.forward = lambda *inputs: conjugate.gather(forward(*inputs), comm, -1, vocabulary)  # type: ignore[method-assign]
    return ColumnLinear(module, lambda x: conjugate.copy(x, comm))


def _attention(strategy: TensorParallel, module: Module) -> Module:
    """Whole groups of heads: a key/value head with all query heads that use it."""
    assert isinstance(module, Attention)
    rank, heads = strategy.comm.rank, layers.cut_heads(module, strategy.comm.size)
    strategy.cut(module.qkv.weight, Shard(0, heads.packed))
    strategy.cut(module.qkv.bias, Shard(0, heads.packed))
    strategy.cut(module.out.weight, Shard(1, heads.mixed))
    strategy.summed(module.out.bias)
    module.heads, module.kv_heads = heads.counts[rank]
    module.out = RowLinear(module.out, strategy.leave)
    return Branch(module if module.heads else layers.NoHeads(module), strategy.enter)


def _mlp(strategy: TensorParallel, module: Module) -> Module:
    assert isinstance(module, MLP)
    for linear in (module.gate, module.up):
        if linear is not None:
            strategy.cut(linear.weight, Shard(0))
            strategy.cut(linear.bias, Shard(0))
    strategy.cut(module.down.weight, Shard(1))
    strategy.summed(module.down.bias)
    module.down = RowLinear(module.down, strategy.leave)
    return Branch(module, strategy.enter)


def _moe(strategy: TensorParallel, module: Module) -> Module:
    """Every expert cut like an MLP; all ranks route all tokens alike, and each makes its part of every gradient."""
    assert isinstance(module, MoE) and isinstance(module.experts, Experts)
    strategy.cut(module.experts.gate, Shard(1))
    strategy.cut(module.experts.up, Shard(1))
    strategy.cut(module.experts.down, Shard(2))
    if module.shared is not None:
        strategy.cut(module.shared.gate.weight if module.shared.gate else None, Shard(0))
        strategy.cut(module.shared.up.weight, Shard(0))
        strategy.cut(module.shared.down.weight, Shard(1))
    weight = module.router.weight  # what the gates multiply is a part of the sum, and so is their gradient
    weight.gradient_layout = weight.gradient_layout.with_(tp=Partial())
    module.router.share = 1 / strategy.comm.size
    add = module.add
    module.add = lambda residual, y, context: add(residual, strategy.leave(y), context)  # type: ignore[method-assign]
    return Branch(module, strategy.enter)


def _column_gather(strategy: TensorParallel, module: Module) -> Module:
    """A layer whose outputs are gathered at once: for what follows, nothing has changed."""
    assert isinstance(module, Linear)
    comm, outputs = strategy.comm, module.weight.whole[0]
    strategy.cut(module.weight, Shard(0))
    strategy.cut(module.bias, Shard(0))
    return ColumnLinear(module, lambda x: conjugate.copy(x, comm), lambda y: conjugate.gather(y, comm, -1, outputs))


STYLES: dict[str, Callable[[TensorParallel, Module], Module]] = {
    "vocabulary": _vocabulary,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
    "head": _head,
    "column_gather": _column_gather,
}

__all__ = ["PLANS", "STYLES", "TensorParallel"]
