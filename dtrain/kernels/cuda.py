"""The CuPy backend: raw CUDA kernels where several passes become one, the reference formulas for the rest.

The reference works on CuPy arrays as it stands (NumPy hands its functions over to them), so only what is worth fusing
is written here, with the source in `cuda_source.py`. Nothing but `_launch` touches CuPy: results are made "like" the
arguments, and so come to lie on the same device.
"""

import functools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels import half, reference
from dtrain.kernels.constants import GELU_CUBIC, GELU_SLOPE
from dtrain.kernels.cuda_source import SOURCE, THREADS
from dtrain.kernels.interface import NAMES, Kernels, Maybe, check_row
from dtrain.kernels.philox import threshold

DEFINES = {"GELU_SLOPE": repr(GELU_SLOPE), "GELU_CUBIC": repr(GELU_CUBIC)}
MAX_BLOCKS = 65535  # more rows or elements than that: the kernels stride over the grid


def layer_norm(x: Array, weight: Maybe, bias: Maybe, eps: float) -> tuple[Array, Array, Array]:
    """As the reference, one block per row."""
    x, (rows, columns) = _plain(x, x), _rows(x)
    w, b = _vector(weight, x, 1), _vector(bias, x, 0)
    y, mean, rstd = np.empty_like(x), *(np.empty_like(x, shape=x.shape[:-1]) for _ in range(2))
    _launch("layer_norm", x.dtype, rows, x, w, b, y, mean, rstd, rows, columns, float(eps))
    return y, mean, rstd


def layer_norm_vjp(g: Array, x: Array, weight: Maybe, mean: Array, rstd: Array) -> tuple[Array, Maybe, Array]:
    """As the reference: dx in one kernel, the sums over rows by CuPy."""
    g, x, (rows, columns) = _plain(g, x), _plain(x, x), _rows(x)
    dx, w = np.empty_like(x), _vector(weight, x, 1)
    _launch("layer_norm_vjp", x.dtype, rows, g, x, w, _plain(mean, x), _plain(rstd, x), dx, rows, columns)
    dweight = None
    if weight is not None:
        dweight = reference.column_sum(g * ((x - mean[..., None]) * rstd[..., None]))
    return dx, dweight, reference.column_sum(g)


def softmax(x: Array) -> Array:
    """As the reference, one block per row."""
    x, (rows, columns) = _plain(x, x), _rows(x)
    y = np.empty_like(x)
    _launch("softmax", x.dtype, rows, x, y, rows, columns)
    return y


def cross_entropy(logits: Array, targets: Array, ignore: int) -> tuple[Array, Array]:
    """As the reference, one block per row."""
    logits, (rows, columns) = _plain(logits, logits), _rows(logits)
    targets = _targets(targets, columns, ignore)
    losses, logsumexp = (np.empty_like(logits, shape=(rows,)) for _ in range(2))
    _launch("cross_entropy", logits.dtype, rows, logits, targets, losses, logsumexp, rows, columns, int(ignore))
    return losses, logsumexp


def cross_entropy_vjp(g: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int) -> Array:
    """As the reference, one block per row."""
    logits, (rows, columns) = _plain(logits, logits), _rows(logits)
    targets, dlogits = _targets(targets, columns, ignore), np.empty_like(logits)
    g, logsumexp = _plain(g, logits), _plain(logsumexp, logits)
    _launch("cross_entropy_vjp", logits.dtype, rows, g, logits, targets, logsumexp, dlogits, rows, columns, int(ignore))
    return dlogits


def gelu(x: Array, bias: Maybe, approximate: bool) -> Array:
    """As the reference."""
    x, y = _plain(x, x), np.empty_like(x, order="C")
    _launch("gelu", x.dtype, _blocks(x.size), x, _vector(bias, x, 0), y, x.size, x.shape[-1], int(approximate))
    return y


def gelu_vjp(g: Array, x: Array, bias: Maybe, approximate: bool) -> tuple[Array, Maybe]:
    """As the reference: dx in one kernel, its sum over rows by CuPy."""
    g, x, dx, b = _plain(g, x), _plain(x, x), np.empty_like(x, order="C"), _vector(bias, x, 0)
    _launch("gelu_vjp", x.dtype, _blocks(x.size), g, x, b, dx, x.size, x.shape[-1], int(approximate))
    return dx, None if bias is None else reference.column_sum(dx)


