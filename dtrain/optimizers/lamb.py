"""LAMB: Adam's direction, scaled per matrix to the size of the matrix. For batches of thousands of samples.

    u = m^ / (sqrt(v^) + eps) + decay p               as in AdamW (see adam.py)
    p <- p - lr |p| / |u| u                           the trust ratio |p| / |u| is 1 where one of the norms is 0

Vectors (biases, norms) are neither decayed nor scaled: their ratio is 1, as in the authors' code. A bias starts at 0,
and its ratio would keep it there. The norm is that of the whole parameter, so ranges must not cut one.
Reference: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962,
algorithm 2.
"""

import math
from typing import ClassVar

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.config import LAMBConfig
from dtrain.optimizers.base import Optimizer, Part


class LAMB(Optimizer):
    """State: m and v per element."""

    config: LAMBConfig
    names: ClassVar[tuple[str, ...]] = ("m", "v")
    by_parameter: ClassVar[bool] = True

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """Directions by one kernel call per run, then one scaled step per matrix and one for all vectors."""
        kernel = kernels.of(part.data)
        direction = kernels.empty(part.data.shape, part.data.dtype)
        for where, decayed in part.blocks():
            self._direction(part, where, decayed, scale, direction[where])
        for piece in part.pieces:
            if len(piece.shape) >= 2:
                p, u = part.data[piece.where], direction[piece.where]
                p_norm, u_norm = math.sqrt(kernel.sum_squares(p)), math.sqrt(kernel.sum_squares(u))
                ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
                kernel.axpy(p, u, -learning_rate * ratio)
        for where, decayed in part.runs:
            if not decayed:
                kernel.axpy(part.data[where], direction[where], -learning_rate)

    def _direction(self, part: Part, where: slice, decayed: bool, scale: float, out: Array) -> None:
        beta1, beta2 = self.config.betas
        kernels.of(part.data).adam_direction(
            part.gradient(where),
            part.state["m"][where],
            part.state["v"][where],
            part.data[where],
            beta1,
            beta2,
            self.config.epsilon,
            self.decay(decayed),
            1 - beta1**self.steps,
            1 - beta2**self.steps,
            scale,
            out,
        )
