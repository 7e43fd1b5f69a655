"""LAMB: Adam's direction, scaled per matrix to the size of the matrix. For batches of thousands of samples.

    u = m^ / (sqrt(v^) + eps) + decay p               as in AdamW (see adam.py)
    p <- p - lr |p| / |u| u                           the trust ratio |p| / |u| is 1 where one of the norms is 0

Vectors (biases, norms) are neither decayed nor scaled: their ratio is 1, as in the authors' code. A bias starts at 0,
and its ratio would keep it there. The norm is that of the whole parameter: those who have pieces of it add them up.
Reference: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962,
algorithm 2.
"""

from typing import ClassVar

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.config import LAMBConfig
from dtrain.optimizers.base import Optimizer, Part


class LAMB(Optimizer):
    """State: m and v per element."""

    config: LAMBConfig
    names: ClassVar[tuple[str, ...]] = ("m", "v")
    by_parameter: ClassVar[bool] = True
    unites: ClassVar[bool] = True

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """Directions by one kernel call per run, then one scaled step per matrix and one for all vectors."""
        kernel = kernels.of(part.data)
        direction = np.empty_like(part.data)
        for where, decayed in part.blocks():
            self._direction(part, where, decayed, scale, direction[where])
        matrices = [name for name, shape in part.group.shapes.items() if len(shape) >= 2]
        squares = np.zeros((len(matrices), 2))  # of each matrix and its direction, by all who have a piece of it
        pieces = {piece.name: piece.where for piece in part.pieces}
        for i, name in enumerate(matrices):
            if name in pieces:
                p, u = part.data[pieces[name]], direction[pieces[name]]
                squares[i] = kernel.sum_squares(p), kernel.sum_squares(u)
        norms = np.sqrt(part.group.complement.all_reduce(squares)).tolist()
        for name, (p_norm, u_norm) in zip(matrices, norms, strict=True):
            if name in pieces:
                ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
                kernel.axpy(part.data[pieces[name]], direction[pieces[name]], -learning_rate * ratio)
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