def dropout(x: Array, p: float, key: int, row_ids: Array) -> Array:
    """As the reference; every element computes the block of four words that it takes one from."""
    x, y, ids = _plain(x, x), np.empty_like(x, order="C"), row_ids.astype(np.int64, copy=False)
    factor = 1 / (1 - p) if p < 1 else 0.0
    words = (key & 0xFFFFFFFF, key >> 32, threshold(p))
    _launch("dropout", x.dtype, _blocks(x.size), x, ids, y, x.size, x.shape[-1], *words, factor)
    return y


def embedding_vjp(g: Array, ids: Array, num_rows: int, out: Maybe = None) -> Array:
    """As the reference: one thread per column adds the rows in their order, so nothing depends on chance."""
    check_row(ids, "ids", num_rows)
    columns = g.shape[-1]
    total = np.zeros_like(g, shape=(num_rows, columns)) if out is None else _updated(out)
    ids = ids.astype(np.int64).reshape(-1)
    _launch("embedding_vjp", total.dtype, _blocks(columns), _plain(g, total), ids, total, ids.size, columns)
    return total


def adam(
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
    """As the reference, in one pass."""
    numbers = [float(number) for number in (lr, beta1, beta2, eps, decay, correction1, correction2, scale)]
    arrays = (_updated(p), _plain(g, p), _updated(m), _updated(v))
    _launch("adam", p.dtype, _blocks(p.size), *arrays, p.size, *numbers[:5], int(decoupled), *numbers[5:])


FUSED: dict[str, Any] = {
    "layer_norm": layer_norm,
    "layer_norm_vjp": layer_norm_vjp,
    "softmax": softmax,
    "cross_entropy": cross_entropy,
    "cross_entropy_vjp": cross_entropy_vjp,
    "gelu": gelu,
    "gelu_vjp": gelu_vjp,
    "dropout": dropout,
    "embedding_vjp": embedding_vjp,
    "adam": adam,
}
KERNELS = cast(Kernels, SimpleNamespace(**{name: FUSED.get(name, getattr(reference, name)) for name in NAMES}))


@functools.cache
def for_dtype(dtype: np.dtype[Any]) -> Kernels:
    """The kernels for CuPy arrays of this dtype."""
    if dtype.name in ("float16", "bfloat16"):
        return half.rounded(KERNELS, dtype)
    if dtype.name in ("float32", "float64"):
        return KERNELS
    raise TypeError(f"no kernels for {dtype.name} arrays: float16, bfloat16, float32 or float64 are needed")


def _launch(name: str, dtype: np.dtype[Any], blocks: int, *arguments: Any) -> None:
    """Run a kernel of the source on the current device; Python's numbers become int64 and float64."""
    if blocks == 0:
        return
    numbers = {int: np.int64, float: np.float64}
    converted = tuple(numbers.get(type(argument), _same)(argument) for argument in arguments)
    _module(dtype.name).get_function(name)((min(blocks, MAX_BLOCKS),), (THREADS,), converted)


def _same(argument: Any) -> Any:
    return argument


@functools.cache
def _module(dtype: str) -> Any:
    import cupy

    defines = {"real": {"float32": "float", "float64": "double"}[dtype], **DEFINES}
    return cupy.RawModule(code=SOURCE, options=tuple(f"-D{name}={value}" for name, value in defines.items()))


def _rows(x: Array) -> tuple[int, int]:
    return int(np.prod(x.shape[:-1], dtype=np.int64)), x.shape[-1]


def _blocks(count: int) -> int:
    return -(-count // THREADS)


def _plain(array: Array, like: Array) -> Array:
    return array.astype(like.dtype, order="C", copy=False)


def _vector(array: Maybe, x: Array, default: float) -> Array:
    return np.full_like(x, default, shape=x.shape[-1:]) if array is None else _plain(array, x)


def _updated(array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array to be updated must be contiguous; its strides are {array.strides}")
    return array


def _targets(targets: Array, columns: int, ignore: int) -> Array:
    check_row(targets[targets != ignore], "targets", columns)
    return targets.astype(np.int64, copy=False)
