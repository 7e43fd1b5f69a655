"""Every fused kernel gives what the reference gives: both dtypes, odd shapes, extreme values, strided inputs."""

import inspect
from typing import Any

import numpy as np
import pytest

from dtrain.arrays import Array
from dtrain.kernels import NAMES, backends, interface, reference

DTYPES = [np.float32, np.float64]
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 8), (7, 33), (2, 3, 100), (64, 259), (0, 5)]
WEIGHTED = {"layer_norm", "rms_norm"}


def fused(dtype: Any) -> Any:
    kernels = backends._fused(np.dtype(dtype).itemsize * 8)
    if kernels is None:
        pytest.skip("no compiled kernels here (Numba is missing or DTRAIN_KERNELS=reference)")
    return kernels


def normal(dtype: Any, *shape: int, seed: int = 0, scale: float = 1) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(dtype)


def assert_same(got: Any, want: Any, dtype: Any, factor: float = 1) -> None:
    """Equal up to rounding: relative to the value, and to the terms (1, or the largest) where they cancel."""
    if want is None:
        assert got is None
        return
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other, dtype, factor)
        return
    assert got.shape == want.shape and got.dtype == want.dtype == dtype
    eps = np.finfo(dtype).eps * factor
    largest = np.abs(want[np.isfinite(want)]).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=32 * eps, atol=16 * eps * (largest if largest < 1e3 else 1.0))


def compare(name: str, dtype: Any, *args: Any, factor: float = 1, **kwargs: Any) -> None:
    with np.errstate(all="ignore"):
        want = getattr(reference, name)(*args, **kwargs)
    assert_same(getattr(fused(dtype), name)(*args, **kwargs), want, dtype, factor)


def test_offers_the_whole_table() -> None:
    for name in NAMES:
        want = inspect.signature(getattr(interface.Kernels, name))
        got = inspect.signature(getattr(type(fused(np.float32)), name))
        assert list(got.parameters.items()) == list(want.parameters.items()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestRows:
    def test_norms(self, dtype: Any, shape: tuple[int, ...]) -> None:
        x, g, w, b = normal(dtype, *shape), normal(dtype, *shape, seed=1), *normal(dtype, 2, shape[-1])
        x += 3
        factor = 4 * shape[-1] if shape[-1] < 3 else 16  # one column: the variance is all cancellation
        for weight, bias in ((w, b), (None, None), (w, None)):
            compare("layer_norm", dtype, x, weight, bias, 1e-5, factor=factor)
            _, mean, rstd = reference.layer_norm(x, weight, bias, 1e-5)
            compare("layer_norm_vjp", dtype, g, x, weight, mean, rstd, factor=16 * max(1.0, float(rstd.max(initial=0))))
            compare("rms_norm", dtype, x, weight, 1e-5)
            compare("rms_norm_vjp", dtype, g, x, weight, reference.rms_norm(x, weight, 1e-5)[1], factor=16)

    def test_softmax(self, dtype: Any, shape: tuple[int, ...]) -> None:
        x, g = normal(dtype, *shape, scale=4), normal(dtype, *shape, seed=1)
        for name in ("softmax", "log_softmax"):
            compare(name, dtype, x, factor=4)
            compare(f"{name}_vjp", dtype, g, getattr(reference, name)(x), factor=16)

    def test_elementwise(self, dtype: Any, shape: tuple[int, ...]) -> None:
        x, g, up, b = *(normal(dtype, *shape, seed=i, scale=3) for i in range(3)), normal(dtype, shape[-1])
        compare("column_sum", dtype, x, factor=8)
        for bias in (b, None):
            compare("bias_residual", dtype, x, bias, g)
            for approximate in (False, True):
                compare("gelu", dtype, x, bias, approximate)
                compare("gelu_vjp", dtype, g, x, bias, approximate, factor=8)
        compare("silu", dtype, x)
        compare("silu_vjp", dtype, g, x)
        compare("swiglu", dtype, x, up)
        compare("swiglu_vjp", dtype, g, x, up)

    def test_dropout_keeps_the_same_elements(self, dtype: Any, shape: tuple[int, ...]) -> None:
        x = normal(dtype, *shape) + 9
        ids = np.arange(x[..., 0].size, dtype=np.int64) + 2**40
        for p in (0.0, 0.3, 1.0):
            compare("dropout", dtype, x, p, 0xFEDCBA9876543210, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (33, 100), (0, 4), (3, 1000)])
