"""Arrays in and out of flat contiguous form, and the checks of arguments about them.

    source, target = pair(array, result, ...)       flat views where possible, copies and stand-ins where not
    ... the collective writes target ...
    return deliver(target, result)                  copies a stand-in into the result

Errors are ValueErrors that name the argument, its value, and what is allowed.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array, address, cut


def as_rows(array: Any) -> Array:
    """An array with a first dim: a single number becomes (1,)."""
    rows: Array = np.asarray(array)
    return rows.reshape(1) if rows.ndim == 0 else rows


def elements(rows: Sequence[int], shape: tuple[int, ...]) -> list[int]:
    """Rows per rank as elements per rank."""
    width = math.prod(shape[1:])
    return [count * width for count in rows]


def destination(out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`out` after a check, or a new array."""
    if dtype.hasobject:
        raise ValueError(f"dtype={dtype}: Python objects cannot travel; use broadcast_object or all_gather_object")
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise ValueError(f"out is a {type(out).__name__}; allowed: a NumPy array of shape {shape} and dtype {dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; allowed: {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}; allowed: {dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; allowed: a writable array")
    return out


def flat(array: Array) -> Array:
    """Array as (count,), contiguous, in the machine's byte order; a copy only where it must be."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    flat: Array = np.ascontiguousarray(array).reshape(-1)
    return flat


def pair(array: Array, result: Array, shared: bool) -> tuple[Array, Array]:
    """Source and target of an all_reduce: the same object when they are the same memory, disjoint otherwise."""
    target = target_of(result)
    if array is result:
        if target.base is not None and np.may_share_memory(target, result):
            return target, target
        return flat(array), target
    source = flat(array)
    if np.may_share_memory(source, target) and address(source) == address(target):
        return target, target
    return disjoint(source, target, shared)


def apart(array: Array, result: Array, shared: bool, own: int | None = None) -> tuple[Array, Array]:
    """Source and target in disjoint memory; or, with `own`, the source exactly at this element of the target."""
    source, target = flat(array), target_of(result)
    if own is not None and len(source) and address(source) == address(target) + own * source.itemsize:
        return source, target
    return disjoint(source, target, shared)


def swapped(array: Array, result: Array, shared: bool, even: bool) -> tuple[Array, Array, bool]:
    """Source and target of an all_to_all, and whether they are one memory, where only equal blocks change places."""
    source, target = flat(array), target_of(result)
    if even and len(source) and address(source) == address(target):
        return source, target, True
    return *disjoint(source, target, shared), False


def with_block(array: Array, result: Array, shared: bool, own: int | None = None) -> tuple[Array, Array]:
    """Source and target of a reduce_scatter: disjoint; or, with `own`, the target exactly at this element."""
    source, target = flat(array), target_of(result)
    if own is not None and len(target) and address(target) == address(source) + own * source.itemsize:
        return source, target
    return disjoint(source, target, shared)


def disjoint(source: Array, target: Array, shared: bool) -> tuple[Array, Array]:
    """The same where they do not overlap; else a copy of the source, or, where that must stay in the window
    (`shared`), a stand-in for the target that `deliver` copies when all peers have read the source.
    """
    if not np.may_share_memory(source, target):
        return source, target
    return (source, np.empty_like(target)) if shared else (source.copy(), target)


def target_of(result: Array) -> Array:
    """Where a transport may write the result: the result itself, flat, or a stand-in that `deliver` copies."""
    if result.flags.c_contiguous and result.dtype.isnative:
        return result.reshape(-1)
    return np.empty(result.size, result.dtype.newbyteorder("="))


def deliver(target: Array, result: Array) -> Array:
    """The result, after copying a stand-in into it."""
    if target.size and not np.may_share_memory(target, result):
        np.copyto(result, target.reshape(result.shape))
    return result


NOTHING: Array = np.empty(0, np.uint8)


def check_rank(name: str, rank: int, size: int) -> None:
    """A rank of a communicator of this size."""
    if not 0 <= rank < size:
        raise ValueError(f"{name}={rank}: not a rank of this communicator; allowed: 0 to {size - 1}")


def check_pair(name: str, rank: int, tag: int, own: int, size: int) -> None:
    """Another rank than the own, and a tag that every MPI has."""
    check_rank(name, rank, size)
    if rank == own:
        raise ValueError(f"{name}={rank}: that is this rank itself; copy the array instead")
    if not 0 <= tag < 32767:
        raise ValueError(f"tag={tag}: allowed: 0 to 32766")


def rows_per_rank(name: str, counts: Sequence[int] | None, total: int | None, size: int) -> list[int]:
    """The rows per rank: `counts` checked, or `total` cut evenly."""
    if counts is None:
        return cut(total or 0, size)
    rows = [int(count) for count in counts]
    if len(rows) != size or min(rows) < 0 or (total is not None and sum(rows) != total):
        expected = "" if total is None else f" with the sum {total}"
        raise ValueError(f"{name}={rows}: allowed: {size} numbers from 0{expected}")
    return rows


def rows_brought(array: Array, counts: Sequence[int] | None, rank: int, size: int) -> list[int]:
    """The rows that each rank brings to a gather."""
    rows = [len(array)] * size if counts is None else rows_per_rank("counts", counts, None, size)
    if rows[rank] != len(array):
        raise ValueError(f"counts={rows}: this rank brings {len(array)} rows, not {rows[rank]}")
    return rows
