"""Adafactor: Adam's second moments as row sums and column sums, O(rows + columns) memory instead of O(rows * columns).

    G² + eps1  ──►  R: sums over columns, C: sums over rows,  each <- beta R + (1 - beta) new,   beta = 1 - t^-decay
    V^ = R C / sum(R)          U = G / sqrt(V^)          U^ = U / max(1, rms(U) / clip_threshold)
    a = lr max(eps2, rms(p))                             p <- p - a U^ - a decay p

Variant: the paper's algorithms 4 and 5 (of vectors, V is kept whole), without a first moment; "relative step sizes"
are off: lr is the given learning rate, but it is still relative to the size of the parameter, rms(p). Of more than
two dims, the last two are factored. Needs whole parameters, so ranges must not cut one.
Reference: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv:1804.04235.
"""

import math
from typing import Any, ClassVar

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.config import AdafactorConfig
from dtrain.optimizers.base import Optimizer, Part


class Adafactor(Optimizer):
    """State: per matrix `rows` and `columns`, per vector `v`."""

    config: AdafactorConfig
    by_parameter: ClassVar[bool] = True

    def prepare(self, part: Part) -> None:
        """The factors lie apart by parameter; part.state has no more than the master copy."""
        self.factors: dict[str, dict[str, Array]] = getattr(self, "factors", {})
        for piece in part.pieces:
            shape = piece.shape
            if len(shape) >= 2:
                factors = {"rows": part.zeros(shape[:-1]), "columns": part.zeros((*shape[:-2], shape[-1]))}
            else:
                factors = {"v": part.zeros(shape)}
            self.factors[piece.name] = factors

    def per_parameter_state(self) -> dict[str, Array]:
        """Views of the state by "<parameter>.<name>"; a matrix (r, c) has rows (r,) and columns (c,)."""
        factors = {f"{name}.{key}": array for name, each in self.factors.items() for key, array in each.items()}
        return super().per_parameter_state() | factors

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """One parameter after the other."""
        for piece in part.pieces:
            p = part.data[piece.where].reshape(piece.shape)
            g = part.gradient(piece.where).reshape(piece.shape) * float(scale)
            u = g / self._root_of_moments(self.factors[piece.name], g)
            u *= 1 / max(1.0, _rms(u) / self.config.clip_threshold)
            step = learning_rate * max(self.config.epsilon[1], _rms(p))
            p *= 1 - step * self.decay(len(piece.shape) >= 2)
            p -= step * u

    def _root_of_moments(self, factors: dict[str, Array], g: Array) -> Any:
        beta = 1 - self.steps**-self.config.decay
        squares = np.square(g)
        squares += self.config.epsilon[0]
        if "v" in factors:
            return np.sqrt(_mean(factors["v"], squares, beta))
        rows = _mean(factors["rows"], squares.sum(axis=-1), beta)
        columns = _mean(factors["columns"], squares.sum(axis=-2), beta)
        # The root of the product, factor by factor: the product itself may underflow float32.
        return np.sqrt(rows / rows.sum(axis=-1, keepdims=True))[..., None] * np.sqrt(columns)[..., None, :]


def _mean(running: Array, new: Array, beta: float) -> Array:
    running *= beta
    running += (1 - beta) * new
    return running


def _rms(x: Array) -> float:
    return math.sqrt(kernels.of(x).sum_squares(x) / max(1, x.size))
