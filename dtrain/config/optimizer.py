"""The keys of `optimizer` and `schedule`: how it learns."""

from typing import TypeAlias

from dtrain.config.rules import Member, at_least, fraction, require


class _Optimizer(Member, frozen=True, kw_only=True):
    learning_rate: float
    """The peak; the schedule scales it."""
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm; null: never."""

    def __post_init__(self) -> None:
        """Check the values of every optimizer, by name as far as it has them."""
        require(self.learning_rate >= 0, f"optimizer.learning_rate: {self.learning_rate}; must be 0 or more")
        require(self.weight_decay >= 0, f"optimizer.weight_decay: {self.weight_decay}; must be 0 or more")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm: {self.clip_norm}; must be above 0, or null",
        )
        fraction("optimizer", momentum=getattr(self, "momentum", 0.0), decay=getattr(self, "decay", 0.0))
        for key in ("epsilon", "clip_threshold"):
            value = getattr(self, key, 1.0)
            above = min(value) > 0 if isinstance(value, tuple) else value > 0
            require(above, f"optimizer.{key}: {list(value) if isinstance(value, tuple) else value}; must be above 0")
        for beta in getattr(self, "betas", ()):
            require(0 <= beta < 1, f"optimizer.betas: {list(self.betas)}; both must be in [0, 1)")  # type: ignore[attr-defined]


class SGDConfig(_Optimizer, frozen=True, kw_only=True, tag="sgd"):
    """m <- momentum m + g; p <- p - lr m."""

    momentum: float = 0.9
    nesterov: bool = False


class AdamConfig(_Optimizer, frozen=True, kw_only=True, tag="adam"):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


class AdamWConfig(_Optimizer, frozen=True, kw_only=True, tag="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01


class LAMBConfig(_Optimizer, frozen=True, kw_only=True, tag="lamb"):
    """Adam's direction, per parameter scaled to the parameter's norm (You et al. 2020): for large batches."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-6
    weight_decay: float = 0.01


class AdafactorConfig(_Optimizer, frozen=True, kw_only=True, tag="adafactor"):
    """Second moments kept as row and column sums (Shazeer and Stern 2018): O(rows + columns) memory."""

    decay: float = 0.8
    """beta2 at step t is 1 - t^-decay."""
    epsilon: tuple[float, float] = (1e-30, 1e-3)
    """Added to squared gradients; least scale of a parameter."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update."""


OptimizerConfig: TypeAlias = SGDConfig | AdamConfig | AdamWConfig | LAMBConfig | AdafactorConfig


class _Schedule(Member, frozen=True, kw_only=True):
    warmup_steps: int = 0
    """Steps of linear growth from 0 to the peak."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(0, "schedule", warmup_steps=self.warmup_steps)
        final = getattr(self, "final_fraction", 0.0)
        require(0 <= final <= 1, f"schedule.final_fraction: {final}; must be in [0, 1]")


class ConstantConfig(_Schedule, frozen=True, kw_only=True, tag="constant"):
    """The peak, after the warm-up."""


class LinearConfig(_Schedule, frozen=True, kw_only=True, tag="linear"):
    """Straight down to the last step."""

    final_fraction: float = 0.0
    """Last learning rate / peak."""


class CosineConfig(_Schedule, frozen=True, kw_only=True, tag="cosine"):
    """Half a cosine down to the last step."""

    final_fraction: float = 0.1
    """Last learning rate / peak."""


class InverseSqrtConfig(_Schedule, frozen=True, kw_only=True, tag="inverse_sqrt"):
    """peak * sqrt(warmup_steps / step), as in the Transformer paper."""


ScheduleConfig: TypeAlias = ConstantConfig | LinearConfig | CosineConfig | InverseSqrtConfig
