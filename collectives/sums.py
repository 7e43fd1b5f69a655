"""Who adds up which slice in shared memory, and how: in one pass of machine code, or by NumPy in blocks of the size of
the cache; in rank order either way, with equal bits.

    slices   | rank 0 | rank 1 | rank 2 |     owned: whole cache lines, so no two owners write one
    block    x0 + x1 + x2 -> every result while the block is in the cache

A second pass over the vector to copy the result out would lose all that shared memory gains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives.caches import last_level_cache
from dtrain.collectives.dtypes import Array, accumulator, address
from dtrain.collectives.machine_code import machine_code

LINE = 64  # elements; slices begin on multiples of it, so no two owners write one cache line
FEW = 8192  # elements of all parts together: below, NumPy is as fast as a call of machine code


def owned(count: int, rank: int, size: int) -> tuple[int, int]:
    """The slice [start, stop) of `count` elements that this rank computes."""
    share = -(-count // (size * LINE)) * LINE
    return min(rank * share, count), min((rank + 1) * share, count)


def block_elements(dtype: np.dtype[Any], streams: int) -> int:
    """Elements per block, such that `streams` blocks stay together in an L2 cache of 1 MiB or less."""
    return max(16 * 1024, min(128 * 1024, 512 * 1024 // streams)) // accumulator(dtype).itemsize


def past_caches(parts: int, nbytes: int) -> bool:
    """Whether a sum of so many slices of so many bytes, all ranks' together, is longer than the caches."""
    return (parts + 1) * parts * nbytes > last_level_cache()


class Sum:
    """The sum of parts[*][start:stop] in rank order, prepared: in machine code where it knows dtype and operation."""

    def __init__(self, ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> None:
        self._what = ufunc, parts, start, stop
        dtype, code = parts[0].dtype, machine_code()
        self._add = None
        if code is not None and ufunc is np.add and dtype.isnative and (stop - start) * len(parts) >= FEW:
            self._add = code.sums.get(dtype.char)
        if self._add is not None:
            self._bytes = (stop - start) * dtype.itemsize
            self._table = np.array([address(part) for part in parts], np.int64) + start * dtype.itemsize
            self._inputs = address(self._table), len(parts)
            self._past_caches = past_caches(len(parts), self._bytes)

    def in_place(self) -> None:
        """parts[*][start:stop] = the sum."""
        if self._add is not None:
            self._add(*self._inputs, *self._inputs, self._bytes, False)
        else:
            with np.errstate(all="ignore"):  # beyond the largest number is infinity, as in MPI; never a warning
                _blocks_in_place(*self._what)

    def into(self, results: Sequence[Array]) -> None:
        """results[*][0 : stop - start] = the sum; a result may be a part."""
        if self._add is not None:
            table = np.array([address(result) for result in results], np.int64)
            self._add(*self._inputs, address(table), len(table), self._bytes, self._past_caches)
        else:
            with np.errstate(all="ignore"):
                _blocks_into(*self._what, results)


def reduce_in_place(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> None:
    """parts[*][start:stop] = the sum of all parts there, in rank order."""
    Sum(ufunc, parts, start, stop).in_place()


def reduce_into(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int, results: Sequence[Array]) -> None:
    """results[*][0 : stop - start] = the sum of parts[*][start:stop], in rank order; a result may be a part."""
    Sum(ufunc, parts, start, stop).into(results)


def _blocks_in_place(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int) -> None:
    """parts[*][start:stop] = the sum of all parts there, in rank order."""
    dtype = parts[0].dtype
    if accumulator(dtype) != dtype:
        _blocks_into(ufunc, parts, start, stop, [part[start:stop] for part in parts])
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


def _blocks_into(ufunc: np.ufunc, parts: Sequence[Array], start: int, stop: int, results: Sequence[Array]) -> None:
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
