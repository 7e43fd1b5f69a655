"""Loss scaling: float16 gradients are kept away from its smallest numbers (6e-8) by a factor on the loss.

    backward of loss x scale ─► gradients x scale ─► sums over ranks, norm ─┬─ finite ──► / scale, update
                                                                            └─ inf, nan ─► no update, scale / 2

A static scale is the same at every step. A dynamic one begins at 2^24, which is too large, and finds its place: a step
whose gradients overflow is skipped and halves it, 2000 good steps in a row double it. A power of two loses no bit.

Invariant: the decision is taken from the sum of squares over all ranks, in which one rank's inf or nan stays: all ranks
skip, or none. The data of a skipped step is used up, and the learning rate goes on, as if it had been taken.
Reference: Micikevicius et al., "Mixed precision training", arXiv:1710.03740.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from dtrain.errors import UserError

STATIC = {"float16": 1024.0}  # where nothing is said; 1 for dtypes with the range of float32


@dataclass
class LossScale:
    """A scale that stays as it is."""

    value: float = 1.0

    dynamic: ClassVar[bool] = False

    def judge(self, squares: float) -> bool:
        """Whether to take the step, from the sum of the squares of all gradients. Here always: nothing is hidden."""
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there, as far as it is there."""


@dataclass
class DynamicLossScale(LossScale):
    """A scale as large as the gradients allow."""

    value: float = 2.0**24
    good: int = 0
    """Steps in a row without overflow."""
    skipped: int = 0
    """Steps of the whole run."""

    dynamic: ClassVar[bool] = True
    patience: ClassVar[int] = 2000
    least: ClassVar[float] = 2.0**-14

    def judge(self, squares: float) -> bool:
        """As above, and change the scale. UserError when there is no scale left to try."""
        if math.isfinite(squares):
            self.good += 1
            if self.good == self.patience:
                self.value, self.good = self.value * 2, 0
            return True
        self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
        if self.value < self.least:
            raise UserError(
                f"train.loss_scale: dynamic: the gradients are inf or nan even at a scale of {self.value:g}: training "
                "diverged. Lower optimizer.learning_rate, raise schedule.warmup_steps, or use train.dtype: bfloat16"
            )
        return False

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there; a checkpoint without one leaves the beginning."""
        self.value = float(state.get("value", self.value))
        self.good, self.skipped = int(state.get("good", self.good)), int(state.get("skipped", self.skipped))


def make_loss_scale(asked: float | str | None, dtype: str) -> LossScale:
    """From the keys train.loss_scale and train.dtype."""
    if asked == "dynamic":
        return DynamicLossScale()
    return LossScale(STATIC.get(dtype, 1.0) if asked is None else float(asked))
