"""float16 and bfloat16 on the CPU: widen to float32, run, round back.

One wrapper for the whole table: what a kernel updates and which results stay float32 is data (`interface.py`).
NumPy has no fast half-precision arithmetic, and float32 accumulation is what mixed precision asks for anyway.
"""

import functools
import inspect
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from dtrain.kernels.interface import NAMES, STATISTICS, UPDATES, Kernels


def rounded(kernels: Kernels, dtype: np.dtype[Any]) -> Kernels:
    """The given float32 kernels, for arrays of the half-precision dtype."""
    wrapped = {name: _wrap(getattr(kernels, name), name, dtype) for name in NAMES}
    return cast(Kernels, SimpleNamespace(**wrapped))


def _wrap(kernel: Any, name: str, dtype: np.dtype[Any]) -> Any:
    parameters = inspect.signature(kernel)
    updates = UPDATES.get(name, ())
    statistics = STATISTICS.get(name, ())

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        narrow = {key: value for key, value in given.items() if getattr(value, "dtype", None) == dtype}
        wide = {key: value.astype(np.float32) for key, value in narrow.items()}
        results = kernel(**(given | wide))
        back = {}  # id of a widened argument -> the caller's array: an updated argument may also be the result
        for key in updates:
            if key in narrow:
                narrow[key][...] = wide[key].astype(dtype)
                back[id(wide[key])] = narrow[key]
        if isinstance(results, tuple):
            return tuple(
                back.get(id(result), result if i in statistics else _round(result, dtype))
                for i, result in enumerate(results)
            )
        return back.get(id(results), _round(results, dtype))

    return call


def _round(result: Any, dtype: np.dtype[Any]) -> Any:
    return result.astype(dtype) if getattr(result, "dtype", None) == np.float32 else result
