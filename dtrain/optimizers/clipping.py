"""Clipping by the global norm: all gradients are scaled by one factor, so that their direction stays.

Reference: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

import math

from dtrain import kernels
from dtrain.flat import FlatBuffers


def global_norm(flat: FlatBuffers) -> float:
    """The 2-norm of all gradients together, summed in float64.

    A parameter without a gradient gets one of 0. Each counts once, right for what all ranks hold alike; norms of
    cut parameters are added by who cut them.
    """
    flat.fill_missing()
    return math.sqrt(sum(kernels.of(group.grad).sum_squares(group.grad) for group in flat.groups))


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What to multiply gradients of this norm with so that it is `clip_norm` at most; 1 where that is None.

    A norm that is not finite gives a factor that is not: nothing is hidden.
    """
    return 1.0 if clip_norm is None else min(clip_norm / (norm + 1e-6), 1.0)
