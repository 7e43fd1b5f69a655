"""Kernels: the arithmetic below autograd, in backends of one interface (`interface.py`).

    kernels.of(array).layer_norm(x, weight, bias, eps)

| backend   | arrays                          | what it is                                                    |
|-----------|---------------------------------|---------------------------------------------------------------|
| reference | NumPy                           | plain formulas, the oracle; also where nothing else can run   |
| fused     | NumPy float32, float64          | compiled once by Numba, one pass over memory per kernel       |
| half      | NumPy float16, bfloat16         | float32 kernels, results rounded back                         |
| cuda      | CuPy                            | CuPy raw and elementwise kernels                              |

`DTRAIN_KERNELS=reference` in the environment leaves the compiled kernels out.
"""

from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels import backends, memory  # malloc is told when `memory` is imported
from dtrain.kernels.interface import NAMES, Kernels

__all__ = ["NAMES", "Kernels", "describe", "memory", "of"]

_by_dtype: dict[Any, Kernels] = {}  # filled on first use: a pure cache, the choice depends on the process alone


def of(array: Array) -> Kernels:
    """The kernels for this array: by its type and dtype."""
    if type(array) is np.ndarray:
        found = _by_dtype.get(array.dtype.num)
        if found is not None:
            return found
    return _find(array)


def describe() -> str:
    """One line for the log: which kernels float32 arrays on the CPU get, and why."""
    return backends.describe()


def _find(array: Any) -> Kernels:
    if not isinstance(array, np.ndarray):
        return backends.for_device_array(array)
    found = backends.for_dtype(array.dtype)
    _by_dtype[array.dtype.num] = found
    return found
