"""Half the bytes: gradients rounded to float16 or bfloat16 for the way, summed in float32.

    node 0   n0 ─► 16 bits ─► slices ─► all_to_all ─► sum in float32 ─► 16 bits ─► all_gather ─► n0 = sum
    node 1   n1 ─► 16 bits ─► slices ─►     "      ─►       "        ─►    "    ─►     "      ─► n1 = sum

Each element is rounded once per node and once as a sum: an error of at most 2^-11 (float16) or 2^-8 (bfloat16) of the
largest term and of the sum. float16 ends at 65504 and thins out below 6e-5, where gradients live; so each slice is
scaled by a power of two, which is exact, that brings its largest element near 2^14.
Sent per rank: 2 (N-1)/N (2 n + 4 N), for bfloat16 without the 4 N.

Reference: Micikevicius et al., "Mixed precision training", arXiv:1710.03740, for why 16 bits are enough.
"""

from __future__ import annotations

import numpy as np

from dtrain.arrays import Array, named_dtype
from dtrain.strategies.compression.two_ways import TwoWays

TOP = 14  # exponent of the largest element after scaling: below float16's limit, 2^16


class Casting(TwoWays):
    """Rounding to a dtype of two bytes."""

    def __init__(self, dtype: str) -> None:
        self.name = dtype  # type: ignore[misc]
        self.dtype = named_dtype(dtype)
        self.scaled = dtype == "float16"  # bfloat16 has float32's exponents

    def nbytes(self, count: int) -> int:
        """Two per element, and the exponent."""
        return 2 * count + 4 * self.scaled

    def encode(self, values: Array, key: tuple[int, ...]) -> Array:
        """Values (n,) as bytes."""
        exponent = 0
        if self.scaled:
            largest = float(np.max(np.abs(values), initial=0.0))  # NaN and infinity go as they are
            exponent = TOP - int(np.frexp(largest)[1]) if np.isfinite(largest) and largest else 0
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = (np.ldexp(values, exponent) if exponent else values).astype(self.dtype)
        payload = rounded.view(np.uint8)
        return np.concatenate([np.array([exponent], np.int32).view(np.uint8), payload]) if self.scaled else payload

    def decode(self, payload: Array, out: Array) -> None:
        """The other way."""
        start = 4 * self.scaled
        exponent = int(payload[:4].view(np.int32)[0]) if self.scaled else 0
        with np.errstate(invalid="ignore"):
            out[...] = payload[start:].view(self.dtype)
        if exponent:
            np.ldexp(out, -exponent, out=out)
