"""A quarter of the bytes: one signed byte per element, one scale per block.

    block of 256   x ─► scale = max |x| / 127 ─► q = round(x / scale), -127 … 127          256 + 4 bytes, not 1024

Stochastic rounding takes the upper neighbour with the probability that makes the mean right: x / scale = 3.2 becomes 3
in four of five cases, else 4. Small gradients then are not lost but become rare, and the expected step is SGD's own.
The lots are drawn by counters (step, bucket, rank, slice): the same on every start, and after a resume.
Sent per rank: 2 (N-1)/N (n + 4 n / block).

Reference: Alistarh et al., "QSGD", arXiv:1610.02132; blocks with own scales as in Dettmers, arXiv:1511.04561.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dtrain import random
from dtrain.arrays import Array
from dtrain.strategies.compression.two_ways import TwoWays

LIMIT = 127  # -128 is left out: the range stays symmetric


class Quantised(TwoWays):
    """Rounding to multiples of a block's scale."""

    name: ClassVar[str] = "int8"

    def __init__(self, block: int = 256, stochastic: bool = True) -> None:
        self.block, self.stochastic = block, stochastic

    def nbytes(self, count: int) -> int:
        """One per element, four per block that was begun."""
        return count + 4 * self._blocks(count)

    def encode(self, values: Array, key: tuple[int, ...]) -> Array:
        """Values (n,) as scales (float32, one per block), then bytes."""
        count, blocks = values.size, self._blocks(values.size)
        padded = np.zeros(blocks * self.block, np.float32)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and then all of its block NaN
            padded[:count] = values
        rows = padded.reshape(blocks, self.block)
        scales = np.abs(rows).max(1, initial=0.0) / np.float32(LIMIT)
        # Blocks of zeros, or so small that the scale is no normal number, count as zeros; NaN and infinity must stay
        # visible: their scale is NaN, and so is all that is decoded with it.
        scales[scales < np.finfo(np.float32).tiny] = 0
        scales[~np.isfinite(scales)] = np.nan
        usable = scales > 0
        rows *= np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)[:, None]
        rows[~usable] = 0
        if self.stochastic:
            padded[:count] += self._lots(count, key)
            np.floor(padded, out=padded)
        else:
            np.rint(padded, out=padded)
        np.clip(padded, -LIMIT, LIMIT, out=padded)
        return np.concatenate([scales.view(np.uint8), padded[:count].astype(np.int8).view(np.uint8)])

    def decode(self, payload: Array, out: Array) -> None:
        """The other way."""
        blocks = self._blocks(out.size)
        scales = payload[: 4 * blocks].view(np.float32)
        out[...] = payload[4 * blocks :].view(np.int8)
        whole = out.size // self.block * self.block
        out[:whole].reshape(-1, self.block)[...] *= scales[: whole // self.block, None]
        if whole < out.size:
            out[whole:] *= scales[-1]

    def _blocks(self, count: int) -> int:
        return -(-count // self.block)

    def _lots(self, count: int, key: tuple[int, ...]) -> Array:
        """Numbers in [0, 1), 16 bits of chance each: (2 k + 1) / 2^17, so that whole numbers stay what they are."""
        drawn = random.words(0, "stochastic rounding", *key, count=-(-count // 4)).view(np.uint16)[:count]
        lots: Array = drawn * np.float32(2**-16) + np.float32(2**-17)
        return lots
