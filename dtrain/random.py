"""Randomness without state: every random number is a function of (seed, purpose, index).

    seed, purpose, indices ──blake2b──► 64-bit key ──Philox──► the numbers of exactly this use

A sequential generator gives each rank other numbers as soon as the layout changes, and needs its state in every
checkpoint. Here "the mask of sample 17" or "values 65536..131071 of `blocks.0.attention.weight`" names its own key, so
whoever needs a number computes it, on any rank, in any order.

Invariant: nothing here depends on rank, size, call order, Python's hash seed or the platform.
Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from dtrain.arrays import Array

# Initial values are drawn in blocks of this many elements, each with its own key: a slice costs only the blocks it
# touches.
BLOCK = 1 << 16


def key(seed: int, purpose: str, *indices: int) -> int:
    """A 64-bit key (0 <= key < 2**64) for `purpose` at `indices`; other arguments give an unrelated key."""
    # "\0" keeps (1, "1a") apart from (11, "a").
    text = "\0".join([str(int(seed)), purpose, *(str(int(index)) for index in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def words(seed: int, purpose: str, *indices: int, count: int) -> Array:
    """`count` random uint64 words: raw Philox, which NumPy promises never to change (its distributions may)."""
    raw: Array = np.random.Philox(key=key(seed, purpose, *indices)).random_raw(count)
    return raw


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """NumPy's generator (all its distributions) at the start of the stream of `purpose` at `indices`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *indices)))


def normal(
    seed: int,
    name: str,
    shape: Sequence[int],
    std: float = 1.0,
    dtype: "np.typing.DTypeLike" = np.float32,
    part: Sequence[slice] = (),
) -> Array:
    """Initial values N(0, std²) of the tensor called `name` of global `shape`, or only its `part`.

    `part` has one slice (step 1) per leading dim; dims without one are whole. The result equals `normal(…)[part]` of
    the whole tensor, bit for bit. A slice of dim 0 draws only the blocks it touches; slices of later dims draw whole
    rows and then cut. Values are drawn in float64 and rounded to `dtype`, so that a float32 and a float64 run start
    from the same point.
    """
    first, last = part[0].indices(shape[0])[:2] if part else (0, shape[0] if shape else 1)
    row = math.prod(shape[1:])
    start, stop = first * row, max(first, last) * row
    rows = np.empty(stop - start, dtype=dtype)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        values = generator(seed, "initial values " + name, block).standard_normal(high - block * BLOCK)
        values *= std
        rows[low - start : high - start] = values[low - block * BLOCK :]
    if not shape:
        return rows.reshape(())
    return np.ascontiguousarray(rows.reshape(max(first, last) - first, *shape[1:])[(slice(None), *part[1:])])
