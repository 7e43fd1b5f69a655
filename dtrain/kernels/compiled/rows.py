# The types of the inner functions are in signatures.py.
# mypy: disable-error-code="no-untyped-def,attr-defined"
"""Compiled kernels that reduce along rows: normalisation, softmax, cross-entropy.

A row is read from memory once and then stays in the cache for the passes over it. Gradients of weights and biases are
added up in the same pass, row after row: one fixed order. Formulas: `dtrain/kernels/reference.py`.
"""

import math
from typing import Any

from numba import carray

from dtrain.kernels.compiled.mathematics import Mathematics, add_difference
from dtrain.kernels.compiled.signatures import SIGNATURES


def kernels_for(m: Mathematics) -> dict[str, Any]:
    """The row kernels of one real type, by name."""
    real, exp, order, unorder, lowest = m.real, m.exp, m.order, m.unorder, m.lowest
    zero, one = real(0), real(1)

    def layer_norm(xp, wp, bp, yp, meanp, rstdp, rows, columns, eps):
        x, y = carray(xp, (rows, columns)), carray(yp, (rows, columns))
        w, b = carray(wp, columns), carray(bp, columns)
        mean, rstd = carray(meanp, rows), carray(rstdp, rows)
        for i in range(rows):
            total = zero
            for j in range(columns):
                total += x[i, j]
            centre = total / real(columns)
            squares = zero
            for j in range(columns):
                squares += (x[i, j] - centre) * (x[i, j] - centre)
            scale = one / real(math.sqrt(squares / real(columns) + real(eps)))
            for j in range(columns):
                y[i, j] = (x[i, j] - centre) * scale * w[j] + b[j]
            mean[i] = centre
            rstd[i] = scale

    def layer_norm_vjp(gp, xp, wp, meanp, rstdp, dxp, dwp, dbp, rows, columns):
        g, x, dx = carray(gp, (rows, columns)), carray(xp, (rows, columns)), carray(dxp, (rows, columns))
        w, dw, db = carray(wp, columns), carray(dwp, columns), carray(dbp, columns)
        mean, rstd = carray(meanp, rows), carray(rstdp, rows)
        for j in range(columns):
            dw[j] = zero
            db[j] = zero
        for i in range(rows):
            centre, scale = mean[i], rstd[i]
            along, across = zero, zero
            for j in range(columns):
                s = g[i, j] * w[j]
                along += s
                across += s * ((x[i, j] - centre) * scale)
            along /= real(columns)
            across /= real(columns)
            for j in range(columns):
                h = (x[i, j] - centre) * scale
                dx[i, j] = (g[i, j] * w[j] - along - h * across) * scale
                dw[j] += g[i, j] * h
                db[j] += g[i, j]

    def rms_norm(xp, wp, yp, rstdp, rows, columns, eps):
        x, y = carray(xp, (rows, columns)), carray(yp, (rows, columns))
        w, rstd = carray(wp, columns), carray(rstdp, rows)
        for i in range(rows):
            squares = zero
            for j in range(columns):
                squares += x[i, j] * x[i, j]
            scale = one / real(math.sqrt(squares / real(columns) + real(eps)))
            for j in range(columns):
                y[i, j] = x[i, j] * scale * w[j]
            rstd[i] = scale

    def rms_norm_vjp(gp, xp, wp, rstdp, dxp, dwp, rows, columns):
        g, x, dx = carray(gp, (rows, columns)), carray(xp, (rows, columns)), carray(dxp, (rows, columns))
        w, dw, rstd = carray(wp, columns), carray(dwp, columns), carray(rstdp, rows)
        for j in range(columns):
            dw[j] = zero
        for i in range(rows):
            scale = rstd[i]
            across = zero
            for j in range(columns):
                across += g[i, j] * w[j] * (x[i, j] * scale)
            across /= real(columns)
            for j in range(columns):
                h = x[i, j] * scale
                dx[i, j] = (g[i, j] * w[j] - h * across) * scale
                dw[j] += g[i, j] * h

    def softmax(xp, yp, rows, columns):
        x, y = carray(xp, (rows, columns)), carray(yp, (rows, columns))
        for i in range(rows):
            top = lowest
            for j in range(columns):
                top = max(top, order(x[i, j]))
            peak = unorder(top)
            total = zero
            for j in range(columns):
                e = exp(x[i, j] - peak)
                y[i, j] = e
                total += e
            scale = one / total
            for j in range(columns):
                y[i, j] *= scale

    def softmax_vjp(gp, yp, dxp, rows, columns):
        g, y, dx = carray(gp, (rows, columns)), carray(yp, (rows, columns)), carray(dxp, (rows, columns))
        for i in range(rows):
            total = zero
            for j in range(columns):
                total += g[i, j] * y[i, j]
            for j in range(columns):
                dx[i, j] = y[i, j] * (g[i, j] - total)

    def log_softmax(xp, yp, rows, columns):
        x, y = carray(xp, (rows, columns)), carray(yp, (rows, columns))
        for i in range(rows):
            top = lowest
            for j in range(columns):
                top = max(top, order(x[i, j]))
            peak = unorder(top)
            total = zero
            for j in range(columns):
                total += exp(x[i, j] - peak)
            minus_logarithm = -real(math.log(total))
            for j in range(columns):
                y[i, j] = add_difference(minus_logarithm, x[i, j], peak)

    def log_softmax_vjp(gp, yp, dxp, rows, columns):
        g, y, dx = carray(gp, (rows, columns)), carray(yp, (rows, columns)), carray(dxp, (rows, columns))
        for i in range(rows):
            total = zero
            for j in range(columns):
                total += g[i, j]
            for j in range(columns):
                dx[i, j] = g[i, j] - exp(y[i, j]) * total

    def cross_entropy(xp, targetsp, lossesp, logsumexpp, rows, columns, ignore):
        x, targets = carray(xp, (rows, columns)), carray(targetsp, rows)
        losses, logsumexp = carray(lossesp, rows), carray(logsumexpp, rows)
        for i in range(rows):
            top = lowest
            for j in range(columns):
                top = max(top, order(x[i, j]))
            peak = unorder(top)
            total = zero
            for j in range(columns):
                total += exp(x[i, j] - peak)
            logarithm, target = real(math.log(total)), targets[i]
            logsumexp[i] = logarithm + peak
            losses[i] = zero if target == ignore else add_difference(logarithm, peak, x[i, target])

    def cross_entropy_vjp(gp, xp, targetsp, logsumexpp, dxp, rows, columns, ignore):
        x, dx, targets = carray(xp, (rows, columns)), carray(dxp, (rows, columns)), carray(targetsp, rows)
        g, logsumexp = carray(gp, rows), carray(logsumexpp, rows)
        for i in range(rows):
            target, scale, total = targets[i], g[i], logsumexp[i]
            if target == ignore:
                for j in range(columns):
                    dx[i, j] = zero
            else:
                for j in range(columns):
                    dx[i, j] = exp(x[i, j] - total) * scale
                dx[i, target] -= scale

    return {name: value for name, value in locals().items() if name in SIGNATURES}
