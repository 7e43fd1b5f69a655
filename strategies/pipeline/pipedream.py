"""PipeDream: a pipeline that updates each stage as soon as it has a gradient, and keeps old weights instead of waiting.

    stage 0 of 3   F0 F1 F2 B0* F3 B1* F4 B2* …     * update of this stage alone; no rank waits for the others' updates
    weights used   v0 v0 v0 v0  v1 v0  v2 v0        B of a microbatch with the weights of its F: a stash of versions

    pipedream       an update after every microbatch; F of microbatch k on stage s uses version k - (p-1-s): late by
                    p-1-s updates on stage s, and p-s versions are kept there
    vertical_sync   all stages use version k - (p-1), that of the first stage: p versions everywhere
    pipedream_2bw   an update after every p microbatches; those of update t use version t-1 on all stages: two versions

A step of the trainer is one such run over all its microbatches, with the learning rate of the step; at its end the
pipeline is empty, so that checkpoints and validation see one version. Within it nothing is flushed.

Invariant: forward and backward of a microbatch on a stage see the same weights, bit for bit.
References: Narayanan et al., PipeDream, SOSP 2019; Memory-efficient pipeline-parallel training (2BW), arXiv:2006.09503.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dtrain.arrays import Array
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.flat import FlatBuffers, reduce_partial
from dtrain.layout import Partial
from dtrain.mesh import Mesh
from dtrain.modules import Module
from dtrain.strategies.pipeline import PipelineParallel
from dtrain.strategies.pipeline.engine import Engine
from dtrain.strategies.pipeline.schedules import Action, Program
from dtrain.strategy import Microbatch

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

KINDS = ("pipedream", "pipedream_2bw")


def version(kind: str, vertical: bool, microbatch: int, stage: int, stages: int) -> int:
    """How many updates the weights have seen with which `stage` computes `microbatch`, both counted from 0."""
    if kind == "pipedream_2bw":
        return max(0, microbatch // stages - 1)
    return max(0, microbatch - (stages - 1 - (0 if vertical else stage)))


class Stash:
    """Versions of all parameters of a rank, by the number of updates they have seen."""

    def __init__(self, flat: FlatBuffers) -> None:
        self.flat = flat
        self.copies: dict[int, list[Array]] = {}
        self.marks: dict[int, int] = {}
        """What the tape is told of a version, so that it accepts it in the backward of its own forward only."""

    def keep(self, number: int) -> None:
        """Copy the weights as they are now."""
        self.copies[number] = [group.data.copy() for group in self.flat.groups]
        self.marks[number] = max((p.version for p in self.flat.parameters.values()), default=0)

    def drop(self, needed: set[int]) -> None:
        """Forget all but these."""
        for number in self.copies.keys() - needed:
            del self.copies[number], self.marks[number]

    @contextmanager
    def use(self, number: int) -> Iterator[None]:
        """Within this context the parameters have the values of a version."""
        before = [(p, p.data, p.version) for p in self.flat.parameters.values()]
        for group, copy in zip(self.flat.groups, self.copies[number], strict=True):
            for name, parameter in group.parameters.items():
                parameter.data = copy[group.slices[name]].reshape(parameter.shape)
                parameter.version = self.marks[number]
        try:
            yield
        finally:
            for parameter, data, mark in before:
                parameter.data, parameter.version = data, mark


class AsynchronousEngine(Engine):
    """The engine of 1F1B with an update of its stage after every `every` microbatches."""

    stashing = True
    """False: without weight stashing, for tests: forward and backward see different weights."""

    def __init__(self, synchronous: Engine, kind: str, vertical: bool) -> None:
        """synchronous: an engine with the same stages; kind, vertical: see `version`."""
        super().__init__(synchronous.comm, synchronous.stages, synchronous.rank_of)
        self.kind, self.vertical = kind, vertical
        (self.stage,) = self.stages
        self.every = self.comm.size if kind == "pipedream_2bw" else 1

    def run(
        self, trainer: Trainer, program: Program, microbatches: Sequence[Microbatch], training: bool = True
    ) -> tuple[float, float]:
        """As of the synchronous engine; in training this rank's parameters are updated on the way."""
        if not training:
            return super().run(trainer, program, microbatches, training)
        self.updates, self.pending, self.targets = 0, 0, 0
        self.using: dict[int, int] = {}
        self.staleness: Counter[int] = Counter()
        """Of the last step: microbatches by how many updates their weights were behind in their backward."""
        self.most_kept = 0
        self.stash = Stash(trainer.flat)
        self.stash.keep(0)
        result = super().run(trainer, program, microbatches, training)
        # The trainer's norm is that of the last update: as if the whole batch had had this mean gradient.
        count = sum(self.stages[self.stage].model.count(batch) for batch, _ in microbatches)
        for group in trainer.flat.groups:
            group.owned_grad[...] *= count / self.last_targets
        return result

    def _forward(self, action: Action, data: Array | None) -> None:
        if not self.training or not self.stashing:
            return super()._forward(action, data)
        m = action.microbatch
        self.using[m] = self.version(m)
        self.most_kept = max(self.most_kept, len(self.stash.copies))
        with self.stash.use(self.using[m]):
            super()._forward(action, data)

    def _backward(self, action: Action, data: Array | None) -> None:
        m = action.microbatch
        if self.stashing:
            used = self.using.pop(m)
            self.staleness[self.updates - used] += 1
            with self.stash.use(used):
                super()._backward(action, data)
        else:
            super()._backward(action, data)
        batch, _ = self.microbatches[m]
        self.pending += 1
        self.targets += self.stages[action.stage].model.count(batch)
        if self.pending == self.every or m == len(self.microbatches) - 1:
            self._update(m)

    def version(self, microbatch: int) -> int:
        """The one that this stage computes a microbatch with."""
        return version(self.kind, self.vertical, microbatch, self.stage, self.comm.size)

    def _update(self, m: int) -> None:
        """From the mean gradient over the targets since the last update."""
        trainer = self.trainer
        reduce_partial(trainer.flat)
        scale = 1 / (self.targets * trainer.loss_gradient)
        trainer.optimizer.step(trainer.learning_rate(trainer.step + 1), scale)
        self.last_targets, self.updates, self.pending, self.targets = self.targets, self.updates + 1, 0, 0
        if self.using or m < len(self.microbatches) - 1:
            trainer.flat.zero_grad()
        done = self.updates * self.every  # microbatches; the next forward is at most p - s further
        self.stash.keep(self.updates)
        ahead = {self.version(m) for m in range(done, len(self.microbatches))}
        self.stash.drop({*self.using.values(), *ahead, self.updates} if ahead or self.using else set())


