"""What a strategy is: one way to use one axis of the mesh, seen by the trainer as a few verbs.

    apply(model, mesh)           once: cut parameters, set layouts, attach callbacks; values need not exist yet
    part_of(batch, context)      this rank's part of a microbatch, where the axis cuts samples
    no_sync()                    around the backward of every microbatch but the last
    execute, evaluate            a strategy that runs the microbatches itself, as a pipeline does; else None
    reduce_gradients(model)      each step, after the last backward
    after_update(model)          each step, after the optimizer, e.g. gather what the owner updated
    state(), load_state(reader)  what it carries from step to step, to and from checkpoints

Strategies never know one another; what one leaves to the next is written in the parameters' layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.arrays import Array
from dtrain.checkpoint import Piece, Reader
from dtrain.flat import FlatBuffers
from dtrain.mesh import Mesh
from dtrain.modules import Context, Module

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

Microbatch = tuple[dict[str, Array], Context]


class Strategy:
    """Base of all strategies: does nothing, in every verb."""

    axis: ClassVar[str]
    flat: FlatBuffers | None = None
    """The flat buffers, if this strategy decides where the parameters lie. It must be the last that cuts any."""
    updates: bool = False
    """Whether `execute` updates the parameters itself; `Trainer.optimizer` then does nothing at the end of a step."""
    alone: bool = True
    """Whether a forward needs no other rank, as long as no parameter is cut."""
    execute: Callable[[Trainer, list[Microbatch]], tuple[float, float]] | None = None
    """A method that does forward and backward of all microbatches of a step instead of `Trainer.execute`; returns (sum
    of the losses, number of targets) of this rank, (0, 0) where another stage counts them. All backwards but the last
    run within `trainer.no_sync()`, and that of a loss begins with `trainer.loss_gradient`."""
    evaluate: Callable[[Trainer, Iterable[Microbatch]], tuple[float, float]] | None = None
    """The same for the forward alone, under no_grad."""

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Make the model of one process this rank's part of it; returns the model to train."""
        return model

    def part_of(self, batch: dict[str, Array], context: Context) -> Microbatch:
        """What this rank computes of these samples, which all ranks of the axis have: all of it."""
        return batch, context

    def no_sync(self) -> AbstractContextManager[None]:
        """Within this context backwards accumulate without communication."""
        return nullcontext()

    def reduce_gradients(self, model: Module) -> None:
        """Afterwards every gradient is that of the global batch."""

    def after_update(self, model: Module) -> None:
        """Afterwards every parameter has its new value wherever it is used."""

    def notes(self) -> list[str]:
        """What the user should know before the first step, a line each."""
        return []

    def state(self) -> list[Piece]:
        """What a checkpoint must hold, beside parameters and optimizer, for the next steps to be the same."""
        return []

    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells about it beside tensors (JSON), at the top of its state."""
        return {}

    def load_state(self, reader: Reader) -> None:
        """Take it back from a checkpoint, as far as it is there: another layout may have written it."""


def unused_parameters(model: Module) -> list[str]:
    """Names of the parameters that the last backward did not reach."""
    parameters = model.named_parameters().items()
    return [name for name, parameter in parameters if parameter.grad is None and parameter.requires_grad]


class UnusedParametersError(RuntimeError):
    """Some parameters took no part in the loss; their gradient is not zero but unknown."""

    def __init__(self, names: list[str]) -> None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        super().__init__(
            f"no gradient reached {shown}: these parameters were not used in this step's forward. "
            "Use them, or leave them out of the model: waiting for them would hang the other ranks."
        )
