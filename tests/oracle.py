"""The oracle of the collectives: every rank knows the inputs of all ranks, and what NumPy alone makes of them."""

import zlib
from typing import Any

import ml_dtypes
import numpy as np

from dtrain.collectives import Communicator

Array = np.ndarray[Any, Any]
DTYPES = [np.dtype(word) for word in ("float32", "float64", "float16", "int8", "uint16", "int64", "bool", "complex64")]
DTYPES += [np.dtype(np.longdouble), np.dtype(ml_dtypes.bfloat16), np.dtype(">f4")]
OPS: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def lengths(size: int, dtype: np.dtype[Any]) -> list[int]:
    """Lengths around the number of ranks, odd ones, and for some dtypes one chunk of the staging and more. Many ranks
    on few cores take turns, so they have fewer."""
    long = [65536, 70001] if dtype in (np.float32, np.float16) else [5001]
    short = {1, size} if size < 8 else set()
    return sorted({0, *short, max(size - 1, 0), size + 1, 1025, *long})


NORMALS = 65_537  # a prime: no chunk, block or portion of a longer array is another one's
_normals = np.tile(np.random.default_rng(0).standard_normal(NORMALS), 2)


def normals(seed: int, count: int) -> Array:
    """From a table: every rank needs the numbers of all, and on shared cores tests would mostly draw them."""
    start = (seed * 7919 + count) % NORMALS
    values = _normals[start : start + NORMALS]
    return values[:count].copy() if count <= NORMALS else np.resize(values, count)


def inputs(size: int, count: int, dtype: np.dtype[Any], seed: int = 0) -> list[Array]:
    """The arrays of all ranks: small values, so that float16 sums are exact enough to compare."""
    arrays = []
    for rank in range(size):
        values: Any = normals(2 * (seed * size + rank), count)
        if dtype.kind == "b":
            values = values > 0.5
        elif dtype.kind in "iu":
            values = (np.abs(values) * 3).astype(int) % 5
        elif dtype.kind == "c":
            values = values + 1j * normals(2 * (seed * size + rank) + 1, count)
        arrays.append(np.asarray(values).astype(dtype))
    return arrays


def total(arrays: list[Array], op: str = "sum") -> Array:
    """The reduction in rank order: small floats in float32, rounded once."""
    dtype = arrays[0].dtype
    small = dtype in (np.float16, np.dtype(ml_dtypes.bfloat16))
    result = arrays[0].astype(np.float32) if small else arrays[0].copy()
    for array in arrays[1:]:
        result = OPS[op](result, array.astype(np.float32) if small else array)
    return np.asarray(result.astype(dtype))


def join(arrays: list[Array]) -> Array:
    """The arrays one after another, in their own byte order (np.concatenate answers in the machine's)."""
    return np.concatenate(arrays).astype(arrays[0].dtype)


def close(actual: Array, expected: Array) -> None:
    """Equal up to the order of a sum in the dtype."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if bits(actual) == bits(expected):
        return
    if expected.dtype.kind in "fc" and expected.dtype != np.float16:
        tolerance = 1e-5 if expected.dtype.itemsize // (2 if expected.dtype.kind == "c" else 1) == 4 else 1e-12
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    else:
        raise AssertionError(f"{actual} is not {expected}, bit for bit")


def bits(array: Array) -> bytes:
    """The bits of the values; what pads an extended float to 16 bytes is no part of its value."""
    if array.dtype.type is not np.longdouble or array.itemsize != 16:
        return array.tobytes()
    octets = np.ascontiguousarray(array).view(np.uint8).reshape(-1, 16)
    return octets[:, :10].tobytes()


def same_everywhere(comm: Communicator, array: Array) -> None:
    """Equal bits on all ranks."""
    sums = comm.all_gather_object(zlib.crc32(bits(np.ascontiguousarray(array))))
    assert len(set(sums)) == 1, f"ranks hold different bits: {sums}"
