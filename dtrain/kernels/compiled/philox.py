"""Philox4x32-10 for the compiled kernels: the words of `dtrain/kernels/philox.py`.

The ten rounds are written out: LLVM makes vector code of a loop over blocks only when its body has no loop.
"""

from typing import Any

import numba
import numpy as np

from dtrain.kernels.philox import MULTIPLIERS, ROUNDS, WEYL

U, V = np.uint32, np.uint64
MULTIPLIER0, MULTIPLIER1 = V(MULTIPLIERS[0]), V(MULTIPLIERS[1])
WEYL0, WEYL1 = U(WEYL[0]), U(WEYL[1])
assert ROUNDS == 10


@numba.njit(forceinline=True)
def philox_words(row0: Any, row1: Any, block: Any, key0: Any, key1: Any) -> Any:
    """Four uint32 words at the counter (row0, row1, block, 0); all arguments uint32."""
    c, a, b = (row0, row1, block, U(0)), key0, key1
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    c, a, b = _round(c, a, b), U(a + WEYL0), U(b + WEYL1)
    return _round(c, a, b)


@numba.njit(forceinline=True)
def _round(c: Any, key0: Any, key1: Any) -> Any:
    product0, product1 = V(c[0]) * MULTIPLIER0, V(c[2]) * MULTIPLIER1
    return U(U(product1 >> V(32)) ^ c[1] ^ key0), U(product1), U(U(product0 >> V(32)) ^ c[3] ^ key1), U(product0)
