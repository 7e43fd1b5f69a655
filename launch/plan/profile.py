"""What one sample costs in each part of a model: FLOPs, bytes moved, bytes kept for the backward, parameters.

    entrance │ block 0 │ block 1 │ … │ exit        a Part each, of Amounts by what tensor parallelism does to them:

    whole    on every rank of tp               the input of a column-parallel layer
    tokens   on every rank, or 1/tp            norms, the residual stream: cut with `parallel.sequence`
    heads    whole key/value heads             qkv, attention; uneven where tp does not divide the heads
    units    1/tp                              MLP, embedding, head, logits
    experts  1/tp of 1/ep                      parameters of experts

Nothing is estimated: a model with one block is run on short inputs, and its tape is read: FLOPs of the ops, arrays that
the vjps saved (each once, parameters and inputs aside). All of it is a polynomial of degree two in the tokens (the
square is attention), so three short lengths give the numbers of any length. Weights are zeros that were never written:
they take no memory, whatever the size of the model. A mixture of experts is traced without a limit of its capacity: as
many rows in all as even routing has, and how they are spread over experts changes neither FLOPs nor bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec
import numpy as np

from dtrain import autograd, models
from dtrain.arrays import Array, named_dtype
from dtrain.config import BERTConfig, Config, GPTConfig, MLPConfig, MoEGPTConfig
from dtrain.models import Model, Sizes
from dtrain.models.base import IGNORED
from dtrain.models.moe import MoEBlock

VIEWS = ("reshape", "permute", "slice")  # ops that move nothing
LENGTHS = (20, 40, 60)  # tokens of the traces; of each a whole number is asked for by BERT at the usual 15 %


@dataclass
class Amount:
    """A number by how tensor parallelism cuts it."""

    whole: float = 0.0
    tokens: float = 0.0
    heads: float = 0.0
    units: float = 0.0
    experts: float = 0.0

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


@dataclass
class Profile:
    """A model for the planner."""

    entrance: Part
    blocks: list[Part]
    exit: Part
    boundary: float
    """Bytes of one sample between two blocks."""
    tied: float
    """Elements of parameters that both ends have."""
    kv_heads: int
    """What limits tensor parallelism of attention; 1 where there is none."""
    itemsize: int
    tensor_reduces: int
    """all_reduces of the boundary's size in the forward of a block, under tensor parallelism."""
    tokens: bool
    """Whether `parallel.sequence` means something."""
    length: int = 1
    """Tokens of a sample."""
    kv_bytes: float = 0.0
    """Bytes of the keys and values of one sample in one block."""
    query_heads: int = 1
    causal: bool = True
    """Whether a token sees those before it only."""
    experts: int = 0
    """Of a mixture; 0: there are none."""

    @property
    def parameters(self) -> float:
        """Elements of the whole model."""
        return sum(total(part.parameters) for part in (self.entrance, *self.blocks, self.exit)) - self.tied


def total(amount: Amount) -> float:
    """The number when nothing is cut."""
    return amount.whole + amount.tokens + amount.heads + amount.units + amount.experts


