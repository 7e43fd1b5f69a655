"""The choice of a backend, made once per process and dtype."""

import functools
from typing import Any, cast

import numpy as np

from dtrain.kernels import half, reference
from dtrain.kernels.interface import Kernels

HALF = ("float16", "bfloat16")
REFERENCE = cast(Kernels, reference)


@functools.cache
def for_dtype(dtype: np.dtype[Any]) -> Kernels:
    """The kernels for NumPy arrays of this dtype."""
    if dtype.name in HALF:
        return half.rounded(for_dtype(np.dtype(np.float32)), dtype)
    if dtype.kind == "f":
        return REFERENCE
    raise TypeError(f"no kernels for {dtype.name} arrays: float16, bfloat16, float32 or float64 are needed")


def for_device_array(array: Any) -> Kernels:
    """The kernels for an array that is not NumPy's."""
    raise TypeError(f"no kernels for {type(array).__module__}.{type(array).__name__}: NumPy or CuPy arrays are needed")


def describe() -> str:
    """One line for the log."""
    return "reference (plain NumPy)"