def from_config(config: Config, microbatches: int) -> PipeDream:
    """The strategy of `pipeline.schedule: pipedream…`; UserError for what needs all stages at once."""
    kind = config.pipeline.schedule
    if kind not in KINDS:
        raise UserError(f"pipeline.schedule: {kind}; allowed: {', '.join(KINDS)}, or a schedule of `show pipeline`")
    if config.optimizer.clip_norm is not None:
        raise UserError(
            f"optimizer.clip_norm: {config.optimizer.clip_norm}; {kind} updates each stage by itself, and the norm is "
            "that of all: set it to null"
        )
    if config.train.dtype == "float16":
        raise UserError(f"train.dtype: float16; {kind} cannot skip a step of all stages: use bfloat16 or float32")
    return PipeDream(kind, microbatches, config.pipeline.vertical_sync, config.pipeline.cut)


class PipeDream(PipelineParallel):
    """An asynchronous pipeline along `pp`: other results than one process, but those of the delayed updates above."""

    updates = True

    def __init__(
        self, kind: str, microbatches: int, vertical_sync: bool = False, cut: Sequence[int] | None = None
    ) -> None:
        super().__init__("1f1b", microbatches, None, cut)
        self.kind, self.vertical_sync = kind, vertical_sync

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Keep this rank's stage; UserError where an update would need other stages or pipelines."""
        others = [axis for axis in ("dp", "cp", "ep") if mesh.size(axis) > 1]
        if others:
            raise UserError(
                f"pipeline.schedule: {self.kind}; does not go with parallel.{others[0]}: {mesh.size(others[0])}, since "
                "the weights of several pipelines would drift apart"
            )
        model = super().apply(model, mesh)
        tied = [p.name for p in model.named_parameters().values() if "pp" in p.gradient_layout.axes(Partial)]
        if tied:
            raise UserError(
                f"pipeline.schedule: {self.kind}; {tied[0]} is used by two stages, which update it at different "
                "times: set model.tied: false"
            )
        self.engine = AsynchronousEngine(self.engine, self.kind, self.vertical_sync)
        return model

    def notes(self) -> list[str]:
        """How stale gradients are."""
        stages, stage = self.comm.size, self.comm.rank
        late = [stages - 1 - s for s in range(stages)]
        told = {
            "pipedream": f"an update after every microbatch; gradients of stages 0, 1, … are {late} updates late",
            "pipedream_2bw": f"an update after every {stages} microbatches; all gradients are one update late",
        }[self.kind]
        if self.vertical_sync and self.kind == "pipedream":
            told = f"an update after every microbatch; all stages use the weights of {stages - 1} updates before"
        kept = 2 if self.kind == "pipedream_2bw" else stages if self.vertical_sync else stages - stage
        return [f"{self.kind}: {told}; this rank keeps up to {kept} versions of its weights"]
