"""The training loop: what one step is, and what it needs to go on after an interruption.

    fetch ─► execute (forward + backward per microbatch) ─► reduce ─► clip ─► update ─► after_update

The loss of a batch is the SUM over its targets; it is divided once, by the number of targets in the *global* batch.
Everything else is a sum: over microbatches, over ranks. So no layout and no uneven share of targets changes the result.

The state of a run is (parameters, optimizer state, step, consumed samples): data order and dropout masks are functions
of (seed, position), see `dtrain/random.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import checkpoint, optimizers, reproducible, schedules
from dtrain.arrays import Array
from dtrain.collectives import single
from dtrain.config import Config, OptimizerConfig
from dtrain.data import Data, Dataset, Sampler, masked, share
from dtrain.errors import UserError
from dtrain.flat import FlatBuffers, reduce_partial
from dtrain.flat_group import Block
from dtrain.loss_scale import make_loss_scale
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.models import Model
from dtrain.models.base import IGNORED
from dtrain.modules import Context
from dtrain.origin import watching
from dtrain.strategy import Microbatch, Strategy
from dtrain.tape import no_grad


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, the same on every rank."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over the targets of the global batch, before the update."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    step_seconds: float
    tokens: int
    """Targets of the global batch."""
    validation_loss: float | None
    """After the update, at the steps where the configuration asks for it."""
    loss_scale: float = 1.0
    """Of this step's backward."""
    skipped_steps: int | None = None
    """Steps until now, this one included, whose gradients overflowed; None where the loss scale is no dynamic one."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the model tells of the step, such as the loads of experts."""
    measures: dict[str, float] = field(default_factory=dict)
    """What the validation found beside the loss."""


