"""A matrix travels as two thin ones: one step of the power method per step of training.

    M = gradient + residual, rows x columns         P = M Q   (rows x r)     all_reduce, then orthonormal columns
    Q from the step before, columns x r             Q = Mᵀ P  (columns x r)  all_reduce
    sum over nodes ≈ P Qᵀ                           residual = M - P (my Q)ᵀ

One multiplication and its transpose are a power iteration towards the r largest singular vectors. Gradients change
slowly, so starting from the last Q, a single iteration per step suffices; the error feedback brings the rest later.
Both messages are sums: an ordinary all_reduce does it, and the cost does not grow with the number of nodes.
Vectors, and matrices that two thin ones would not make smaller, travel whole in the first message.
Sent per rank: 2 (N-1)/N 4 (r (rows + columns) + vectors) bytes in float32.

Every lane computes P Qᵀ for itself: the bits are equal on nodes of one kind of processor, as its BLAS decides them.

Reference: Vogels, Karimireddy, Jaggi, "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from dtrain import random
from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.strategies.compression.interface import Compression, Part, widened

FACTOR = "power_sgd_q"


class PowerSGD(Compression):
    """Products of rank `rank`."""

    name: ClassVar[str] = "power_sgd"
    stages: ClassVar[int] = 2
    feedback: ClassVar[bool] = True
    whole_parameters: ClassVar[bool] = True

    def __init__(self, rank: int = 4) -> None:
        self.rank = rank

    def attach(self, part: Part) -> None:
        """A Q for every matrix, the same on all ranks."""
        part.state[FACTOR] = {
            piece.name: random.normal(0, f"PowerSGD {piece.name}", (columns, self.rank), dtype=part.wide)
            for piece in part.pieces
            for rows, columns in [matrix_shape(piece.shape)]
            if self.worth_it(rows, columns)
        }

    def worth_it(self, rows: int, columns: int) -> bool:
        """Whether two thin matrices are smaller than the whole one."""
        return self.rank * (rows + columns) < rows * columns

    def exchange(self, part: Part, lane: Communicator, step: int) -> Iterator[list[Work]]:
        """P, then Q, of all matrices at once."""
        assert part.residual is not None
        total, residual, factors = widened(part), part.residual, part.state[FACTOR]
        matrices: dict[str, tuple[slice, Array]] = {}
        whole: list[slice] = []
        for piece in part.pieces:
            if piece.name in factors:
                matrices[piece.name] = piece.where, total[piece.where].reshape(matrix_shape(piece.shape))
            else:
                whole.append(piece.where)
        first = packed([total[where] for where in whole] + [m @ factors[name] for name, (_, m) in matrices.items()])
        yield [lane.all_reduce_async(first, out=first)]
        parts = unpacked(
            first, [(w.stop - w.start,) for w in whole] + [(len(m), self.rank) for _, m in matrices.values()]
        )
        vectors, thin = parts[: len(whole)], [orthonormal(p) for p in parts[len(whole) :]]
        for name, p in zip(matrices, thin, strict=True):
            factors[name][...] = matrices[name][1].T @ p
        for (where, matrix), p, name in zip(matrices.values(), thin, matrices, strict=True):
            residual[where] = (matrix - p @ factors[name].T).ravel()
        second = packed(list(factors.values()))
        yield [lane.all_reduce_async(second, out=second)]
        summed = unpacked(second, [q.shape for q in factors.values()])
        total[...] = 0
        for where, vector in zip(whole, vectors, strict=True):
            total[where] = vector
        for (where, _), p, q, name in zip(matrices.values(), thin, summed, factors, strict=True):
            total[where] = (p @ q.T).ravel()
            factors[name][...] = q
        part.gradient[...] = total

    def sent(self, part: Part, nodes: int) -> int:
        """Two all_reduces."""
        factors = part.state[FACTOR]
        first = second = 0
        for piece in part.pieces:
            rows, columns = matrix_shape(piece.shape)
            first += rows * (self.rank if piece.name in factors else columns)
            second += columns * self.rank if piece.name in factors else 0
        return sum(2 * (nodes - 1) * count * part.wide.itemsize // nodes for count in (first, second))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """First dim x all others; a vector is a single column."""
    rows = shape[0] if shape else 1
    return rows, int(np.prod(shape[1:], dtype=np.int64))


def orthonormal(p: Array) -> Array:
    """Columns that span what those of p (rows, r) span; r at most the number of rows."""
    q: Array = np.linalg.qr(p)[0]
    return q


def packed(arrays: list[Array]) -> Array:
    """One flat array."""
    return np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0, np.float32)


def unpacked(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The other way, as views."""
    arrays, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(flat[start : start + count].reshape(shape))
        start += count
    return arrays