def profile(config: Config, sizes: Sizes) -> Profile:
    """Of the model of `config` on data of these sizes (vocabulary, features)."""
    model = models.outline(config.model, sizes, config.train.dtype)
    itemsize = named_dtype(config.train.dtype).itemsize
    if isinstance(config.model, MLPConfig):
        parts = _trace(config, sizes, 0, range(len(model.blocks)))
        number, kv_heads, tokens = 1, 1, False
        boundary = itemsize * float(max(config.model.hidden))
    else:
        assert isinstance(config.model, GPTConfig | BERTConfig)
        length = config.model.sequence
        lengths = [length] if length <= LENGTHS[-1] else LENGTHS
        short, blocks = _shortened(config)
        traces = [_trace(short, sizes, each, blocks) for each in lengths]
        parts = traces[0] if len(traces) == 1 else _extended(traces, lengths, length)
        number, tokens = 2, True
        kv_heads = config.model.heads if config.model.kv_heads is None else config.model.kv_heads
        boundary = itemsize * float(length * config.model.dim)
    _count(model, parts)
    mixture = config.model.moe if isinstance(config.model, MoEGPTConfig) else None
    for block, part in zip(model.blocks, parts[1:-1], strict=True):
        if mixture is not None and isinstance(block, MoEBlock):
            part.rows = boundary * mixture.top * min(1.0, mixture.capacity or 1.0)
    shared = {id(p) for p in _ends(model, model.entrance)} & {id(p) for p in _ends(model, model.exit)}
    tied = sum(p.size for p in model.named_parameters().values() if id(p) in shared)
    found = Profile(parts[0], list(parts[1:-1]), parts[-1], boundary, float(tied), kv_heads, itemsize, number, tokens)
    if isinstance(config.model, GPTConfig | BERTConfig):
        found.length, found.query_heads = config.model.sequence, config.model.heads
        found.causal = config.model.kind != "bert"
        found.kv_bytes = 2 * boundary * kv_heads / config.model.heads
    found.experts = 0 if mixture is None else mixture.experts
    return found


def _shortened(config: Config) -> tuple[Config, list[int]]:
    """With one block of each kind, and which of them each block of the whole model is like."""
    model = config.model
    assert isinstance(model, GPTConfig | BERTConfig)
    if not isinstance(model, MoEGPTConfig):
        return msgspec.structs.replace(config, model=msgspec.structs.replace(model, layers=1)), [0] * model.layers
    every = model.moe.every
    free = model.moe.router == "top"  # the other router needs a capacity, and all experts have rows
    moe = msgspec.structs.replace(model.moe, capacity=None if free else model.moe.capacity)
    short = msgspec.structs.replace(config, model=msgspec.structs.replace(model, layers=every, moe=moe))
    return short, [every - 1 if i % every == every - 1 else 0 for i in range(model.layers)]


# --- the trace --------------------------------------------------------------------------------------------------------


def _trace(config: Config, sizes: Sizes, length: int, blocks: Sequence[int]) -> list[Part]:
    """[entrance, a part for each of `blocks` (numbers of traced ones), exit] of one sample of `length` tokens."""
    model = models.outline(config.model, sizes, config.train.dtype)
    for parameter in model.named_parameters().values():
        parameter.data = np.zeros(parameter.shape, parameter.dtype)  # pages of zeros until somebody writes
    batch = sample(config, sizes, length)
    with autograd.tracing():
        loss = model.loss(batch)
    assert loss.node is not None
    known = {_home(p.data) for p in model.named_parameters().values()} | {_home(array) for array in batch.values()}
    traced = [Part() for _ in range(len(model.blocks) + 2)]
    for node in sorted(_nodes(loss.node), key=lambda node: node.order):
        name = getattr(node.inputs[1], "name", "") if node.op.name == "linear" else ""
        place = re.match(r"blocks\.(\d+)", name or node.scope)
        entering = (node.scope or name).split(".")[0] in model.entrance or node.op.name in ("embedding", "add", "slice")
        part = traced[int(place[1]) + 1 if place else 0 if entering and not name else -1]
        kind, kept = _kinds(node.op.name, name, node.scope)
        size = 0.0 if node.op.name in VIEWS else float(np.prod(node.shape)) * node.dtype.itemsize
        _add(part.flops, kind, float(node.op.flops(node.shapes, node.shape, node.attributes)))
        _add(part.moved, kind, size)
        _add(part.ops, "whole", 1.0)
        if size > total(part.largest):
            part.largest = Amount()
            _add(part.largest, kind, size)
        for home, nbytes in _arrays(node.saved):
            if home not in known:
                known.add(home)
                _add(part.saved, kept, nbytes)
    return [traced[0], *(traced[i + 1] for i in blocks), traced[-1]]


