"""Memory for large temporaries."""

from typing import Any

import numpy as np

from dtrain.arrays import Array


def empty(shape: Any, dtype: Any) -> Array:
    """An uninitialised array."""
    return np.empty(shape, dtype)
