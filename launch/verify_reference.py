"""One process beside which a layout is verified, and what is watched in both: outputs of blocks, gradients, parameters.

    blocks[0] ──► blocks[1] ──► …      a probe around each: sum, sum of squares and number of all its outputs
        └ (Σ, Σ², n)  └ (Σ, Σ², n)     add up over microbatches and ranks, whoever has which samples

The reference keeps copies on the rank that trained it: the gradients of the first and the last step and the smallest of
each element, parameters before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from dtrain.arrays import Array
from dtrain.collectives import single
from dtrain.config import Config, ParallelConfig, PipelineConfig
from dtrain.flat_group import Block
from dtrain.launch import assembly
from dtrain.models import Model
from dtrain.modules import Module
from dtrain.tape import mode
from dtrain.tensor import Tensor
from dtrain.trainer import Trainer

Tensors = dict[str, Array]


class Probe(Module):
    """A block of which the sum and the sum of squares of all outputs are known: they do not depend on who has which."""

    def __init__(self, inner: Module, name: str, model: Model, sums: dict[str, Array]) -> None:
        self.inner, self.name, self._sums, self._path = inner, inner.name, sums, name
        self._recompute: Callable[[], bool] = lambda: model.recompute  # the model itself would be a part of its block

    def forward(self, x: Tensor, *context: object) -> Tensor:
        """As the block."""
        y = self.inner(x, *context)
        if mode.grad != self._recompute():  # recomputed: once without a gradient, which counts, and once again with
            if self._path == "blocks.0":
                self._note("entrance", x.data)
            self._note(self._path, y.data)
        return y

    def _note(self, name: str, x: Array) -> None:
        wide = x.astype(np.float64)
        self._sums[name] = self._sums.get(name, np.zeros(3)) + np.array([wide.sum(), np.square(wide).sum(), wide.size])


def probed(trainer: Trainer) -> dict[str, Array]:
    """Put probes around all blocks; {name: (sum, sum of squares, elements)} fills with the next forwards."""
    sums: dict[str, Array] = {}
    blocks = trainer.model.blocks
    blocks[:] = [Probe(block, f"blocks.{i}", trainer.model, sums) for i, block in enumerate(blocks)]
    return sums


def unprobed(trainer: Trainer) -> None:
    """Take them away again."""
    blocks = trainer.model.blocks
    blocks[:] = [block.inner if isinstance(block, Probe) else block for block in blocks]


def gradients(trainer: Trainer) -> Iterator[Block]:
    """What this rank owns of the gradients of the last step: an update reads them and leaves them where they are."""
    for group in trainer.flat.groups:
        yield from group.blocks(group.owned_grad, group.owned)


def parameters(trainer: Trainer) -> Iterator[Block]:
    """What this rank owns of the parameters."""
    for group in trainer.flat.groups:
        yield from group.blocks(group.owned_data, group.owned)


@dataclass
class Reference:
    """One process on the same data from the same weights: what it had after each step."""

    records: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of each step."""
    sums: dict[str, Array] = field(default_factory=dict)
    """Of the probes, in the first step."""
    first: Tensors = field(default_factory=dict)
    """Gradients of the first step."""
    last: Tensors = field(default_factory=dict)
    """Of the last."""
    smallest: Tensors = field(default_factory=dict)
    """The smallest size of every element of the gradients in any step."""
    values: Tensors = field(default_factory=dict)
    """Parameters after the last."""
    moved: dict[str, float] = field(default_factory=dict)
    """How far the parameters came, the largest element."""

    @classmethod
    def train(cls, config: Config, steps: int, after_step: Callable[[], None] = lambda: None) -> Reference:
        """Train `config` without its layout."""
        alone = replace(config, parallel=ParallelConfig(), pipeline=PipelineConfig())
        trainer = assembly.assemble(alone, single())
        found = cls()
        begin = _copied(parameters(trainer))
        found.sums = probed(trainer)
        for step in range(steps):
            record = trainer.train_step()
            found.records.append((record.loss, record.grad_norm))
            now = _copied(gradients(trainer))
            if step == 0:
                unprobed(trainer)
                found.first = now
                found.smallest = {name: np.abs(gradient) for name, gradient in now.items()}
            for name, gradient in now.items():
                np.minimum(found.smallest[name], np.abs(gradient), out=found.smallest[name])
            found.last = now
            after_step()
        found.values = _copied(parameters(trainer))
        found.moved = {name: float(np.abs(found.values[name] - begin[name]).max(initial=0)) for name in begin}
        order = list(trainer.model.named_parameters())
        found.values = {name: found.values[name] for name in order}
        return found


def _copied(blocks: Iterator[Block]) -> Tensors:
    """Whole tensors, in float64."""
    return {block.name: block.array.astype(np.float64) for block in blocks}