class Trainer:
    """A model, its data and its optimizer on a mesh; `run` makes the steps."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: Data,
        model: Model,
        strategies: Sequence[Strategy] = (),
        optimizer: Callable[[OptimizerConfig, FlatBuffers], optimizers.Optimizer] = optimizers.build,
    ) -> None:
        whole = model.named_parameters()
        self.num_parameters = model.num_parameters()
        """Of the whole model; `model` may have this rank's part only."""
        self.tree = reproducible.MicrobatchTree(whole.values()) if config.parallel.reproducible else None
        for strategy in strategies:
            model = strategy.apply(model, mesh)  # type: ignore[assignment]
        held = {id(parameter) for parameter in model.named_parameters().values()}
        self.is_alone = all(strategy.alone for strategy in strategies) and all(
            id(parameter) in held and parameter.shape == parameter.whole for parameter in whole.values()
        )
        """Whether this rank can run the model by itself, as for a sample: it has all of it and needs nobody."""
        self.config, self.mesh, self.data, self.model, self.strategies = config, mesh, data, model, strategies
        flats = [strategy.flat for strategy in strategies if strategy.flat is not None]
        self.flat = flats[-1] if flats else FlatBuffers(model.named_parameters(), single(), mesh=mesh)
        self.flat.initialise(config.seed)
        self.optimizer = optimizer(config.optimizer, self.flat)
        self.scaler = make_loss_scale(config.train.loss_scale, config.train.dtype)
        self.sampler = Sampler(len(data.train), config.seed)
        self.total_steps = config.train.steps
        self.step = self.consumed = 0

    def run(self) -> Iterator[StepRecord]:
        """Make the remaining steps, one per iteration."""
        while self.step < self.total_steps:
            yield self.train_step()

    def train_step(self) -> StepRecord:
        """One step on the next global batch. Collective over the mesh."""
        start = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore") if self.scaler.dynamic else nullcontext():
            microbatches = list(self.microbatches())
            if self.tree is not None:
                self.tree.begin(len(microbatches))
            loss, count = self._executor("execute", self.execute)(microbatches)
            for strategy in self.strategies:
                strategy.reduce_gradients(self.model)
            reduce_partial(self.flat)
            loss, count, squares = self.total(loss, count, optimizers.sum_squares(self.flat))
            if self.tree is not None:
                squares = reproducible.sum_squares(self.flat)
        self.refuse_divergence(loss, microbatches)
        self.refuse_gradients(squares)

        used = self.loss_scale
        correction = self.expected_targets / (count * used)
        norm = math.sqrt(squares) * correction
        learning_rate = self.learning_rate(self.step + 1)
        if self.scaler.judge(squares):
            scale = correction * optimizers.clip_factor(norm, self.config.optimizer.clip_norm)
            if not any(strategy.updates for strategy in self.strategies):
                self.optimizer.step(learning_rate, scale)
            for strategy in self.strategies:
                strategy.after_update(self.model)
        details = self.model.after_step([context for _, context in microbatches], self.mesh)

        self.flat.zero_grad()
        self.step += 1
        self.consumed += self.config.train.global_batch
        seconds = time.perf_counter() - start
        skipped = getattr(self.scaler, "skipped", None)
        mean, targets = loss / count, int(count)
        validation = self.validation()
        measures = {} if validation is None else self.model.after_validation(self.mesh)
        return StepRecord(
            self.step, mean, norm, learning_rate, seconds, targets, validation, used, skipped, details, measures
        )

    # The parts of a step

    def microbatches(self) -> Iterator[Microbatch]:
        """This rank's share of the next global batch, in portions of `train.micro_batch` samples."""
        start, count = share(self.consumed, self.config.train.global_batch, *self._data_rank())
        yield from self._portions(self.data.train, start, self.sampler.indices(start, count), self.config.seed)

    def execute(self, microbatches: list[Microbatch]) -> tuple[float, float]:
        """Forward and backward of every microbatch; (sum of the losses, number of targets) on this rank."""
        loss = count = 0.0
        for i, (batch, context) in enumerate(microbatches):
            with nullcontext() if i == len(microbatches) - 1 else self.no_sync():
                result = self.model.loss(batch, context)
                result.backward(self.loss_gradient)
            loss += result.item()
            count += self.model.count(batch)
        return loss, count

    def evaluate(self, microbatches: Iterable[Microbatch]) -> tuple[float, float]:
        """The forward alone; (sum of the losses, number of targets) on this rank."""
        loss = count = 0.0
        for batch, _ in microbatches:
            loss += self.model.loss(batch).item()
            count += self.model.count(batch)
        return loss, count

    def _executor(self, verb: str, plain: Callable[[Any], tuple[float, float]]) -> Callable[[Any], tuple[float, float]]:
        """How microbatches are executed or evaluated: by the strategy that does it itself, or one after the other."""
        for strategy in self.strategies:
            if getattr(strategy, verb) is not None:
                return partial(getattr(strategy, verb), self)
        return plain

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context, backwards only add up on this rank: for all microbatches but the last."""
        with ExitStack() as stack:
            for strategy in self.strategies:
                stack.enter_context(strategy.no_sync())
            yield

    @property
    def loss_gradient(self) -> float:
        """What the backward of a microbatch's loss, a sum over targets, begins with."""
        return self.loss_scale / self.expected_targets

    def total(self, loss: float, count: float, squares: float = 0.0) -> tuple[float, float, float]:
        """Sums over the mesh, in one collective. Ranks that differ in tp only have the same loss: it counts once."""
        alone = self.mesh.coordinates["tp"] == 0
        sums = np.array([loss * alone, count * alone, squares], np.float64)
        with self.mesh.comm.counters.purpose("loss"):  # apart from the gradients in the tables of traffic
            sums = self.mesh.comm.all_reduce(sums)
        return float(sums[0]), float(sums[1]), float(sums[2])

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step` (from 1)."""
        peak = self.config.optimizer.learning_rate
        return schedules.learning_rate(self.config.schedule, step, peak, self.total_steps)

    def validation(self) -> float | None:
        """Mean loss on the first samples of the validation set, if this step is to have one. Collective."""
        options, dataset = self.config.train.validate, self.data.validation
        if not self.validates or dataset is None:
            return None
        total, (rank, size) = min(len(dataset), options.batches * self.config.train.global_batch), self._data_rank()
        start, count = share(0, total, rank, size)
        portions = self._portions(dataset, start, np.arange(start, start + count), self.config.seed + 1)
        most = -(-share(0, total, 0, size)[1] // self.config.train.micro_batch)
        if count <= (most - 1) * self.config.train.micro_batch:
            portions = chain(portions, self._uncounted(dataset))
        with no_grad(), self.mesh.comm.counters.purpose("validation"):
            loss, targets, _ = self.total(*self._executor("evaluate", self.evaluate)(portions))
        return loss / targets

    @property
    def validates(self) -> bool:
        """Whether a validation is due after this step."""
        every = self.config.train.validate.every
        due = every > 0 and (self.step % every == 0 or self.step == self.total_steps)
        return due and self.data.validation is not None

    @property
    def loss_scale(self) -> float:
        """What the loss, and so every gradient, is multiplied with."""
        return self.scaler.value

    @property
    def expected_targets(self) -> int:
        """Targets of a global batch in which none is ignored."""
        return self.config.train.global_batch * getattr(self.config.model, "sequence", 1)

    def _data_rank(self) -> tuple[int, int]:
        """(index, number) of those who have other samples; context and tensor ranks have parts of the same ones."""
        return self.mesh.index(*BATCH_AXES), self.mesh.size(*BATCH_AXES)

    def _portions(self, dataset: Dataset, start: int, indices: Array, seed: int) -> Iterator[Microbatch]:
        size = self.config.train.micro_batch
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            positions = np.arange(start + first, start + first + len(part), dtype=np.int64)
            batch = dataset.batch(part)
            if self.data.mask_token is not None:
                batch = masked(batch, seed, positions, self.data.mask_token, self._mask_fraction)
            context = Context(seed, self.step, positions, loss_gradient=self.loss_gradient)
            for strategy in self.strategies:
                batch, context = strategy.part_of(batch, context)
            yield batch, context

    def _uncounted(self, dataset: Dataset) -> Iterator[Microbatch]:
        """A portion without targets, for a rank that has one less than others: their forwards may need it."""
        for batch, context in self._portions(dataset, 0, np.arange(1), self.config.seed):
            yield {**batch, "targets": np.full_like(batch["targets"], IGNORED)}, context

    @property
    def _mask_fraction(self) -> float:
        return float(getattr(self.config.model, "mask_fraction", 0.15))

    def refuse_divergence(self, loss: float, microbatches: Sequence[Microbatch] = ()) -> None:
        """UserError for a loss of the step under way that is no number; with its microbatches, collective: they are
        computed once more to tell where it began."""
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {self.step + 1} is {loss}: training diverged{self._origin(microbatches)}. "
                f"Lower optimizer.learning_rate ({self.config.optimizer.learning_rate:g}), raise "
                "schedule.warmup_steps, or set optimizer.clip_norm; the last checkpoint is from before."
            )

    def _origin(self, microbatches: Sequence[Microbatch]) -> str:
        if not microbatches:
            return ""
        with no_grad(), watching() as found:
            self._executor("evaluate", self.evaluate)(microbatches)
        told = self.mesh.comm.all_gather_object([(each.brought, not each.clean, str(each)) for each in found])
        firsts = [(brought, unclean, rank, text) for rank, each in enumerate(told) for brought, unclean, text in each]
        return "; it began on rank {2}: {3}".format(*min(firsts)) if firsts else ""

    def refuse_gradients(self, squares: float) -> None:
        """UserError for gradients that are no numbers, before they make the parameters so: the loss may be finite, and
        a checkpoint of this step would be lost. A dynamic loss scale judges them itself. Collective."""
        if self.scaler.dynamic or math.isfinite(squares):
            return
        mine = [
            block.name
            for group in self.flat.groups
            for block in group.blocks(group.owned_grad, group.owned)
            if not np.isfinite(block.array.astype(np.float64)).all()
        ]
        names = list(dict.fromkeys(name for each in self.mesh.comm.all_gather_object(mine) for name in each))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        where = f" ({names[0]}{more})" if names else ", or their squares are"
        raise UserError(
            f"the gradients of step {self.step + 1} are inf or nan{where}: training diverged, or "
            f"train.loss_scale: {self.loss_scale:g} is too large for {self.config.train.dtype}. Lower "
            f"optimizer.learning_rate ({self.config.optimizer.learning_rate:g}) or train.loss_scale, or raise "
            "schedule.warmup_steps; the parameters and the last checkpoint are from before."
        )

    # Interruption and continuation

    def save(self, root: Path, keep: int = 0, extra: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint below `root`. Collective; returns its folder."""
        pieces = [
            checkpoint.Piece(block.name, block.array, block.start, block.global_shape, kind)
            for kind, blocks in self._blocks().items()
            for block in blocks
        ]
        pieces += self.model.state()
        pieces += [piece for strategy in self.strategies for piece in strategy.state()]
        state = {
            "step": self.step,
            "consumed": self.consumed,
            "seed": self.config.seed,
            "data": self.data.fingerprint,
            "optimizer": {"kind": self.config.optimizer.kind, "steps": self.optimizer.steps},
            "loss_scale": self.scaler.state(),
            **{key: value for strategy in self.strategies for key, value in strategy.facts().items()},
            **(extra or {}),
        }
        return checkpoint.save(root, self.step, self.mesh.comm, pieces, state, keep)

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, whatever layout wrote it."""
        reader = checkpoint.Reader(folder)
        blocks = [block for blocks in self._blocks().values() for block in blocks]
        mine = {block.name: [block.global_shape, block.array.dtype.name] for block in blocks}
        expected = {name: entry for held in self.mesh.comm.all_gather_object(mine) for name, entry in held.items()}
        checkpoint.check_names(reader, {name: (shape, dtype) for name, (shape, dtype) in sorted(expected.items())})
        for block in blocks:
            reader.read(block.name, block.start, block.array.shape, out=block.array)
        for strategy in self.strategies:
            strategy.after_update(self.model)
        self.step, self.consumed = reader.number("step"), reader.number("consumed")
        self.optimizer.steps = reader.number("optimizer", "steps")
        self.scaler.load_state(reader.state.get("loss_scale", {}))
        self.model.load_state(reader)
        for strategy in self.strategies:
            strategy.load_state(reader)

    def _blocks(self) -> dict[str, list[Block]]:
        """What this rank owns of all tensors that a checkpoint holds."""
        parameters = [block for group in self.flat.groups for block in group.blocks(group.owned_data, group.owned)]
        return {"parameter": parameters, "optimizer": list(self.optimizer.blocks())}
