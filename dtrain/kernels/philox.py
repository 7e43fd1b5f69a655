"""Philox4x32-10, the counter-based random number generator of dropout.

Four 32-bit words of randomness are a pure function of a 128-bit counter and a 64-bit key, so a mask needs neither state
nor memory: the backward pass (or a recomputation, or another layout of ranks) draws the same words again.
Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123's constants.
"""

from typing import Any

from dtrain.arrays import Array

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key before every round but the first
MASK = 0xFFFFFFFF


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Four words for each counter: arrays of uint64 (NumPy or CuPy) that hold 32-bit values, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """The smallest word that keeps an element dropped with probability p: word >= p * 2**32, in integers."""
    return -int(-p * 2**32 // 1)
