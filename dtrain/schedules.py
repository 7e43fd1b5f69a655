"""Learning-rate schedules: pure functions of the number of the update, one row each in SCHEDULES.

    peak ┤   ╭──────╮              t, the step, counts from 1:
         │  ╱        ╲               t = warmup        the peak
         │ ╱          ╲___           t = total_steps   peak * final_fraction
       0 ┼─────────────────► t

During the warm-up the rate is peak * t / warmup: no update is wasted on a rate of 0. Beyond `total_steps` the last
value stays.
References: cosine: Loshchilov and Hutter, arXiv:1608.03983; inverse square root: Vaswani et al., arXiv:1706.03762.
"""

import math
from collections.abc import Callable

from dtrain.config import ScheduleConfig

Schedule = Callable[[int, float, int, int, float], float]


def constant(step: int, peak: float, total_steps: int, warmup: int, final_fraction: float) -> float:
    """The peak, after the warm-up."""
    return peak * _warm(step, warmup)


def linear(step: int, peak: float, total_steps: int, warmup: int, final_fraction: float) -> float:
    """A straight line from the peak down to peak * final_fraction."""
    left = 1 - _progress(step, total_steps, warmup)
    return peak * _warm(step, warmup) * (final_fraction + (1 - final_fraction) * left)


def cosine(step: int, peak: float, total_steps: int, warmup: int, final_fraction: float) -> float:
    """Half a period of the cosine from the peak down to peak * final_fraction."""
    left = (1 + math.cos(math.pi * _progress(step, total_steps, warmup))) / 2
    return peak * _warm(step, warmup) * (final_fraction + (1 - final_fraction) * left)


def inverse_sqrt(step: int, peak: float, total_steps: int, warmup: int, final_fraction: float) -> float:
    """After the warm-up peak * sqrt(warmup / t); without one, peak / sqrt(t)."""
    start = max(1, warmup)
    return peak * _warm(step, warmup) * math.sqrt(start / max(start, step))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def learning_rate(config: ScheduleConfig, step: int, peak: float, total_steps: int) -> float:
    """The learning rate of `step` (from 1) of `total_steps`."""
    final_fraction: float = getattr(config, "final_fraction", 0.0)
    return SCHEDULES[config.kind](step, peak, total_steps, config.warmup_steps, final_fraction)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


def _progress(step: int, total_steps: int, warmup: int) -> float:
    """0 up to the end of the warm-up, 1 from the last step on."""
    if total_steps <= warmup:
        return 0.0
    return min(1.0, max(0.0, (step - warmup) / (total_steps - warmup)))
