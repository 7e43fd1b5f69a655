# The types of the inner functions are in signatures.py.
# mypy: disable-error-code="no-untyped-def,attr-defined"
"""Compiled kernels around the matrix products of attention: they work in place on one cache-sized block of scores.

A block holds `rows` consecutive queries of `heads` heads against `columns` keys. Query i of the block sees the keys
before first + step * i (causal: step 1, else 0); the others get weight 0. Formulas: `reference_attention.py`;
recomputation from logsumexp as in FlashAttention (Dao et al., arXiv:2205.14135).
"""

import math
from typing import Any

import numpy as np
from numba import carray

from dtrain.kernels.compiled.mathematics import Mathematics
from dtrain.kernels.compiled.signatures import SIGNATURES


def kernels_for(m: Mathematics) -> dict[str, Any]:
    """The attention kernels of one real type, by name."""
    real, exp, order, unorder, lowest = m.real, m.exp, m.order, m.unorder, m.lowest
    zero, one = real(0), real(1)

    def attention_weights(sp, lp, heads, rows, columns, first, step, stride, scale):
        s, logsumexp = carray(sp, (heads * rows, columns)), carray(lp, heads * stride)
        factor = real(scale)
        for h in range(heads):
            for i in range(rows):
                r = h * rows + i
                visible = min(columns, max(0, first + step * i))
                top = lowest
                for j in range(visible):
                    top = max(top, order(s[r, j] * factor))
                peak = unorder(top)
                total = zero
                for j in range(visible):
                    e = exp(s[r, j] * factor - peak)
                    s[r, j] = e
                    total += e
                inverse = one / total
                for j in range(visible):
                    s[r, j] *= inverse
                for j in range(visible, columns):
                    s[r, j] = zero
                logsumexp[h * stride + i] = real(math.log(total)) + peak if visible > 0 else real(-np.inf)

    def attention_gradient(sp, dp, lp, deltap, heads, rows, columns, first, step, stride, scale):
        s, d = carray(sp, (heads * rows, columns)), carray(dp, (heads * rows, columns))
        logsumexp, delta = carray(lp, heads * stride), carray(deltap, heads * stride)
        factor = real(scale)
        for h in range(heads):
            for i in range(rows):
                r = h * rows + i
                visible = min(columns, max(0, first + step * i))
                total, across = logsumexp[h * stride + i], delta[h * stride + i]
                for j in range(visible):
                    weight = exp(s[r, j] * factor - total)
                    s[r, j] = weight
                    d[r, j] = weight * (d[r, j] - across) * factor
                for j in range(visible, columns):
                    s[r, j] = zero
                    d[r, j] = zero

    def attention_delta(gp, op, deltap, batch, length, heads, depth):
        g, o = carray(gp, (batch * length * heads, depth)), carray(op, (batch * length * heads, depth))
        delta = carray(deltap, (batch, heads, length))
        for b in range(batch):
            for t in range(length):
                for h in range(heads):
                    r = (b * length + t) * heads + h
                    total = zero
                    for j in range(depth):
                        total += g[r, j] * o[r, j]
                    delta[b, h, t] = total

    def rotary(xp, cp, sp, yp, batch, length, heads, half, stride_b, stride_t, stride_h, sign):
        # Unsigned positions: Numba would wrap signed ones (x[-1]), which keeps LLVM from vector loads.
        x = carray(xp, 1 << 62)
        c, s = carray(cp, (length, half)), carray(sp, (length, half))
        y = carray(yp, (batch * length * heads, 2, half))
        direction = real(sign)
        for b in range(batch):
            for t in range(length):
                for h in range(heads):
                    r = (b * length + t) * heads + h
                    start = np.uint64(b * stride_b + t * stride_t + h * stride_h)
                    for j in range(half):
                        left, right = x[start + np.uint64(j)], x[start + np.uint64(half) + np.uint64(j)]
                        sine = s[t, j] * direction
                        y[r, 0, j] = left * c[t, j] - right * sine
                        y[r, 1, j] = right * c[t, j] + left * sine

    return {name: value for name, value in locals().items() if name in SIGNATURES}
