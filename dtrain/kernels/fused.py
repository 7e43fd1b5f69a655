"""The fused backend: one compiled pass over memory per kernel, for float32 or float64 arrays.

A method checks what the compiled code must rely on (dtype, contiguity, shapes, ids in range), allocates the results
and passes addresses. Inputs of another dtype or layout are copied first; arrays to be updated must fit as they are.
The compiled code is in `compiled/`, its loading in `native.py`, attention in `fused_attention.py`.
"""

import ctypes
import functools
import math
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels import fused_attention
from dtrain.kernels.address import address as at
from dtrain.kernels.interface import Maybe, check_row
from dtrain.kernels.native import Function
from dtrain.kernels.philox import threshold


class Fused:
    """The kernels of one real dtype on the compiled functions of `native.load`."""

    def __init__(self, dtype: np.dtype[Any], functions: dict[str, Function]) -> None:
        self.dtype = dtype
        self.run = functions

    # ---- arguments ----

    def _plain(self, array: Array) -> Array:
        return np.asarray(array, self.dtype, order="C")

    def _like(self, array: Array, x: Array) -> Array:
        if array.shape != x.shape:
            raise ValueError(f"shapes differ: {array.shape} and {x.shape}")
        return np.asarray(array, self.dtype, order="C")

    def _sized(self, array: Array, size: int) -> Array:
        if array.size != size:
            raise ValueError(f"an array of shape {array.shape} where {size} values are needed")
        return np.asarray(array, self.dtype, order="C")

    def _vector(self, array: Maybe, size: int, default: float) -> Array:
        return _constant(size, default, self.dtype) if array is None else self._sized(array, size)

    def _updated(self, array: Array, size: int) -> Array:
        flags = array.flags
        if array.dtype != self.dtype or array.size != size or not (flags.c_contiguous and flags.writeable):
            raise ValueError(
                f"an array to be updated must be {self.dtype}, contiguous, writeable and of {size} values; "
                f"it is {array.dtype} of shape {array.shape}, strides {array.strides}"
            )
        return array

    # ---- normalisation ----

    def layer_norm(self, x: Array, weight: Maybe, bias: Maybe, eps: float) -> tuple[Array, Array, Array]:
        x, (rows, columns) = self._plain(x), _rows(x)
        w, b = self._vector(weight, columns, 1), self._vector(bias, columns, 0)
        y, mean, rstd = (
            np.empty(x.shape, self.dtype),
            np.empty(x.shape[:-1], self.dtype),
            np.empty(x.shape[:-1], self.dtype),
        )
        self.run["layer_norm"](at(x), at(w), at(b), at(y), at(mean), at(rstd), rows, columns, eps)
        return y, mean, rstd

    def layer_norm_vjp(self, g: Array, x: Array, weight: Maybe, mean: Array, rstd: Array) -> tuple[Array, Maybe, Array]:
        g, x, (rows, columns) = self._like(g, x), self._plain(x), _rows(x)
        w, mean, rstd = self._vector(weight, columns, 1), self._sized(mean, rows), self._sized(rstd, rows)
        dx, dw, db = np.empty(x.shape, self.dtype), np.empty(columns, self.dtype), np.empty(columns, self.dtype)
        self.run["layer_norm_vjp"](at(g), at(x), at(w), at(mean), at(rstd), at(dx), at(dw), at(db), rows, columns)
        return dx, None if weight is None else dw, db

    def rms_norm(self, x: Array, weight: Maybe, eps: float) -> tuple[Array, Array]:
        x, (rows, columns) = self._plain(x), _rows(x)
        w = self._vector(weight, columns, 1)
        y, rstd = np.empty(x.shape, self.dtype), np.empty(x.shape[:-1], self.dtype)
        self.run["rms_norm"](at(x), at(w), at(y), at(rstd), rows, columns, eps)
        return y, rstd

    def rms_norm_vjp(self, g: Array, x: Array, weight: Maybe, rstd: Array) -> tuple[Array, Maybe]:
        g, x, (rows, columns) = self._like(g, x), self._plain(x), _rows(x)
        w, rstd = self._vector(weight, columns, 1), self._sized(rstd, rows)
        dx, dw = np.empty(x.shape, self.dtype), np.empty(columns, self.dtype)
        self.run["rms_norm_vjp"](at(g), at(x), at(w), at(rstd), at(dx), at(dw), rows, columns)
        return dx, None if weight is None else dw

    # ---- elementwise ----

    def column_sum(self, g: Array) -> Array:
        g, (rows, columns) = self._plain(g), _rows(g)
        total = np.empty(columns, self.dtype)
        self.run["column_sum"](at(g), at(total), rows, columns)
        return total

    def bias_residual(self, x: Array, bias: Maybe, residual: Array) -> Array:
        x, residual, (rows, columns) = self._plain(x), self._like(residual, x), _rows(x)
        b, y = self._vector(bias, columns, 0), np.empty(x.shape, self.dtype)
        self.run["bias_residual"](at(x), at(b), at(residual), at(y), rows, columns)
        return y

    def gelu(self, x: Array, bias: Maybe, approximate: bool) -> Array:
        x, (rows, columns) = self._plain(x), _rows(x)
        b, y = self._vector(bias, columns, 0), np.empty(x.shape, self.dtype)
        self.run["gelu_tanh" if approximate else "gelu_exact"](at(x), at(b), at(y), rows, columns)
        return y

    def gelu_vjp(self, g: Array, x: Array, bias: Maybe, approximate: bool) -> tuple[Array, Maybe]:
        g, x, (rows, columns) = self._like(g, x), self._plain(x), _rows(x)
        b, dx, db = self._vector(bias, columns, 0), np.empty(x.shape, self.dtype), np.empty(columns, self.dtype)
        self.run["gelu_tanh_vjp" if approximate else "gelu_exact_vjp"](
            at(g), at(x), at(b), at(dx), at(db), rows, columns
        )
        return dx, None if bias is None else db

    def silu(self, x: Array) -> Array:
        x = self._plain(x)
        y = np.empty(x.shape, self.dtype)
        self.run["silu"](at(x), at(y), x.size)
        return y

    def silu_vjp(self, g: Array, x: Array) -> Array:
        g, x = self._like(g, x), self._plain(x)
        dx = np.empty(x.shape, self.dtype)
        self.run["silu_vjp"](at(g), at(x), at(dx), x.size)
        return dx

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = self._plain(gate), self._like(up, gate)
        y = np.empty(gate.shape, self.dtype)
        self.run["swiglu"](at(gate), at(up), at(y), gate.size)
        return y

    def swiglu_vjp(self, g: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        g, gate, up = self._like(g, gate), self._plain(gate), self._like(up, gate)
        dgate, dup = np.empty(gate.shape, self.dtype), np.empty(gate.shape, self.dtype)
        self.run["swiglu_vjp"](at(g), at(gate), at(up), at(dgate), at(dup), gate.size)
        return dgate, dup

    # ---- softmax family ----

    def softmax(self, x: Array) -> Array:
        return self._row_map("softmax", x)

    def softmax_vjp(self, g: Array, y: Array) -> Array:
        return self._row_map("softmax_vjp", self._like(g, y), y)

    def log_softmax(self, x: Array) -> Array:
        return self._row_map("log_softmax", x)

    def log_softmax_vjp(self, g: Array, y: Array) -> Array:
        return self._row_map("log_softmax_vjp", self._like(g, y), y)

    def _row_map(self, name: str, *inputs: Array) -> Array:
        arrays = [self._plain(array) for array in inputs]
        result = np.empty(arrays[0].shape, self.dtype)
        self.run[name](*[at(array) for array in arrays], at(result), *_rows(result))
        return result

    def cross_entropy(self, logits: Array, targets: Array, ignore: int) -> tuple[Array, Array]:
        logits, (rows, columns) = self._plain(logits), _rows(logits)
        targets = _targets(targets, rows, columns, ignore)
        losses, logsumexp = np.empty(rows, self.dtype), np.empty(rows, self.dtype)
        self.run["cross_entropy"](at(logits), at(targets), at(losses), at(logsumexp), rows, columns, ignore)
        return losses, logsumexp

    def cross_entropy_vjp(self, g: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int) -> Array:
        logits, (rows, columns) = self._plain(logits), _rows(logits)
        targets, g, logsumexp = (
            _targets(targets, rows, columns, ignore),
            self._sized(g, rows),
            self._sized(logsumexp, rows),
        )
        dlogits = np.empty(logits.shape, self.dtype)
        self.run["cross_entropy_vjp"](at(g), at(logits), at(targets), at(logsumexp), at(dlogits), rows, columns, ignore)
        return dlogits

    # ---- attention ----

    def rotary(self, x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
        batch, length, heads, depth = x.shape
        size = self.dtype.itemsize
        if x.dtype != self.dtype or x.strides[3] != size or any(s < 0 or s % size for s in x.strides):
            x = self._plain(x)
        if depth % 2:
            raise ValueError(f"rotary embedding turns pairs: the last dim of {x.shape} must be even")
        cos, sin = self._sized(cos, length * (depth // 2)), self._sized(sin, length * (depth // 2))
        y = np.empty(x.shape, self.dtype)
        strides = [stride // size for stride in x.strides[:3]]
        self.run["rotary"](
            at(x), at(cos), at(sin), at(y), batch, length, heads, depth // 2, *strides, -1 if inverse else 1
        )
        return y

    def attention(self, q: Array, k: Array, v: Array, causal: bool, scale: float) -> tuple[Array, Array]:
        return fused_attention.attention(self.run, self.dtype, q, k, v, causal, scale)

    def attention_vjp(
        self,
        g: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        logsumexp: Array,
        causal: bool,
        scale: float,
        dq: Maybe = None,
        dk: Maybe = None,
        dv: Maybe = None,
    ) -> tuple[Array, Array, Array]:
        g, out = self._like(g, q), self._like(out, q)
        logsumexp = self._sized(logsumexp, q.shape[0] * q.shape[1] * q.shape[2])
        return fused_attention.attention_vjp(
            self.run, self.dtype, g, q, k, v, out, logsumexp, causal, scale, (dq, dk, dv)
        )

    # ---- dropout and embedding ----

    def dropout(self, x: Array, p: float, key: int, row_ids: Array) -> Array:
        x, (rows, columns) = self._plain(x), _rows(x)
        ids = np.asarray(row_ids, np.int64, order="C")
        if ids.size != rows:
            raise ValueError(f"{ids.size} row ids for {rows} rows")
        y, limit = np.empty(x.shape, self.dtype), threshold(p)
        if limit > 0xFFFFFFFF:  # no word is that large
            y[...] = 0
        else:
            self.run["dropout"](at(x), at(ids), at(y), rows, columns, key & 0xFFFFFFFF, key >> 32, limit, 1 / (1 - p))
        return y

    def embedding(self, weight: Array, ids: Array) -> Array:
        weight, (num_rows, columns) = self._plain(weight), weight.shape
        ids = _ids(ids, num_rows)
        y = np.empty((*ids.shape, columns), self.dtype)
        self.run["embedding"](at(weight), at(ids), at(y), ids.size, columns)
        return y

    def embedding_vjp(self, g: Array, ids: Array, num_rows: int, out: Maybe = None) -> Array:
        columns = g.shape[-1]
        ids = _ids(ids, num_rows)
        g = self._sized(g, ids.size * columns)
        if out is None:
            out = np.empty((num_rows, columns), self.dtype)
            out[...] = 0
        total = self._updated(out, num_rows * columns)
        self.run["embedding_vjp"](at(g), at(ids), at(total), ids.size, columns)
        return out

    # ---- optimizers ----

    def sum_squares(self, x: Array) -> float:
        x, total = self._plain(x), ctypes.c_double()
        self.run["sum_squares"](at(x), ctypes.addressof(total), x.size)
        return total.value

    def sgd(
        self,
        p: Array,
        g: Array,
        m: Maybe,
        lr: float,
        momentum: float,
        nesterov: bool,
        decay: float,
        scale: float,
    ) -> None:
        count = p.size
        p, g = self._updated(p, count), self._sized(g, count)
        if m is None:
            self.run["sgd_plain"](at(p), at(g), count, lr, decay, scale)
        else:
            self.run["sgd"](at(p), at(g), at(self._updated(m, count)), count, lr, momentum, nesterov, decay, scale)

    def adam(
        self,
        p: Array,
        g: Array,
        m: Array,
        v: Array,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        decoupled: bool,
        correction1: float,
        correction2: float,
        scale: float,
    ) -> None:
        count = p.size
        p, g = self._updated(p, count), self._sized(g, count)
        m, v = self._updated(m, count), self._updated(v, count)
        self.run["adam"](
            at(p), at(g), at(m), at(v), count, lr, beta1, beta2, eps, decay, decoupled, correction1, correction2, scale
        )

    def adam_direction(
        self,
        g: Array,
        m: Array,
        v: Array,
        p: Array,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        correction1: float,
        correction2: float,
        scale: float,
        out: Array,
    ) -> Array:
        count = p.size
        p, g = self._sized(p, count), self._sized(g, count)
        m, v, total = self._updated(m, count), self._updated(v, count), self._updated(out, count)
        self.run["adam_direction"](
            at(g), at(m), at(v), at(p), at(total), count, beta1, beta2, eps, decay, correction1, correction2, scale
        )
        return out

    def axpy(self, p: Array, u: Array, a: float) -> None:
        p, u = self._updated(p, p.size), self._sized(u, p.size)
        self.run["axpy"](at(p), at(u), p.size, a)


def _rows(x: Array) -> tuple[int, int]:
    *leading, columns = x.shape
    return math.prod(leading), columns


@functools.lru_cache(maxsize=64)
def _constant(size: int, value: float, dtype: np.dtype[Any]) -> Array:
    """What stands for a bias or weight that is None; only read."""
    return np.full(size, value, dtype)


def _ids(ids: Array, size: int) -> Array:
    check_row(ids, "ids", size)
    return np.asarray(ids, np.int64, order="C")


def _targets(targets: Array, rows: int, columns: int, ignore: int) -> Array:
    targets = np.asarray(targets, np.int64, order="C")
    if targets.size != rows:
        raise ValueError(f"{targets.size} targets for {rows} rows")
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < columns:  # unusual: look at those that count
        check_row(targets[targets != ignore], "targets", columns)
    return targets
