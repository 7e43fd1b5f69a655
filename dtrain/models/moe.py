"""A GPT in whose blocks some MLPs are mixtures of experts: a token goes through the few experts that a router chose.

    x ──┬── norm ──┬── router ── probabilities ── choice ───────────────┬ gates
        │          ├── rows sorted by expert ── experts (grouped) ── × ─┴─ sum per token ──┐
        │          └── shared experts (all tokens) ────────────────────────────────────────┤
        └──────────────────────────────── residual ────────────────────────────────────── + ──►

A token without an expert (no room) goes on unchanged through the residual. The router computes in float32 at least.

Balance, all of it independent of layout and micro-batch:
    balance (alpha)    per sequence alpha * E * sum_i f_i P_i, f the share of the choices, P the mean probability: alpha
                       where all is even, alpha * E where all tokens surely go to one expert
    z_loss             z_loss * logsumexp(logits)² per token: keeps logits small
    bias_rate          no loss at all: a bias per expert, added where experts are chosen but not to the gates, goes up
                       after every step where the load of the global batch was below its even share, down where above
The auxiliary losses are sums over tokens like the loss itself (a sequence counts once per token), and their gradients
enter where they arise: `with_auxiliary`. The loss that is told stays the cross-entropy, to be compared with others.

References: Fedus et al., Switch Transformer, arXiv:2101.03961; Lepikhin et al., GShard, arXiv:2006.16668; Zoph et al.,
ST-MoE (z-loss), arXiv:2202.08906; Wang et al. (bias), arXiv:2408.15664; Dai et al. (shared experts), arXiv:2401.06066.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain.arrays import Array
from dtrain.checkpoint import Piece, Reader
from dtrain.config import MoEConfig, MoEGPTConfig
from dtrain.mesh import Mesh
from dtrain.models import routing
from dtrain.models.base import Sizes
from dtrain.models.blocks import STD, Block
from dtrain.models.gpt import GPT
from dtrain.models.routing import Plan
from dtrain.modules import Context, Dropout, Linear, Module
from dtrain.op import Op
from dtrain.ops.routing import COMBINE_ROWS, GROUPED_LINEAR
from dtrain.parameter import Normal, Parameter
from dtrain.tensor import Tensor, apply

# x as it is; its backward adds `weight` times the gradient of `loss`, a number that depends on x or its like.
WITH_AUXILIARY = Op(
    "with_auxiliary",
    lambda x, loss, weight: (x, None),
    lambda node, g: (g, np.full((), node.attributes["weight"], g.dtype)),
    flops=lambda inputs, output, attributes: 0,
)


class Router(Module):
    """Probabilities of the experts, and the choice among them."""

    def __init__(self, dim: int, config: MoEConfig, dtype: Any) -> None:
        self.weight = Parameter((config.experts, dim), Normal(STD), dtype)
        self.config = config
        self.bias: Array = np.zeros(config.experts)
        """Added to the probabilities where experts are chosen; not trained, see `MoEGPT.after_step`."""
        self.share = 1.0
        """How much of the gradient of the auxiliary losses is of this rank, where several compute the same ones."""

        self.places: Array | slice = slice(None)
        """Where in their sequences the tokens at hand stand."""
        self.whole: Callable[[Array], Array] = lambda array: array
        """From something of the tokens at hand, (B, t, …), to that of all tokens of their sequences, (B, T, …): who
        gives a rank a part of the tokens replaces this and `places`."""

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Plan]:  # type: ignore[override]
        """X (B, t, C) -> gates (R,), a number per row of the plan."""
        config = self.config
        wide = np.result_type(x.dtype, np.float32) if x.dtype.itemsize > 2 else np.dtype(np.float32)
        logits = F.linear(x.astype(wide), self.weight.astype(wide))
        if context is not None and config.noise:
            shape = (context.length or x.shape[1], config.experts)
            drawn = routing.noise(context.seed, self.name, context.step, context.row_ids, shape)[:, self.places]
            logits = logits + (config.noise * drawn).astype(wide)
        probabilities = logits.softmax()
        taken, asked, gates = self._choose(probabilities)
        plan = Plan.of(taken[:, self.places])
        if context is not None:
            gates = self._balance(gates, probabilities, logits, asked, plan, context)
        return gates.reshape(-1)[plan.tokens * config.experts + plan.experts].astype(x.dtype), plan

    def _choose(self, probabilities: Tensor) -> tuple[Array, Array, Tensor]:
        """Which expert takes which token and which was asked for it, (B, T, E) of whole sequences, and gates of the
        tokens at hand (B, t, E). The same on all ranks that have tokens of a sequence."""
        config = self.config
        scores = probabilities.data + self.bias.astype(probabilities.dtype)
        if config.router == "expert_choice":
            scores = self.whole(scores)
            taken = routing.expert_choice(scores, self._room(scores.shape[1]))
            return taken, taken, probabilities
        mine = routing.top_k(scores, config.top)
        choices = self.whole(mine)
        asked = taken = routing.marked(choices, config.experts)
        room = self._room(choices.shape[1])
        if room < choices.shape[1]:
            kept = routing.within_capacity(choices, config.experts, room)
            taken = routing.marked(choices, config.experts, kept)
        if config.top > 1:  # GShard: the gates of a token add up to 1; Switch: the probability itself
            probabilities = probabilities / F.gather(probabilities, mine, -1).sum(dim=-1, keepdims=True)
        return taken, asked, probabilities

    def _room(self, tokens: int) -> int:
        """Rows that an expert takes of a sequence of so many tokens."""
        config = self.config
        return (
            tokens if config.capacity is None else routing.capacity(tokens, config.experts, config.top, config.capacity)
        )

    def _balance(
        self, gates: Tensor, probabilities: Tensor, logits: Tensor, asked: Array, plan: Plan, context: Context
    ) -> Tensor:
        """Take note of the loads, and put the gradient of the auxiliary losses on its way: of the tokens at hand, whose
        sum over ranks is that of all. Only the loads f are of whole sequences, and they have no gradient."""
        config, (batch, tokens, experts) = self.config, probabilities.shape
        loads = asked.sum(axis=1)
        shares = (loads / np.maximum(loads.sum(axis=1, keepdims=True), 1)).astype(probabilities.dtype)
        even = (probabilities.sum(dim=1) * shares).sum() * experts  # of all T tokens: T * E * sum f P
        z = (F.logsumexp(logits) ** 2).sum() if config.z_loss else None
        without = batch * tokens - len(np.unique(plan.tokens))
        told = [batch * tokens, without, even.item(), 0.0 if z is None else z.item()]
        mine = asked[:, self.places].sum(axis=(0, 1))
        context.recorded[self.name] = np.concatenate([told, mine, plan.counts]).astype(np.float64)
        weight = context.loss_gradient * self.share
        if config.balance and config.router == "top":
            gates = apply(WITH_AUXILIARY, gates, even, weight=weight * config.balance)
        if z is not None:
            gates = apply(WITH_AUXILIARY, gates, z, weight=weight * config.z_loss)
        return gates


class Experts(Module):
    """E MLPs without biases, their weights stacked: rows sorted by expert -> rows."""

    def __init__(self, config: MoEGPTConfig, dtype: Any) -> None:
        self.kind = config.mlp
        experts, hidden, dim = config.moe.experts, config.expert_hidden, config.dim
        self.gate = Parameter((experts, hidden, dim), Normal(STD), dtype) if self.kind == "swiglu" else None
        self.up = Parameter((experts, hidden, dim), Normal(STD), dtype)
        self.down = Parameter((experts, dim, hidden), Normal(STD / math.sqrt(2 * config.layers)), dtype)

    def forward(self, rows: Tensor, counts: Array) -> Tensor:
        """Rows (R, C), of which counts[e] in turn are expert e's -> (R, C)."""
        up = apply(GROUPED_LINEAR, rows, self.up, counts=counts)
        if self.gate is None:
            inner = F.gelu(up, approximate=self.kind == "gelu_tanh")
        else:
            inner = F.swiglu(apply(GROUPED_LINEAR, rows, self.gate, counts=counts), up)
        return apply(GROUPED_LINEAR, inner, self.down, counts=counts)


