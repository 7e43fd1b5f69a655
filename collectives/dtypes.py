"""What all collectives agree on about arrays: dtypes, the four operations, how a length is cut, how a sum is ordered.

    cut(10, 4)      -> 3 3 2 2       the first (count mod size) ranks get one more; the same rule everywhere
    reduce_rows     -> ((x0 + x1) + x2) + ...      rank order, whatever the executor

Invariant: the order of a sum depends on (size, count, algorithm) alone, so results repeat bit for bit. float16,
bfloat16 and the float8 types of ml_dtypes are added in float32 and rounded once at the end.
"""

import ast
import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np

Array = np.ndarray[Any, Any]

# Every reduction is a sum unless asked; there is no average.
OPERATIONS: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}

# Elements per pass: a float32 block of it is 128 KiB, so that a block of the sum stays in the L2 cache of any recent
# core.
BLOCK_BYTES = 128 * 1024


def operation(op: str, dtype: np.dtype[Any]) -> np.ufunc:
    """The NumPy ufunc of `op` ("sum", "prod", "max", "min"); ValueError for another word or a dtype that has no sum."""
    if dtype.kind not in "biufc" and not is_small_float(dtype):
        raise ValueError(f"dtype={dtype}: only boolean, integer, floating and complex arrays can be reduced")
    try:
        return OPERATIONS[op]
    except KeyError:
        raise ValueError(f"op={op!r}: not an operation; allowed: {', '.join(OPERATIONS)}") from None


def neutral(op: str, dtype: np.dtype[Any]) -> Any:
    """The number of this dtype that changes no sum (product, maximum, minimum)."""
    if op in ("sum", "prod"):
        return dtype.type(op == "prod")
    if dtype.kind == "b":
        return op == "min"
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if op == "max" else np.iinfo(dtype).max
    infinity = -np.inf if op == "max" else np.inf
    return dtype.type(complex(infinity, infinity) if dtype.kind == "c" else infinity)


@lru_cache(maxsize=64)
def is_small_float(dtype: np.dtype[Any]) -> bool:
    """float16, or a float type of ml_dtypes (told by its module: only who makes such arrays imports that package)."""
    return dtype == np.float16 or (dtype.type.__module__ == "ml_dtypes" and "float" in dtype.name)


@lru_cache(maxsize=64)
def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which arrays of `dtype` are added up; the same object where that is `dtype` itself."""
    return np.dtype(np.float32) if is_small_float(dtype) else dtype


def dtype_name(dtype: np.dtype[Any]) -> str:
    """A text from which `dtype_from_name` makes the dtype again, records with fields included."""
    if dtype.type.__module__ == "ml_dtypes":
        return dtype.name
    return repr(np.lib.format.dtype_to_descr(dtype))


@lru_cache(maxsize=64)
def dtype_from_name(name: str) -> np.dtype[Any]:
    """The inverse of `dtype_name`."""
    found: np.dtype[Any]
    if name[0] == "'":
        found = np.dtype(name[1:-1])
    elif name[0] == "[":
        found = np.lib.format.descr_to_dtype(ast.literal_eval(name))
    else:
        import ml_dtypes

        found = np.dtype(getattr(ml_dtypes, name))
    return found


def cut(count: int, size: int) -> list[int]:
    """Lengths of `size` consecutive blocks of `count` things: the first `count % size` blocks get one more."""
    small, extra = divmod(count, size)
    return [small + 1] * extra + [small] * (size - extra)


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """Start and stop of these blocks."""
    return list(pairwise(accumulate(cut(count, size), initial=0)))


def starts(counts: Sequence[int]) -> list[int]:
    """Where each block begins: [0, counts[0], counts[0] + counts[1], ...] without the total."""
    return list(accumulate(counts, initial=0))[:-1]


def address(array: Array) -> int:
    """Where the first element lies. Four times as fast as NumPy's own ways, for writable arrays that are not empty."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(cast(Any, array)))
    except (TypeError, ValueError):  # read-only, empty, not contiguous, or of a dtype without buffers (bfloat16)
        return int(array.__array_interface__["data"][0])


def reduce_rows(ufunc: np.ufunc, sources: Sequence[Array], target: Array) -> None:
    """Target = sources[0] op sources[1] op ... in this order, block by block; all 1-D of one length.

    `target` may be one of the sources exactly (not a shifted view of one).
    """
    dtype = target.dtype
    wide = accumulator(dtype)
    step = max(1, BLOCK_BYTES // wide.itemsize)
    scratch = np.empty(min(step, len(target)), wide)
    with np.errstate(all="ignore"):  # a sum beyond the largest number is infinity, as in MPI: never an exception here
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            total = scratch[: stop - start]
            total[...] = sources[0][start:stop]
            for source in sources[1:]:
                part = source[start:stop]
                ufunc(total, part if wide == dtype else part.astype(wide), out=total)
            target[start:stop] = total
