# The types of the inner functions are in signatures.py.
# mypy: disable-error-code="no-untyped-def,attr-defined"
"""Compiled kernels of embeddings and optimizers: one pass over memory. Formulas: `dtrain/kernels/reference.py`."""

import math
from typing import Any

import numpy as np
from numba import carray

from dtrain.kernels.compiled.mathematics import Mathematics
from dtrain.kernels.compiled.signatures import SIGNATURES


def kernels_for(m: Mathematics) -> dict[str, Any]:
    """The kernels of one real type, by name."""
    real = m.real
    zero, one = real(0), real(1)
    f64 = np.float64

    def embedding(wp, idsp, yp, rows, columns):
        w, ids, y = carray(wp, (1 << 62, columns)), carray(idsp, rows), carray(yp, (rows, columns))
        for i in range(rows):
            at = ids[i]
            for j in range(columns):
                y[i, j] = w[at, j]

    def embedding_vjp(gp, idsp, dwp, rows, columns):
        g, ids, dw = carray(gp, (rows, columns)), carray(idsp, rows), carray(dwp, (1 << 62, columns))
        for i in range(rows):
            at = ids[i]
            for j in range(columns):
                dw[at, j] += g[i, j]

    def sum_squares(xp, sp, count):
        x, s = carray(xp, count), carray(sp, 1)
        total = f64(0)
        for i in range(count):
            total += f64(x[i]) * f64(x[i])
        s[0] = total

    def sgd(pp, gp, mp, count, lr, momentum, nesterov, decay, scale):
        p, g, m = carray(pp, count), carray(gp, count), carray(mp, count)
        rate, keep, shrink, factor = real(lr), real(momentum), real(decay), real(scale)
        fresh, past = (one, keep) if nesterov else (zero, one)  # the step is fresh * gradient + past * m
        for i in range(count):
            gradient = g[i] * factor + p[i] * shrink
            velocity = m[i] * keep + gradient
            m[i] = velocity
            p[i] -= rate * (fresh * gradient + past * velocity)

    def sgd_plain(pp, gp, count, lr, decay, scale):
        p, g = carray(pp, count), carray(gp, count)
        rate, shrink, factor = real(lr), real(decay), real(scale)
        for i in range(count):
            p[i] -= rate * (g[i] * factor + p[i] * shrink)

    def adam(pp, gp, mp, vp, count, lr, beta1, beta2, eps, decay, decoupled, correction1, correction2, scale):
        p, g, m, v = carray(pp, count), carray(gp, count), carray(mp, count), carray(vp, count)
        rate, keep1, keep2, epsilon, factor = real(lr), real(beta1), real(beta2), real(eps), real(scale)
        new1, new2, unbias1, unbias2 = real(1 - beta1), real(1 - beta2), real(1 / correction1), real(1 / correction2)
        coupled, shrink = (zero, real(decay)) if decoupled else (real(decay), zero)
        for i in range(count):
            gradient = g[i] * factor + p[i] * coupled
            first = m[i] * keep1 + gradient * new1
            second = v[i] * keep2 + gradient * gradient * new2
            m[i] = first
            v[i] = second
            p[i] -= rate * (first * unbias1 / (real(math.sqrt(second * unbias2)) + epsilon) + p[i] * shrink)

    def adam_direction(gp, mp, vp, pp, op, count, beta1, beta2, eps, decay, correction1, correction2, scale):
        p, g, m, v = carray(pp, count), carray(gp, count), carray(mp, count), carray(vp, count)
        out = carray(op, count)
        keep1, keep2, epsilon, shrink, factor = real(beta1), real(beta2), real(eps), real(decay), real(scale)
        new1, new2, unbias1, unbias2 = real(1 - beta1), real(1 - beta2), real(1 / correction1), real(1 / correction2)
        for i in range(count):
            gradient = g[i] * factor
            first = m[i] * keep1 + gradient * new1
            second = v[i] * keep2 + gradient * gradient * new2
            m[i] = first
            v[i] = second
            out[i] = first * unbias1 / (real(math.sqrt(second * unbias2)) + epsilon) + p[i] * shrink

    def axpy(pp, up, count, a):
        p, u = carray(pp, count), carray(up, count)
        factor = real(a)
        for i in range(count):
            p[i] += factor * u[i]

    return {name: value for name, value in locals().items() if name in SIGNATURES}
