"""Clipping by the global norm: all gradients are scaled by one factor, so that their direction stays.

Each parameter counts once in every layout: cut ones by all that have a slice, replicated ones by shares: each rank adds
up the squares of its share of what it holds like others, and the sum over all ranks is that of the whole model.
Reference: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

import math

import numpy as np

from dtrain import kernels
from dtrain.collectives.dtypes import cut
from dtrain.flat import FlatBuffers


def sum_squares(flat: FlatBuffers) -> float:
    """This rank's share of the squares of all gradients, in float64: the shares of all ranks of the mesh add up to the
    square of the global norm. A parameter without a gradient gets one of 0.
    """
    flat.fill_missing()
    squares = 0.0
    for group in flat.groups:
        gradient = group.owned_grad
        index, count = group.replicas()
        lengths = cut(gradient.size, count)
        start = sum(lengths[:index])
        squares += kernels.of(gradient).sum_squares(gradient[start : start + lengths[index]])
    return squares


def global_norm(flat: FlatBuffers) -> float:
    """The 2-norm of all gradients of the model together. Collective over the mesh, if the buffers lie on one."""
    squares = sum_squares(flat)
    if flat.mesh is not None:
        squares = float(flat.mesh.comm.all_reduce(np.array([squares]))[0])
    return math.sqrt(squares)


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What to multiply gradients of this norm with so that it is `clip_norm` at most; 1 where that is None.

    A norm that is not finite gives a factor that is not: nothing is hidden.
    """
    if clip_norm is None:
        return 1.0
    return min(clip_norm / (norm + 1e-6), 1.0) if math.isfinite(norm) else math.nan