class Shared(Module):
    """The experts that every token goes through: together one MLP without biases."""

    def __init__(self, config: MoEGPTConfig, dtype: Any) -> None:
        hidden = config.expert_hidden * config.moe.shared
        self.kind = config.mlp
        self.gate = Linear(config.dim, hidden, False, STD, dtype) if self.kind == "swiglu" else None
        self.up = Linear(config.dim, hidden, False, STD, dtype)
        self.down = Linear(hidden, config.dim, False, STD / math.sqrt(2 * config.layers), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., C) to the same shape."""
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate=self.kind == "gelu_tanh"))
        return self.down(F.swiglu(self.gate(x), self.up(x)))


class MoE(Module):
    """The mixture in the place of an MLP."""

    def __init__(self, config: MoEGPTConfig, dtype: Any) -> None:
        self.router = Router(config.dim, config.moe, dtype)
        self.experts: Module = Experts(config, dtype)
        self.shared = Shared(config, dtype) if config.moe.shared else None
        self.dropout: Module = Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, context: Context | None = None) -> Tensor:
        """X (B, T, C), normed; residual (B, T, C) -> residual + mixture(x)."""
        gates, plan = self.router.forward(x, context)
        size = x.shape[0] * x.shape[1]
        rows = self.experts(F.embedding(x.reshape(size, x.shape[2]), plan.tokens), plan.counts)
        y = apply(COMBINE_ROWS, rows, gates, tokens=plan.tokens, size=size).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return self.add(residual, y, context)

    def add(self, residual: Tensor, y: Tensor, context: Context | None) -> Tensor:
        """The end of the branch."""
        return residual + self.dropout(y, context)


class MoEBlock(Module):
    """A layer whose MLP is a mixture."""

    def __init__(self, block: Block, config: MoEGPTConfig, dtype: Any) -> None:
        """block: the layer with an MLP that it takes the place of."""
        self.norm1, self.attention, self.norm2 = block.norm1, block.attention, block.norm2
        self.moe = MoE(config, dtype)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """From (B, T, C) to (B, T, C)."""
        x = self.attention(self.norm1(x), x, context)
        return self.moe(self.norm2(x), x, context)


class MoEGPT(GPT):
    """Ids (B, T) -> logits of the next token (B, T, vocabulary); every k-th block has experts."""

    def __init__(self, config: MoEGPTConfig, sizes: Sizes, dtype: Any = np.float32) -> None:
        super().__init__(config, sizes, dtype)
        self.config = config.moe
        self.mixtures: list[str] = []
        """The names of the routers, as `Context.recorded` has them: also of those that are on other ranks."""
        self.router_bias = np.zeros((config.layers // config.moe.every, config.moe.experts))
        for i in range(config.moe.every - 1, config.layers, config.moe.every):
            block = self.blocks[i]
            assert isinstance(block, Block)
            made = MoEBlock(block, config, dtype)
            made.moe.router.bias = self.router_bias[len(self.mixtures)]
            self.mixtures.append(f"blocks.{i}.moe.router")
            self.blocks[i] = made
        self.assign_names()

    def after_step(self, contexts: Sequence[Context], mesh: Mesh) -> dict[str, Any]:
        """Loads of the global batch: move the biases, tell the log. Collective over the mesh."""
        experts = self.config.experts
        table = np.zeros((len(self.mixtures), 4 + 2 * experts))
        for i, name in enumerate(self.mixtures if mesh.coordinates["tp"] == 0 else ()):
            table[i] += sum(context.recorded[name] for context in contexts if name in context.recorded)
        with mesh.comm.counters.purpose("log"):
            table = mesh.comm.all_reduce(table)
        tokens, without, even, z = table[:, :4].T
        asked, taken = table[:, 4 : 4 + experts], table[:, 4 + experts :]
        if self.config.bias_rate:
            self.router_bias += self.config.bias_rate * np.sign(asked.mean(axis=1, keepdims=True) - asked)
        shares = asked / np.maximum(asked.sum(axis=1, keepdims=True), 1)
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
        return {
            "load": shares.tolist(),
            "dropped": (1 - taken.sum(axis=1) / np.maximum(asked.sum(axis=1), 1)).tolist(),
            "without_expert": (without / np.maximum(tokens, 1)).tolist(),
            "entropy": entropy.tolist(),
            "balance_loss": (self.config.balance * even / np.maximum(tokens, 1)).tolist(),
            "z_loss": (self.config.z_loss * z / np.maximum(tokens, 1)).tolist(),
        }

    def state(self) -> list[Piece]:
        """The biases of the routers."""
        return [Piece("router_bias", self.router_bias, (0, 0), self.router_bias.shape, "strategy")]

    def load_state(self, reader: Reader) -> None:
        """Take them from a checkpoint, if it has them."""
        if "router_bias" in reader.names("strategy"):
            self.router_bias[...] = reader.tensor("router_bias")
