"""The array type of annotations, and dtypes by the names that a configuration uses."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def named_dtype(name: str) -> np.dtype[Any]:
    """The dtype called `name`; bfloat16 comes from ml_dtypes, NumPy has none."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # only where it is used: every rank would pay for the import

    kind: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return kind
