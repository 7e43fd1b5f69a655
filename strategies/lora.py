"""LoRA: a trained model is kept as it is, and small matrices beside some of its layers learn the rest.

    x ──┬── W (O, I), frozen ──────────────────────── + ──► y = W x + alpha/r · B A x
        └── A (r, I), Gaussian ── B (O, r), 0 ───────┘         r (O + I) numbers are trained instead of O·I

B begins at 0, so the first output is the base's. Frozen parameters have no gradient, no optimizer state, and nobody
sends them; their values are read from the base checkpoint, each rank its own slice. An adapter lies as its layer does:

    W cut by rows (outputs)      B cut alike, A whole; every rank has a part of A's gradient    (Partial)
    W cut by columns (inputs)    A cut alike, B whole; every rank has a part of B's gradient    (Partial)

A checkpoint holds the adapters and says which base they belong to; `merged` adds them up to whole parameters.
Reference: Hu et al., "LoRA: low-rank adaptation of large language models", arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain import checkpoint
from dtrain.arrays import Array
from dtrain.checkpoint import Reader
from dtrain.config import LoRAConfig
from dtrain.errors import UserError
from dtrain.layout import Layout, Only, Partial, Shard
from dtrain.mesh import Mesh
from dtrain.modules import Linear, Module
from dtrain.parameter import Constant, Normal, Parameter
from dtrain.strategy import Strategy
from dtrain.tensor import Tensor

A, B = ".lora_a", ".lora_b"  # after the name of the layer


@dataclass(frozen=True)
class FromCheckpoint:
    """Initial values that were trained before."""

    reader: Reader

    def values(self, seed: int, name: str, shape: tuple[int, ...], dtype: Any, part: Sequence[slice]) -> Array:
        """The `part` (slices of the leading dims) of the tensor called `name` of global `shape`."""
        ranges = [(*each.indices(n)[:2],) for each, n in zip(part, shape, strict=False)]
        ranges += [(0, n) for n in shape[len(ranges) :]]
        lengths = tuple(max(0, last - first) for first, last in ranges)
        found = np.empty(lengths, dtype)
        return self.reader.read(name, tuple(first for first, _ in ranges), lengths, out=found)


class LoRA(Strategy):
    """Adapters beside the layers that `targets` name; everything else is frozen. Applied after what cuts layers."""

    axis = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        self.config, self.scale = config, config.alpha / config.rank

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Freeze the model on the values of the base, add the adapters."""
        self.base = base_of(self.config.base)
        parameters = list(model.named_parameters().values())
        for parameter in parameters:
            self._check(parameter)
            parameter.requires_grad = False
            parameter.initial = FromCheckpoint(self.base)
        layers = {m.name: m for m in model.named_modules().values() if isinstance(m, Linear)}
        chosen = {name: m for name, m in layers.items() if any(_names(target, name) for target in self.config.targets)}
        for target in self.config.targets:
            if not any(_names(target, name) for name in chosen):
                known = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in layers})
                raise UserError(
                    f"lora.targets: {target}; no such layer. Allowed: {', '.join(known)}, or one by its path"
                )
        owners = [part for path, part in model.walk() if isinstance(part, Parameter)]
        for name, layer in chosen.items():
            if sum(part is layer.weight for part in owners) > 1:
                raise UserError(
                    f"lora.targets: {name}; its weight is tied to another module, which the adapter would not change: "
                    "it could not be merged. Allowed: layers with a weight of their own (model.tied: false)"
                )
            self._adapt(layer, mesh)
        self.trained = sum(self.config.rank * sum(layer.weight.whole) for layer in chosen.values())
        self.whole = sum(math.prod(parameter.whole) for parameter in parameters)
        return model

    def notes(self) -> list[str]:
        """What is trained."""
        share = 100 * self.trained / max(1, self.whole)
        return [
            f"{self.trained:,} numbers are trained, {share:.2f} % of the {self.whole:,} of {self.base.folder}, "
            "which are frozen"
        ]

    def facts(self) -> dict[str, Any]:
        """What the adapters belong to."""
        return {
            "lora": {
                "rank": self.config.rank,
                "alpha": self.config.alpha,
                "targets": list(self.config.targets),
                "from": str(self.base.folder.resolve()),
                "base": fingerprint(self.base),
            }
        }

    def load_state(self, reader: Reader) -> None:
        """Refuse adapters that were trained beside something else."""
        written, mine = reader.state.get("lora", {}), self.facts()["lora"]
        if written.get("base") != mine["base"]:
            raise UserError(
                f"lora.from: {self.config.base}; the adapters in {reader.folder} were trained on "
                f"{written.get('from')}, which held other values. Use that one, or another `name` to start anew"
            )
        if written["alpha"] != mine["alpha"]:
            raise UserError(f"lora.alpha: {mine['alpha']}; the adapters in {reader.folder} have {written['alpha']}")

    def _check(self, parameter: Parameter) -> None:
        names = self.base.names("parameter")
        if parameter.name not in names:
            raise UserError(f"lora.from: {self.base.folder}; it has no {parameter.name}: the model is another one")
        shape = tuple(self.base.entry(parameter.name).shape)
        if shape != parameter.whole:
            raise UserError(
                f"lora.from: {self.base.folder}; there {parameter.name} is {list(shape)}, in this configuration "
                f"{list(parameter.whole)}"
            )

    def _adapt(self, layer: Linear, mesh: Mesh) -> None:
        weight, rank = layer.weight, self.config.rank
        outputs, inputs = weight.whole
        a = Parameter((rank, inputs), Normal(1 / math.sqrt(inputs)), weight.dtype)
        b = Parameter((outputs, rank), Constant(0.0), weight.dtype)
        a.name, b.name = layer.name + A, layer.name + B
        a.gradient_layout = b.gradient_layout = weight.gradient_layout
        layouts = {a: Layout(), b: Layout()}
        for axis in weight.layout:
            place = weight.layout[axis]
            if isinstance(place, Only):
                layouts = {each: layout.with_(**{axis: place}) for each, layout in layouts.items()}
            elif isinstance(place, Shard):
                cut, whole = (b, a) if place.dim == 0 else (a, b)
                layouts[cut] = layouts[cut].with_(**{axis: place})
                whole.gradient_layout = whole.gradient_layout.with_(**{axis: Partial()})
        for each, layout in layouts.items():
            each.cut(mesh, layout)
        layer.lora_a, layer.lora_b = a, b  # type: ignore[attr-defined]  # found by `named_parameters`
        layer.multiply = partial(_multiply, weight, a, b, self.scale)  # type: ignore[method-assign]


