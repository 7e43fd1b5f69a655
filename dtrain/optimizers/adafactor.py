"""Adafactor: Adam's second moments as row sums and column sums, O(rows + columns) memory instead of O(rows * columns).

    G² + eps1  ──►  R: sums over columns, C: sums over rows,  each <- beta R + (1 - beta) new,   beta = 1 - t^-decay
    V^ = R C / sum(R)          U = G / sqrt(V^)          U^ = U / max(1, rms(U) / clip_threshold)
    a = lr max(eps2, rms(p))                             p <- p - a U^ - a decay p

Variant: the paper's algorithms 4 and 5 (of vectors, V is kept whole), without a first moment; "relative step sizes"
are off: lr is the given learning rate, but it is still relative to the size of the parameter, rms(p). Of more than
two dims, the last two are factored. Of a matrix that the layout cuts, every owner keeps rows and columns of the whole
(few numbers); ranges of flat elements must not cut one.
Reference: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv:1804.04235.
"""

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.config import AdafactorConfig
from dtrain.flat_group import Block
from dtrain.optimizers.base import Optimizer, Part
from dtrain.parameter import Parameter, whole_boxes


class Adafactor(Optimizer):
    """State: per matrix `rows` and `columns`, per vector `v`."""

    config: AdafactorConfig
    by_parameter: ClassVar[bool] = True

    def prepare(self, part: Part) -> None:
        """The factors lie apart by parameter; part.state has no more than the master copy."""
        self.factors: dict[str, dict[str, Array]] = getattr(self, "factors", {})
        for name, parameter in _members(part).items():
            whole = parameter.whole
            if len(whole) >= 2:
                factors = {"rows": part.zeros(whole[:-1]), "columns": part.zeros((*whole[:-2], whole[-1]))}
            else:
                factors = {"v": part.zeros(part.group.shapes[name])}
            self.factors[name] = factors

    def per_parameter_state(self) -> dict[str, Array]:
        """Views of the state by "<parameter>.<name>"; a matrix (r, c) has rows (r,) and columns (c,)."""
        factors = {f"{name}.{key}": array for name, each in self.factors.items() for key, array in each.items()}
        return super().per_parameter_state() | factors

    def blocks(self) -> Iterator[Block]:
        """Rows and columns are whole wherever there is a piece of the matrix."""
        yield from super().blocks()
        for name, factors in self.factors.items():
            parameter = self.flat.parameters[name]
            for key, array in factors.items():
                for box in parameter.boxes if key == "v" else whole_boxes(array.shape):
                    shape = parameter.whole if key == "v" else array.shape
                    yield Block(f"{name}.{key}", array[box.local], box.start, shape)

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """One parameter after the other; of a cut one, its owners add up their sums."""
        pieces = {piece.name: piece.where for piece in part.pieces}
        for name, parameter in _members(part).items():
            where, shape = pieces.get(name, slice(0, 0)), part.group.shapes[name]
            p = part.data[where].reshape(shape)
            g = part.gradient(where).reshape(shape) * float(scale)
            u, p_squares = self._direction(part, parameter, p, g)
            size = max(1, math.prod(parameter.whole))
            (u_squares,) = self._total(part, np.array(_squares(u)))
            u *= 1 / max(1.0, math.sqrt(u_squares / size) / self.config.clip_threshold)
            step = learning_rate * max(self.config.epsilon[1], math.sqrt(p_squares / size))
            p *= 1 - step * self.decay(len(shape) >= 2)
            p -= step * u

    def _direction(self, part: Part, parameter: Parameter, p: Array, g: Array) -> tuple[Array, float]:
        """G / sqrt(V^), and the sum of squares of the whole parameter."""
        beta, factors = 1 - self.steps**-self.config.decay, self.factors[parameter.name]
        squares = np.square(g)
        squares += self.config.epsilon[0]
        if "v" in factors:
            (p_squares,) = self._total(part, np.array(_squares(p)))
            return g / np.sqrt(_mean(factors["v"], squares, beta)), float(p_squares)
        rows, columns = np.zeros_like(factors["rows"]), np.zeros_like(factors["columns"])
        for box in parameter.boxes:
            rows[box.whole[:-1]] += squares[box.local].sum(axis=-1)
            columns[_without_rows(box.whole)] += squares[box.local].sum(axis=-2)
        rows, columns, p_squares = self._total(part, rows, columns, np.array(_squares(p)))
        rows, columns = _mean(factors["rows"], rows, beta), _mean(factors["columns"], columns, beta)
        # The root of the product, factor by factor: the product itself may underflow float32.
        rows, columns = np.sqrt(rows / rows.sum(axis=-1, keepdims=True)), np.sqrt(columns)
        for box in parameter.boxes:
            squares[box.local] = rows[box.whole[:-1]][..., None] * columns[_without_rows(box.whole)][..., None, :]
        return g / squares, float(p_squares)

    def _total(self, part: Part, *arrays: Array) -> list[Array]:
        """The arrays, summed over the ranks that have a piece of the same parameters."""
        comm = part.group.complement
        if comm.size == 1:
            return list(arrays)
        summed = comm.all_reduce(np.concatenate([array.reshape(-1).astype(np.float64) for array in arrays]))
        ends = np.cumsum([array.size for array in arrays])[:-1]
        cut = np.split(summed, ends)
        return [each.reshape(array.shape).astype(array.dtype) for each, array in zip(cut, arrays, strict=True)]


def _members(part: Part) -> dict[str, Parameter]:
    """The parameters of the part, with those of which other owners have all elements: these wait for our sums."""
    here, shapes = {piece.name for piece in part.pieces}, part.group.shapes
    return {name: each for name, each in part.group.parameters.items() if name in here or 0 in shapes[name]}


def _without_rows(box: tuple[slice, ...]) -> tuple[slice, ...]:
    return (*box[:-2], box[-1])


def _mean(running: Array, new: Array, beta: float) -> Array:
    running *= beta
    running += (1 - beta) * new
    return running


def _squares(x: Array) -> float:
    return float(kernels.of(x).sum_squares(x)) if x.size else 0.0