def test_cross_entropy(dtype: Any, rows: int, columns: int) -> None:
    logits, g = normal(dtype, rows, columns, scale=3), normal(dtype, rows)
    targets = np.random.default_rng(1).integers(0, columns, rows)
    targets[::3] = -100
    compare("cross_entropy", dtype, logits, targets, -100, factor=2)
    logsumexp = reference.cross_entropy(logits, targets, -100)[1]
    compare("cross_entropy_vjp", dtype, g, logits, targets, logsumexp, -100, factor=4)
    compare("cross_entropy", dtype, logits, targets.astype(np.int32), -100, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_and_ids_out_of_range_are_refused(dtype: Any) -> None:
    """The compiled code would read beyond the array."""
    for kernels in (fused(dtype), reference):
        for wrong in (-1, 4):
            with pytest.raises(IndexError, match=str(wrong)):
                kernels.cross_entropy(normal(dtype, 2, 4), np.array([0, wrong]), -100)
            with pytest.raises(IndexError, match=str(wrong)):
                kernels.embedding(normal(dtype, 4, 3), np.array([wrong, 1]))
            with pytest.raises(IndexError, match=str(wrong)):
                kernels.embedding_vjp(normal(dtype, 2, 3), np.array([wrong, 1]), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_shapes_and_unfit_updates_are_refused(dtype: Any) -> None:
    kernels, x = fused(dtype), normal(dtype, 4, 6)
    for call in (
        lambda: kernels.layer_norm(x, x[0, :5], None, 1e-5),
        lambda: kernels.softmax_vjp(x[:3], x),
        lambda: kernels.sgd(x.ravel(), x.ravel()[:5], None, 0.1, 0.0, False, 0.0, 1.0),
        lambda: kernels.axpy(x[:, ::2], x[:, ::2], 1.0),
        lambda: kernels.axpy(x.astype(np.float16), x, 1.0),
        lambda: kernels.dropout(x, 0.5, 1, np.arange(3)),
    ):
        with pytest.raises(ValueError):
            call()


EXTREME = [0.0, -0.0, 1e-40, -1e-40, 1e4, -1e4, 88.0, -88.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 1.0, -103.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_survive_as_in_the_reference(dtype: Any) -> None:
    one_by_one = np.array(EXTREME, dtype)[:, None] * np.ones((1, 17), dtype)
    g = np.ones_like(one_by_one)
    for approximate in (False, True):
        compare("gelu", dtype, one_by_one, None, approximate)
    moderate = one_by_one[np.abs(one_by_one[:, 0]) <= 1e4]
    for approximate in (False, True):
        compare("gelu_vjp", dtype, g[: len(moderate)], moderate, None, approximate)
    compare("silu", dtype, one_by_one)
    compare("silu_vjp", dtype, g[: len(moderate)], moderate)
    compare("softmax", dtype, one_by_one)
    compare("log_softmax", dtype, one_by_one, factor=4)
    masked = np.array([[0, -np.inf, 1, -np.inf, 2], [1e4, -1e4, 0, 1e4, -np.inf], [-np.inf] * 4 + [3]], dtype)
    compare("softmax", dtype, masked)
    compare("cross_entropy", dtype, masked, np.array([0, 3, 4]), -100)
    logsumexp = reference.cross_entropy(masked, np.array([0, 3, 4]), -100)[1]
    compare("cross_entropy_vjp", dtype, np.ones(3, dtype), masked, np.array([0, 3, 4]), logsumexp, -100)
    assert fused(dtype).softmax(masked)[0, 1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_optimizers(dtype: Any, count: int) -> None:
    p, g, m = normal(dtype, 3, count)
    v = np.abs(normal(dtype, count, seed=2))

    def both(name: str, positions: tuple[int, ...], *args: Any) -> None:
        """Run on copies of the arrays; the arrays at these positions must end up the same."""
        runs = []
        for kernels in (fused(dtype), reference):
            copies = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
            getattr(kernels, name)(*copies)
            runs.append(copies)
        for got, want in zip(*runs, strict=True):
            if isinstance(got, np.ndarray):
                assert_same(got, want, dtype)
        for i, before in enumerate(args):
            if isinstance(before, np.ndarray) and count:
                assert (i in positions) != np.array_equal(runs[0][i], before), (name, i)

    for nesterov in (False, True):
        both("sgd", (0, 2), p, g, m, 0.1, 0.9, nesterov, 0.01, 0.5)
    both("sgd", (0,), p, g, None, 0.1, 0.9, False, 0.01, 0.5)
    for decoupled in (False, True):
        both("adam", (0, 2, 3), p, g, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, decoupled, 0.1, 0.01, 0.5)
    both("adam_direction", (1, 2, 11), g, m, v, p, 0.9, 0.99, 1e-8, 0.01, 0.1, 0.01, 0.5, np.zeros_like(p))
    both("axpy", (0,), p, g, 0.3)
    assert fused(dtype).sum_squares(p) == pytest.approx(reference.sum_squares(p), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,)])
def test_embedding(dtype: Any, shape: tuple[int, ...]) -> None:
    ids = np.random.default_rng(0).integers(0, 5, shape)
    compare("embedding", dtype, normal(dtype, 5, 3), ids)
    g = normal(dtype, *shape, 3)
    compare("embedding_vjp", dtype, g, ids, 5)
    totals = [np.ones((5, 3), dtype), np.ones((5, 3), dtype)]
    assert fused(dtype).embedding_vjp(g, ids, 5, totals[0]) is totals[0]
    reference.embedding_vjp(g, ids, 5, totals[1])
    assert_same(totals[0], totals[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_may_be_strided_or_of_another_dtype(dtype: Any) -> None:
    wide = normal(dtype, 6, 20)
    assert_same(fused(dtype).softmax(wide[::2, 1::3]), reference.softmax(wide[::2, 1::3]), dtype)
    whole = normal(np.float32, 8)
    p = whole.astype(dtype)
    fused(dtype).axpy(p, whole[::-1].astype(np.float16), 1.0)
    assert_same(p, whole.astype(dtype) + whole[::-1].astype(np.float16).astype(dtype), dtype)
    read_only = normal(dtype, 3, 4)
    read_only.flags.writeable = False
    fused(dtype).softmax(read_only)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_every_time(dtype: Any) -> None:
    x, g = normal(dtype, 37, 65), normal(dtype, 37, 65, seed=1)
    first = fused(dtype).gelu_vjp(g, x, x[0], True)
    for _ in range(5):
        for one, other in zip(first, fused(dtype).gelu_vjp(g, x, x[0], True), strict=True):
            assert one.tobytes() == other.tobytes()


ATTENTION = [  # batch, length, keys, heads, groups, depth
    (2, 5, 5, 2, 2, 4),
    (1, 1, 1, 1, 1, 1),
    (2, 33, 33, 4, 2, 8),
    (1, 7, 12, 6, 1, 3),
    (2, 12, 7, 2, 2, 4),
    (1, 100, 130, 2, 1, 16),
    (0, 3, 3, 2, 2, 4),
    (2, 0, 3, 2, 2, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", ATTENTION)
@pytest.mark.parametrize("block_bytes", [1, 1 << 19])
def test_attention(monkeypatch: Any, dtype: Any, causal: bool, sizes: tuple[int, ...], block_bytes: int) -> None:
    from dtrain.kernels import fused_attention

    monkeypatch.setattr(fused_attention, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(fused_attention, "MIN_ROWS", 4)
    batch, length, keys, heads, groups, depth = sizes
    packed = normal(dtype, batch, length, heads, 3 * depth, scale=2)
    q, k, v = packed[..., :depth], *normal(dtype, 2, batch, keys, groups, depth)
    g = normal(dtype, batch, length, heads, depth, seed=5)
    scale = depth**-0.5
    compare("attention", dtype, q, k, v, causal, scale, factor=8)
    out, logsumexp = reference.attention(q, k, v, causal, scale)
    compare("attention_vjp", dtype, g, q, k, v, out, logsumexp, causal, scale, factor=32)
    results = np.full((3, batch, max(length, keys), heads, 2 * depth), 7, dtype)
    dq, dk, dv = (
        results[i, :, :size, :count, :depth] for i, (size, count) in enumerate([(length, heads), *[(keys, groups)] * 2])
    )
    given = fused(dtype).attention_vjp(g, q, k, v, out, logsumexp, causal, scale, dq, dk, dv)
    assert all(a is b for a, b in zip(given, (dq, dk, dv), strict=True))
    want = reference.attention_vjp(g, q, k, v, out, logsumexp, causal, scale)
    assert_same(tuple(np.ascontiguousarray(x) for x in given), want, dtype, 32)
    assert (results[..., depth:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary(dtype: Any, inverse: bool) -> None:
    packed = normal(dtype, 2, 5, 3, 3, 8)
    angles = np.arange(5)[:, None] * np.array([1, 0.5, 0.1, 0.01])
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    for x in (packed[:, :, 1], packed[:, :, :, 2], packed[:, ::-1, 0], packed[..., 0, ::1], packed[:0, :, 0]):
        compare("rotary", dtype, x, cos, sin, inverse)
