"""Who adds up which slice in shared memory, and how: in blocks that stay in the cache, in rank order.

    slices   | rank 0 | rank 1 | rank 2 |     owned: whole cache lines, so no two owners write one
    block    x0 + x1 + x2 -> every result while the block is in the cache

A second pass over the vector to copy the result out would lose all that shared memory gains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array, accumulator

LINE = 64  # elements; slices begin on multiples of it, so no two owners write one cache line


def owned(count: int, rank: int, size: int) -> tuple[int, int]:
    """The slice [start, stop) of `count` elements that this rank computes."""
    share = -(-count // (size * LINE)) * LINE
    return min(rank * share, count), min((rank + 1) * share, count)


def block_elements(dtype: np.dtype[Any], streams: int) -> int:
    """Elements per block, such that `streams` blocks stay together in an L2 cache of 1 MiB or less."""
    return max(16 * 1024, min(128 * 1024, 512 * 1024 // streams)) // accumulator(dtype).itemsize


def reduce_in_place(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> None:
    """parts[*][start:stop] = the sum of all parts there, in rank order."""
    dtype = parts[0].dtype
    if accumulator(dtype) != dtype:
        reduce_into(ufunc, parts, start, stop, [part[start:stop] for part in parts])
        return
    step = block_elements(dtype, len(parts))
    first, others = parts[0], parts[1:]
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        total = first[begin:end]
        blocks = [part[begin:end] for part in others]
        for block in blocks:
            ufunc(total, block, out=total)
        for block in blocks:
            block[...] = total


def reduce_into(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int, results: Sequence[Array]) -> None:
    """results[*][0 : stop - start] = the sum of parts[*][start:stop], in rank order; a result may be a part."""
    dtype = parts[0].dtype
    wide = accumulator(dtype)
    step = block_elements(dtype, 2 + len(results))
    if wide == dtype and len(parts) == 2 and len(results) == 1:  # the common case of two ranks needs no scratch
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            ufunc(parts[0][begin:end], parts[1][begin:end], out=results[0][begin - start : end - start])
        return
    scratch = np.empty(min(step, stop - start), wide)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        total = scratch[: end - begin]
        if wide == dtype:
            ufunc(parts[0][begin:end], parts[1][begin:end], out=total)
            for part in parts[2:]:
                ufunc(total, part[begin:end], out=total)
        else:
            total[...] = parts[0][begin:end]
            for part in parts[1:]:
                ufunc(total, part[begin:end].astype(wide), out=total)
        for result in results:
            result[begin - start : end - start] = total
