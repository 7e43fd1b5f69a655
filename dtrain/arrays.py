"""The array type of annotations."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
