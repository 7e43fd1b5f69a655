"""The tape of one sample: a model is run on short inputs, and what its ops did is added up for each part.

FLOPs of the ops, bytes of their outputs, arrays that the vjps saved (each once, parameters and inputs aside). All of it
is a polynomial of degree two in the tokens (the square is attention), so three short lengths give the numbers of any
length. Weights are zeros that were never written: they take no memory, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from dtrain import models
from dtrain.arrays import Array, named_dtype
from dtrain.config import Config, MLPConfig
from dtrain.graph import nodes
from dtrain.launch.plan.amounts import Amount, Part, total
from dtrain.models import Sizes
from dtrain.models.base import IGNORED
from dtrain.tape import tracing

VIEWS = ("reshape", "permute", "index")  # ops that move nothing
LENGTHS = (20, 40, 60)  # tokens of the traces; of each a whole number is asked for by BERT at the usual 15 %


def trace(config: Config, sizes: Sizes, length: int, blocks: Sequence[int]) -> list[Part]:
    """[entrance, a part for each of `blocks` (numbers of traced ones), exit] of one sample of `length` tokens."""
    model = models.outline(config.model, sizes, config.train.dtype)
    for parameter in model.named_parameters().values():
        parameter.data = np.zeros(parameter.shape, parameter.dtype)  # pages of zeros until somebody writes
    batch = sample(config, sizes, length)
    with tracing():
        loss = model.loss(batch)
    known = {_home(p.data) for p in model.named_parameters().values()} | {_home(array) for array in batch.values()}
    traced = [Part() for _ in range(len(model.blocks) + 2)]
    for node in nodes(loss):
        name = getattr(node.inputs[1], "name", "") if node.op.name == "linear" else ""
        place = re.match(r"blocks\.(\d+)", name or node.scope)
        entering = (node.scope or name).split(".")[0] in model.entrance or node.op.name in ("embedding", "add", "index")
        part = traced[int(place[1]) + 1 if place else 0 if entering and not name else -1]
        kind, kept = _kinds(node.op.name, name, node.scope)
        size = 0.0 if node.op.name in VIEWS else float(np.prod(node.shape)) * node.dtype.itemsize
        add(part.flops, kind, float(node.op.flops(node.shapes, node.shape, node.attributes)))
        add(part.moved, kind, size)
        add(part.ops, "whole", 1.0)
        if size > total(part.largest):
            part.largest = Amount()
            add(part.largest, kind, size)
        if node.op.name == "linear":
            part.matrices += 1
            part.made += size
            logits = name in ("head.weight", "embedding.weight")
            part.fed += size if logits else float(np.prod(node.shapes[0])) * node.dtype.itemsize
        part.norms += node.op.name in ("layer_norm", "rms_norm")
        for home, nbytes in _arrays(node.saved):
            if home not in known:
                known.add(home)
                add(part.saved, kept, nbytes)
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


def _arrays(saved: Any) -> Iterator[tuple[int, float]]:
    """(address of the memory, bytes of it) of the arrays in what an op saved."""
    if isinstance(saved, np.ndarray):
        yield _home(saved), float(_owner(saved).nbytes)
    elif isinstance(saved, tuple | list):
        for each in saved:
            yield from _arrays(each)
    elif isinstance(saved, Mapping):
        yield from _arrays(list(saved.values()))


def _owner(array: Array) -> Array:
    """The array whose memory this one is a view of, or itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _home(array: Array) -> int:
    return int(_owner(array).__array_interface__["data"][0])


def add(amount: Amount, kind: str, number: float) -> None:
    """Add to what is cut in one way."""
    setattr(amount, kind, getattr(amount, kind) + number)


def extended(traces: Sequence[list[Part]], lengths: Sequence[int], length: int) -> list[Part]:
    """The polynomials through the traces, at `length` (Lagrange)."""
    weights = [float(np.prod([(length - b) / (a - b) for b in lengths if b != a])) for a in lengths]  # of each trace
    parts = []
    for same in zip(*traces, strict=True):
        part = Part()
        for which in fields(Part):
            if isinstance(getattr(part, which.name), int | float):
                continue
            amounts = [getattr(each, which.name) for each in same]
            for kind in fields(Amount):
                value = sum(w * getattr(a, kind.name) for w, a in zip(weights, amounts, strict=True))
                setattr(getattr(part, which.name), kind.name, max(0.0, value))
        part.ops, part.matrices, part.norms = same[0].ops, same[0].matrices, same[0].norms
        part.fed, part.made = (
            sum(w * getattr(each, name) for w, each in zip(weights, same, strict=True)) for name in ("fed", "made")
        )
        parts.append(part)
    return parts