def _multiply(weight: Parameter, a: Parameter, b: Parameter, scale: float, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a) * scale, b)


def _names(target: str, name: str) -> bool:
    """attention.qkv names that layer of every block; a whole path one layer."""
    return name == target or name.endswith("." + target)


def base_of(path: str) -> Reader:
    """The checkpoint in a folder, or the newest one of a run."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        found = checkpoint.latest(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
        if found is None:
            raise UserError(f"lora.from: {path}; must be a checkpoint, or a run that wrote one")
        folder = found
    reader = Reader(folder)
    if "lora" in reader.state:
        raise UserError(f"lora.from: {path}; it holds adapters only, of {reader.state['lora']['from']}: use that base")
    return reader


def fingerprint(reader: Reader) -> str:
    """Changes with the parameters in a checkpoint, by their checksums."""
    rows = [
        (name, entry.dtype, entry.shape, sorted((s.start, s.shape, s.crc32) for s in entry.slices))
        for name in sorted(reader.names("parameter"))
        for entry in [reader.entry(name)]
    ]
    return hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()


def merged(reader: Reader, base: str | None = None) -> tuple[Reader, dict[str, Callable[[], Array]]]:
    """The base of a checkpoint of adapters, and every parameter of it with its adapter added: W + alpha/r · B A.

    base: where the base is now, if not where it was. UserError where it is not there, or holds other values.
    """
    facts = reader.state["lora"]
    whole = base_of(base or facts["from"])
    if fingerprint(whole) != facts["base"]:
        raise UserError(f"{whole.folder}: not the base of {reader.folder}: it holds other values")
    return whole, added(whole, reader.tensor, set(reader.names("parameter")), facts["alpha"] / facts["rank"])


def added(
    base: Reader, adapter: Callable[[str], Array], adapters: set[str], scale: float
) -> dict[str, Callable[[], Array]]:
    """By name how to make each parameter of the base with its adapter, summed in float64 and rounded once."""

    def make(name: str) -> Array:
        values, layer = base.tensor(name), name.removesuffix(".weight")
        if layer + A not in adapters:
            return values
        product = adapter(layer + B).astype(np.float64) @ adapter(layer + A).astype(np.float64)
        return np.asarray(values.astype(np.float64) + scale * product).astype(values.dtype)

    return {name: partial(make, name) for name in base.names("parameter")}
