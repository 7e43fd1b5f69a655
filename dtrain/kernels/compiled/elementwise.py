# The types of the inner functions are in signatures.py.
# mypy: disable-error-code="no-untyped-def,attr-defined"
"""Compiled kernels that go over memory once: bias, activations, dropout. Formulas: `dtrain/kernels/reference.py`."""

import math
from typing import Any

import numpy as np
from numba import carray

from dtrain.kernels.compiled.mathematics import Mathematics
from dtrain.kernels.compiled.philox import philox_words
from dtrain.kernels.compiled.signatures import SIGNATURES
from dtrain.kernels.constants import GELU_CUBIC, GELU_SLOPE


def kernels_for(m: Mathematics) -> dict[str, Any]:
    """The elementwise kernels of one real type, by name."""
    real, exp, normal_cdf = m.real, m.exp, m.normal_cdf
    zero, one, half = real(0), real(1), real(0.5)
    minus_slope2, cubic, cubic3 = real(-2 * GELU_SLOPE), real(GELU_CUBIC), real(3 * GELU_CUBIC)
    bell_height = real(1 / math.sqrt(2 * math.pi))
    U, V = np.uint32, np.uint64

    def bias_residual(xp, bp, residualp, yp, rows, columns):
        x, b, y = carray(xp, (rows, columns)), carray(bp, columns), carray(yp, (rows, columns))
        residual = carray(residualp, (rows, columns))
        for i in range(rows):
            for j in range(columns):
                y[i, j] = x[i, j] + b[j] + residual[i, j]

    def column_sum(gp, sp, rows, columns):
        g, s = carray(gp, (rows, columns)), carray(sp, columns)
        for j in range(columns):
            s[j] = zero
        for i in range(rows):
            for j in range(columns):
                s[j] += g[i, j]

    def gelu_tanh(xp, bp, yp, rows, columns):
        # 1 + tanh(u) = 2 / (1 + exp(-2u)): one exp, and no cancellation on the negative side.
        x, b, y = carray(xp, (rows, columns)), carray(bp, columns), carray(yp, (rows, columns))
        for i in range(rows):
            for j in range(columns):
                z = x[i, j] + b[j]
                y[i, j] = z / (one + exp(minus_slope2 * (z + cubic * z * z * z)))

    def gelu_tanh_vjp(gp, xp, bp, dxp, dbp, rows, columns):
        g, x, dx = carray(gp, (rows, columns)), carray(xp, (rows, columns)), carray(dxp, (rows, columns))
        b, db = carray(bp, columns), carray(dbp, columns)
        for j in range(columns):
            db[j] = zero
        for i in range(rows):
            for j in range(columns):
                z = x[i, j] + b[j]
                gate = one / (one + exp(minus_slope2 * (z + cubic * z * z * z)))
                slope = gate * (gate - one) * minus_slope2 * (one + cubic3 * z * z)
                d = g[i, j] * (gate + z * slope)
                dx[i, j] = d
                db[j] += d

    def gelu_exact(xp, bp, yp, rows, columns):
        x, b, y = carray(xp, (rows, columns)), carray(bp, columns), carray(yp, (rows, columns))
        for i in range(rows):
            for j in range(columns):
                z = x[i, j] + b[j]
                y[i, j] = z * normal_cdf(z, exp(-half * z * z))

    def gelu_exact_vjp(gp, xp, bp, dxp, dbp, rows, columns):
        g, x, dx = carray(gp, (rows, columns)), carray(xp, (rows, columns)), carray(dxp, (rows, columns))
        b, db = carray(bp, columns), carray(dbp, columns)
        for j in range(columns):
            db[j] = zero
        for i in range(rows):
            for j in range(columns):
                z = x[i, j] + b[j]
                bell = exp(-half * z * z)
                d = g[i, j] * (normal_cdf(z, bell) + z * (bell * bell_height))
                dx[i, j] = d
                db[j] += d

    def silu(xp, yp, count):
        x, y = carray(xp, count), carray(yp, count)
        for i in range(count):
            y[i] = x[i] * (one / (one + exp(-x[i])))

    def silu_vjp(gp, xp, dxp, count):
        g, x, dx = carray(gp, count), carray(xp, count), carray(dxp, count)
        for i in range(count):
            gate = one / (one + exp(-x[i]))
            dx[i] = g[i] * gate * (one + x[i] * (one - gate))

    def swiglu(gatep, upp, yp, count):
        x, up, y = carray(gatep, count), carray(upp, count), carray(yp, count)
        for i in range(count):
            y[i] = x[i] * (one / (one + exp(-x[i]))) * up[i]

    def swiglu_vjp(gp, gatep, upp, dgatep, dupp, count):
        g, x, up = carray(gp, count), carray(gatep, count), carray(upp, count)
        dgate, dup = carray(dgatep, count), carray(dupp, count)
        for i in range(count):
            gate = one / (one + exp(-x[i]))
            dgate[i] = g[i] * up[i] * gate * (one + x[i] * (one - gate))
            dup[i] = g[i] * x[i] * gate

    def dropout(xp, idsp, yp, rows, columns, key0, key1, threshold, factor):
        # First the factor of every element (0 where dropped) into y, then the product: in one loop, the loads of x
        # between the interleaved stores keep LLVM from vector code. Unsigned positions as in `rotary`.
        x, y, ids = carray(xp, (rows, columns)), carray(yp, (rows, columns)), carray(idsp, rows)
        factors = carray(yp, rows * columns)
        limit, keep = U(threshold), real(factor)
        for i in range(rows):
            row0, row1 = U(V(ids[i]) & V(0xFFFFFFFF)), U(V(ids[i]) >> V(32))
            start = V(i * columns)
            for block in range(columns // 4):
                word0, word1, word2, word3 = philox_words(row0, row1, U(block), U(key0), U(key1))
                at = start + V(4) * V(block)
                factors[at] = keep if word0 >= limit else zero
                factors[at + V(1)] = keep if word1 >= limit else zero
                factors[at + V(2)] = keep if word2 >= limit else zero
                factors[at + V(3)] = keep if word3 >= limit else zero
            rest = columns % 4
            if rest > 0:
                word0, word1, word2, word3 = philox_words(row0, row1, U(columns // 4), U(key0), U(key1))
                at = start + V(columns - rest)
                factors[at] = keep if word0 >= limit else zero
                if rest > 1:
                    factors[at + V(1)] = keep if word1 >= limit else zero
                if rest > 2:
                    factors[at + V(2)] = keep if word2 >= limit else zero
            for j in range(columns):
                kept = y[i, j]
                y[i, j] = x[i, j] * kept if kept > zero else zero  # not a bare product: a dropped NaN is 0

    return {name: value for name, value in locals().items() if name in SIGNATURES}