def _kinds(op: str, weight: str, scope: str) -> tuple[str, str]:
    """How tensor parallelism cuts the work and the output of an op, and what the op saved."""
    branch = re.search(r"blocks\.\d+\.(attention|mlp|moe\.experts|moe\.shared)", weight or scope)
    inside = "heads" if branch and branch[1] == "attention" else "units"
    if op == "linear":  # what goes into a column-parallel layer is whole, into a row-parallel one cut
        return inside, inside if re.search(r"\.(out|down)\.weight$", weight) else "whole"
    if op == "cross_entropy":
        return "units", "units"
    if op in ("bias_residual", "dropout", "add", "embedding") or "norm" in scope:
        return "tokens", "tokens"
    return (inside, inside) if branch else ("whole", "whole")


def sample(config: Config, sizes: Sizes, length: int, number: int = 1) -> dict[str, Array]:
    """A batch of `number` samples of `length` tokens, or of rows."""
    if isinstance(config.model, MLPConfig):
        dtype = named_dtype(config.train.dtype)
        return {"inputs": np.zeros((number, sizes.features), dtype), "targets": np.zeros(number, np.int64)}
    inputs, targets = np.zeros((number, length), np.int64), np.zeros((number, length), np.int64)
    if config.model.kind == "bert":
        targets[:, round(length * config.model.mask_fraction) :] = IGNORED  # type: ignore[union-attr]
    return {"inputs": inputs, "targets": targets}


def _nodes(root: autograd.Node) -> Iterable[autograd.Node]:
    seen, stack = {root}, [root]
    while stack:
        for source in stack.pop().inputs:
            if isinstance(source, autograd.Node) and source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _arrays(saved: Any) -> Iterator[tuple[int, float]]:
    """(address of the memory, bytes of it) of the arrays in what an op saved."""
    if isinstance(saved, np.ndarray):
        base = saved
        while isinstance(base.base, np.ndarray):
            base = base.base
        yield _home(saved), float(base.nbytes)
    elif isinstance(saved, tuple | list):
        for each in saved:
            yield from _arrays(each)
    elif isinstance(saved, Mapping):
        yield from _arrays(list(saved.values()))


def _home(array: Array) -> int:
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(base.__array_interface__["data"][0])


def _add(amount: Amount, kind: str, number: float) -> None:
    setattr(amount, kind, getattr(amount, kind) + number)


def _extended(traces: Sequence[list[Part]], lengths: Sequence[int], length: int) -> list[Part]:
    """The polynomials through the traces, at `length` (Lagrange)."""
    weights = [float(np.prod([(length - b) / (a - b) for b in lengths if b != a])) for a in lengths]  # of each trace
    parts = []
    for same in zip(*traces, strict=True):
        part = Part()
        for which in fields(Part):
            if which.name == "rows":
                continue
            amounts = [getattr(each, which.name) for each in same]
            for kind in fields(Amount):
                value = sum(w * getattr(a, kind.name) for w, a in zip(weights, amounts, strict=True))
                setattr(getattr(part, which.name), kind.name, max(0.0, value))
        part.ops = same[0].ops
        parts.append(part)
    return parts


# --- parameters -------------------------------------------------------------------------------------------------------


def _ends(model: Model, names: Sequence[str]) -> list[Any]:
    modules = [getattr(model, name) for name in names]
    return [p for module in modules if module is not None for p in module.named_parameters().values()]


def _count(model: Model, parts: Sequence[Part]) -> None:
    """Elements of the parameters of each part, from the outline of the whole model."""
    groups = [_ends(model, model.entrance), *(list(b.named_parameters().values()) for b in model.blocks)]
    for part, parameters in zip(parts, [*groups, _ends(model, model.exit)], strict=True):
        part.parameters = Amount()
        for parameter in parameters:
            name = parameter.name
            if re.search(r"attention\.(qkv\.|out\.weight)", name):
                kind = "heads"
            elif ".moe.experts." in name:
                kind = "experts"
            elif re.search(r"(mlp|shared)\.((up|gate)\.|down\.weight)|^(embedding|head)\.|\.linear\.", name):
                kind = "units"
            else:
                kind = "whole"
            _add(part.parameters, kind, parameter.size)
