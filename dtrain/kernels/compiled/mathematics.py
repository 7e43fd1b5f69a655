"""exp and the normal distribution for the compiled kernels, per real type.

libm's functions are scalar; these for float32 are straight-line code, which LLVM turns into vector code (8 elements at
a time with AVX2). They are compiled without `reassoc`: their error terms must not be rearranged.
float64 goes to libm: it is for checking, where the last digit matters more than the time.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np

F = np.float32


class Mathematics(NamedTuple):
    """What the kernels of one real type are made of."""

    real: Any
    exp: Any
    normal_cdf: Any  # (z, exp(-z*z/2)) -> Phi(z)
    order: Any  # real -> integer that compares the same way; integer maxima vectorise, NaN-safe real ones do not
    unorder: Any
    lowest: Any  # the smallest such integer of a real number: minus infinity


def _inline(function: Any) -> Any:
    return numba.njit(forceinline=True, fastmath={"contract"}, error_model="numpy")(function)


@_inline
def add_difference(c: Any, a: Any, b: Any) -> Any:
    """The sum c + (a - b) in this order: a and b may be large and near each other."""
    return (a - b) + c


@_inline
def exp32(x: Any) -> Any:
    """exp(x) to 1 ulp; 0 below -87.68 (NumPy: denormal numbers), inf above 88.38 (NumPy: 88.72).

    2^n * exp(r), n = round(x / ln 2): adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits. The bounds
    give n = -127 and 128, whose powers come out as exactly 0 and inf. NaN passes the bounds and the polynomial.
    Polynomial: Cephes expf (Moshier), in Estrin's order, which has a shorter chain of dependent operations.
    """
    x = F(-88.0) if x < F(-88.0) else x
    x = F(89.0) if x > F(89.0) else x
    shifted = x * F(1.44269504) + F(12582912.0)
    n = shifted - F(12582912.0)
    r = x - n * F(0.693359375)
    r = r - n * F(-2.12194440e-4)
    square = r * r
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = p * square + (F(8.3334519073e-3) * r + F(4.1665795894e-2))
    p = p * square + (F(1.6666665459e-1) * r + F(5.0000001201e-1))
    p = p * square + (r + F(1))
    power = np.int32((F(shifted).view(np.int32) + np.int32(127)) << np.int32(23))  # the bits of 2^n
    return p * np.int32(power).view(np.float32)


@_inline
def normal_cdf32(z: Any, bell: Any) -> Any:
    """Phi(z) = erfc(-z / sqrt 2) / 2 with bell = exp(-z*z/2), relative error 1e-7 in both tails.

    erfc(a) = bell * t * Q(t), t = 1 / (1 + 0.3 a), a = |z| / sqrt 2 >= 0; Q is the polynomial of degree 8 with the
    least relative error (2.1e-8) on 0 <= a <= 12.
    """
    t = F(1) / (F(1) + F(0.3 * math.sqrt(0.5)) * abs(z))
    q = F(-0.1292527326)
    q = q * t + F(0.4842995314)
    q = q * t + F(-0.5097681849)
    q = q * t + F(0.5449625292)
    q = q * t + F(-0.09282324464)
    q = q * t + F(0.2141803311)
    q = q * t + F(0.1485215103)
    q = q * t + F(0.1706908956)
    q = q * t + F(0.1691893558)
    tail = F(0.5) * bell * t * q
    return F(1) - tail if z > F(0) else tail


@_inline
def order32(x: Any) -> Any:
    """The bits of x as an integer of the same order; NaN (with a positive sign) comes last."""
    bits = F(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_inline
def unorder32(i: Any) -> Any:
    """Inverse of order32."""
    return np.int32(i ^ ((i >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@_inline
def exp64(x: Any) -> Any:
    """From libm."""
    return math.exp(x)


@_inline
def normal_cdf64(z: Any, bell: Any) -> Any:
    """From libm."""
    return 0.5 * math.erfc(-z * math.sqrt(0.5))


@_inline
def order64(x: Any) -> Any:
    """As order32."""
    bits = np.float64(x).view(np.int64)
    return np.int64(bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))


@_inline
def unorder64(i: Any) -> Any:
    """Inverse of order64."""
    return np.int64(i ^ ((i >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)


def _bits_of_minus_infinity(real: Any, integer: Any) -> Any:
    return integer(real(-np.inf).view(integer) ^ np.iinfo(integer).max)


FLOAT32 = Mathematics(
    np.float32, exp32, normal_cdf32, order32, unorder32, _bits_of_minus_infinity(np.float32, np.int32)
)
FLOAT64 = Mathematics(
    np.float64, exp64, normal_cdf64, order64, unorder64, _bits_of_minus_infinity(np.float64, np.int64)
)
