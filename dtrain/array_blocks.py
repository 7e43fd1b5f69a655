"""Blocks of arrays along any dim, between ranks: put side by side, added up, exchanged.

    gathered            │a│ │b│        ──►  │a b│ on all           cut along dim, in blocks of any lengths
    reduce_scattered    │a b│ │c d│    ──►  │a+c│ │b+d│
    exchanged           cut along one dim ──► cut along another

The collectives move flat arrays. Blocks along the first dim lie one after the other already; along any other they are
copied into that form, and put together again on the other side. What is differentiable: `conjugate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.op import Shape


def block(array: Array, dim: int, lengths: Sequence[int], rank: int) -> Array:
    """Block `rank` of an array that is cut along dim into these lengths: a view."""
    start = sum(lengths[:rank])
    return array[(slice(None),) * dim + (slice(start, start + lengths[rank]),)]


def gathered(array: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Array:
    """The blocks of all ranks side by side along dim."""
    if comm.size == 1:
        return array
    shapes = [_with(array.shape, dim, length) for length in lengths]
    flat = comm.all_gather(np.ascontiguousarray(array).reshape(-1), counts=[math.prod(shape) for shape in shapes])
    return _joined(flat, shapes, dim)


def reduce_scattered(array: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Array:
    """My block along dim of the sum of all arrays."""
    if comm.size == 1:
        return array
    shapes = [_with(array.shape, dim, length) for length in lengths]
    flat = _blocks_flat(array, dim, lengths)
    return comm.reduce_scatter(flat, counts=[math.prod(shape) for shape in shapes]).reshape(shapes[comm.rank])


def start_reduce_scattered(array: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Callable[[], Array]:
    """`reduce_scattered` begun; the function returned waits for it."""
    shapes = [_with(array.shape, dim, length) for length in lengths]
    flat = _blocks_flat(array, dim, lengths)
    work = comm.reduce_scatter_async(flat, counts=[math.prod(shape) for shape in shapes])
    return lambda: work.wait().reshape(shapes[comm.rank])


def exchanged(
    array: Array, comm: Communicator, split_dim: int, concat_dim: int, split: Sequence[int], concat: Sequence[int]
) -> Array:
    """From cut along `concat_dim` into lengths `concat` to cut along `split_dim` into lengths `split`."""
    if comm.size == 1:
        return array
    width = array.size // max(1, array.shape[split_dim])
    mine = _with(array.shape, split_dim, split[comm.rank])
    shapes = [_with(mine, concat_dim, length) for length in concat]
    blocks = _blocks_flat(array, split_dim, split)
    if len({*split}) == len({*concat}) == 1:  # without counts all ranks know that the others' are equal too
        flat = comm.all_to_all(blocks)
    else:
        flat = comm.all_to_all(
            blocks, counts=[width * length for length in split], out_counts=[math.prod(shape) for shape in shapes]
        )
    return _joined(flat, shapes, concat_dim)


def _with(shape: Shape, dim: int, length: int) -> Shape:
    return (*shape[:dim], length, *shape[dim + 1 :])


def _blocks_flat(array: Array, dim: int, lengths: Sequence[int]) -> Array:
    """The blocks one after the other in memory; no copy where they lie so already."""
    if math.prod(array.shape[:dim]) == 1:
        return np.ascontiguousarray(array).reshape(-1)
    return np.concatenate([block(array, dim, lengths, rank).reshape(-1) for rank in range(len(lengths))])


def _joined(flat: Array, shapes: Sequence[Shape], dim: int) -> Array:
    if math.prod(shapes[0][:dim]) == 1:
        return flat.reshape(_with(shapes[0], dim, sum(shape[dim] for shape in shapes)))
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return np.concatenate([part.reshape(s) for part, s in zip(np.split(flat, ends), shapes, strict=True)], axis=dim)
