"""Context parallelism: every rank of the `cp` axis has a part of the tokens of each sample, and all parameters.

    sample   │ tokens of rank 0 │ of rank 1 │ of rank 2 │        embedding, norms, MLPs, loss: own tokens, no message
    attention: the only place where tokens meet                  ring.py (keys go round) or ulysses.py (heads go apart)

A router of experts decides about whole sequences: to them belong room, loads and the order in which tokens come. What
tokens choose travels (k numbers each; all E scores where experts choose), and every rank decides the same about all.

All activations are 1/cp; that is what it is for: sequences that one rank has no memory for. Parameters are whole on
every rank and its gradients come from its own tokens: each is Partial over cp, and everything else follows from that.
What depends on the place of a token goes by its place in the whole sample: positions, rotary angles, dropout masks.

`context: ring` works for any number of heads and sends 2BtGD elements (size - 1) times, most of it while it computes;
`context: ulysses` sends less, all at once, and needs as many heads as ranks. Which tokens: places.py.
References: Liu et al., arXiv:2310.01889; Jacobs et al., arXiv:2309.14509; Dubey et al. (Llama 3), arXiv:2407.21783.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from dtrain.array_blocks import gathered
from dtrain.arrays import Array
from dtrain.errors import UserError
from dtrain.layout import Partial
from dtrain.mesh import Mesh
from dtrain.models.blocks import Attention
from dtrain.models.moe import Router
from dtrain.models.transformer import Transformer
from dtrain.modules import Context, Module
from dtrain.ops.attention import default_scale
from dtrain.strategies.context import places, ring, ulysses
from dtrain.strategy import Microbatch, Strategy
from dtrain.tensor import Tensor

TOKENS = 1  # the dim of (B, T, …)

KINDS: dict[str, Callable[..., Tensor]] = {"ring": ring.attention, "ulysses": ulysses.attention}


class ContextParallel(Strategy):
    """A part of the tokens on each rank of the `cp` axis."""

    axis = "cp"
    alone = False

    def __init__(self, kind: str = "ring") -> None:
        """kind: how tokens attend to those of other ranks, see KINDS."""
        self.kind = kind

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Replace the attention and the positions; all gradients are sums over the axis."""
        if not isinstance(model, Transformer):
            raise UserError(f"parallel.cp: {type(model).__name__} has no tokens; allowed: gpt, bert")
        self.comm, self.length = mesh["cp"], model.sequence
        if self.length < self.comm.size:
            raise UserError(f"model.sequence: {self.length}; must be parallel.cp = {self.comm.size} or more")
        attentions = [module for module in model.named_modules().values() if isinstance(module, Attention)]
        zigzag = self.kind == "ring" and any(attention.causal for attention in attentions)
        self.runs = (places.zigzag if zigzag else places.blocks)(self.length, self.comm.size)
        self.places = places.positions(self.runs[self.comm.rank])
        model.sequence = len(self.places)  # what other strategies see of it on this rank
        for attention in attentions:
            if attention.qkv.weight.shape[0]:  # under tensor parallelism a rank may have no heads at all
                self._replace(attention)
        if model.positions is not None:
            model.place = lambda length: model.positions(self.places)  # type: ignore[method-assign,misc]
        for module in model.named_modules().values():
            if isinstance(module, Router):
                module.places, module.whole = self.places, self._whole
        for parameter in model.named_parameters().values():
            parameter.gradient_layout = parameter.gradient_layout.with_(cp=Partial())
        return model

    def part_of(self, batch: dict[str, Array], context: Context) -> Microbatch:
        """My tokens of the samples: inputs, targets and whatever else there is per token."""
        assert batch["inputs"].shape[TOKENS] == self.length, "all samples of a run are of model.sequence tokens"
        mine = {name: array[:, self.places] for name, array in batch.items()}
        return mine, replace(context, places=self.places, length=self.length)

    def notes(self) -> list[str]:
        """Which tokens this rank has."""
        runs = " and ".join(f"{start}..{stop - 1}" for start, stop in self.runs[self.comm.rank])
        return [f"context: {self.kind} on {self.comm.size} ranks; this one has tokens {runs} of {self.length}"]

    def _whole(self, array: Array) -> Array:
        """What the ranks have of their tokens, (B, t, …), as that of all tokens in their order, (B, T, …)."""
        parts = gathered(array, self.comm, TOKENS, [places.count(each) for each in self.runs])
        return parts[:, np.argsort(np.concatenate([places.positions(each) for each in self.runs]))]

    def _replace(self, attention: Attention) -> None:
        width = attention.qkv.weight.shape[0] // (attention.heads + 2 * attention.kv_heads)
        angles = attention.angles
        if self.kind == "ulysses":
            ulysses.check(attention.heads, attention.kv_heads, self.comm.size)
            rotary = None if angles is None else (angles[0][: self.length], angles[1][: self.length])
        else:
            rotary = None if angles is None else (angles[0][self.places], angles[1][self.places])
        attention.mix = partial(  # type: ignore[method-assign]
            KINDS[self.kind],
            comm=self.comm,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            runs=self.runs,
            causal=attention.causal,
            scale=default_scale(width),
            rotary=rotary,
        )


__all__ = ["KINDS", "ContextParallel"]
