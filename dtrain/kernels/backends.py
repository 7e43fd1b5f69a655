"""The choice of a backend, made once per process and dtype."""

import functools
import os
import threading
import warnings
from typing import Any, cast

import numpy as np

from dtrain.errors import UserError
from dtrain.kernels import half, reference
from dtrain.kernels.interface import Kernels
from dtrain.kernels.native import Unavailable, load

HALF = ("float16", "bfloat16")
REFERENCE = cast(Kernels, reference)
CHOICES = ("fused", "reference")

_lock = threading.RLock()  # ranks may be threads: one of them loads


def for_dtype(dtype: np.dtype[Any]) -> Kernels:
    """The kernels for NumPy arrays of this dtype."""
    with _lock:
        if dtype.name in HALF:
            return half.rounded(_fused(32) or REFERENCE, dtype)
        if dtype.name in ("float32", "float64") and dtype.isnative:
            return _fused(dtype.itemsize * 8) or REFERENCE
        if dtype.kind == "f":
            return REFERENCE
    raise TypeError(f"no kernels for {dtype.name} arrays: float16, bfloat16, float32 or float64 are needed")


def for_device_array(array: Any) -> Kernels:
    """The kernels for an array that is not NumPy's."""
    if type(array).__module__.partition(".")[0] == "cupy":
        from dtrain.kernels.cuda import for_dtype as for_cuda_dtype  # CuPy is there: the array is its

        return for_cuda_dtype(array.dtype)
    raise TypeError(f"no kernels for {type(array).__module__}.{type(array).__name__}: NumPy or CuPy arrays are needed")


def describe() -> str:
    """One line for the log: the kernels of float32 arrays on the CPU."""
    with _lock:
        if _fused(32):
            return "fused (compiled for this CPU)"
    reason = _reason.get(32)
    return f"reference (plain NumPy): {reason}"


_reason: dict[int, str] = {}  # why the compiled kernels of that many bits are not in use


@functools.cache
def _fused(bits: int) -> Kernels | None:
    choice = os.environ.get("DTRAIN_KERNELS", "fused")
    if choice not in CHOICES:
        raise UserError(f"DTRAIN_KERNELS={choice}: must be one of {', '.join(CHOICES)}")
    if choice == "reference":
        _reason[bits] = "DTRAIN_KERNELS=reference"
        return None
    try:
        functions = load(bits)
    except Unavailable as error:
        _reason[bits] = str(error)
        warnings.warn(f"float{bits} arrays use the slower NumPy kernels: {error}", RuntimeWarning, stacklevel=2)
        return None
    from dtrain.kernels.fused import Fused

    return Fused(np.dtype(f"float{bits}"), functions)
