"""Which kernels an array gets, half precision, and memory."""

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain import kernels
from dtrain.kernels import backends, half, interface, memory, reference

HALF = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def test_the_same_kernels_for_every_array_of_a_dtype() -> None:
    x = np.zeros(3, np.float32)
    assert kernels.of(x) is kernels.of(x[::2]) is backends.for_dtype(x.dtype)
    assert kernels.of(x) is not kernels.of(x.astype(np.float64))
    assert kernels.of(x.view(np.memmap)) is kernels.of(x)
    for name in kernels.NAMES:
        assert callable(getattr(kernels.of(x), name))


def test_arrays_without_kernels_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        kernels.of(np.arange(3))
    with pytest.raises(TypeError, match="list"):
        kernels.of([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_float32_rounded(dtype: Any) -> None:
    k, wide = kernels.of(np.zeros(1, dtype)), backends.REFERENCE
    x, w = (np.random.default_rng(0).standard_normal(shape).astype(dtype) for shape in ((5, 8), (8,)))
    y, mean, rstd = k.layer_norm(x, w, None, 1e-5)
    want = wide.layer_norm(x.astype(np.float32), w.astype(np.float32), None, 1e-5)
    assert y.dtype == dtype and mean.dtype == rstd.dtype == np.float32
    np.testing.assert_allclose(y.astype(np.float32), want[0], rtol=float(ml_dtypes.finfo(dtype).eps))
    np.testing.assert_allclose(mean, want[1], rtol=1e-5, atol=1e-7)
    dx, dw, _ = k.layer_norm_vjp(x, x, w, mean, rstd)
    assert dx.dtype == dtype and dw is not None and dw.dtype == dtype
    losses, logsumexp = k.cross_entropy(x, np.array([0, 1, 2, 3, -1]), -1)
    assert losses.dtype == logsumexp.dtype == np.float32
    assert k.softmax(x).dtype == dtype
    assert isinstance(k.sum_squares(w), float)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_updates_in_place(dtype: Any) -> None:
    k = kernels.of(np.zeros(1, dtype))
    p, g, m = (np.full(4, value, dtype) for value in (1.0, 0.5, 0.25))
    k.sgd(p, g, m, 1.0, 1.0, False, 0.0, 1.0)
    assert (m == 0.75).all() and (p == 0.25).all() and (g == 0.5).all()
    out = np.ones((3, 2), dtype)
    assert k.embedding_vjp(np.ones((2, 2), dtype), np.array([1, 1]), 3, out=out) is out
    assert out[:, 0].tolist() == [1, 3, 1]
    master = np.zeros(4, np.float32)  # float32 state, half-precision gradients
    k.axpy(master, g, 2.0)
    assert master.dtype == np.float32 and (master == 1).all()
    qkv = np.ones((1, 2, 3, 1, 4), dtype)
    q, key, v = (qkv[:, :, i] for i in range(3))
    out, logsumexp = k.attention(q, key, v, True, 0.5)
    results = np.zeros_like(qkv)
    dq, dk, dv = given = tuple(results[:, :, i] for i in range(3))
    got = k.attention_vjp(out, q, key, v, out, logsumexp, True, 0.5, dq, dk, dv)
    assert all(a is b for a, b in zip(got, given, strict=True))
    assert results[0, 0, 2, 0, 0] == 1.5  # both queries give the first value weight: 1 + 1/2


def test_tables_name_real_parameters() -> None:
    for name, updated in interface.UPDATES.items():
        assert name in interface.NAMES and hasattr(reference, name)
        parameters = getattr(reference, name).__code__.co_varnames
        assert set(updated) <= set(parameters)
    assert set(interface.STATISTICS) <= set(interface.NAMES)
    assert set(vars(half.rounded(backends.REFERENCE, np.dtype(np.float16)))) == set(interface.NAMES)


def test_large_arrays_come_back_to_the_same_pages() -> None:
    if not memory.KEEPS_PAGES:
        pytest.skip("malloc cannot be told here")
    import resource

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    size = 1 << 24
    for _ in range(3):
        np.empty(size, np.uint8).fill(1)
    before = faults()
    for _ in range(10):
        np.empty(size, np.uint8).fill(1)
    assert faults() - before < size // 4096  # without mallopt: ten times as many


def test_the_user_can_ask_for_the_reference() -> None:
    code = "from dtrain import kernels; import numpy as np; k = kernels.of(np.zeros(1, 'f')); print(kernels.describe())"
    for choice, answer in (("reference", "reference (plain NumPy): DTRAIN_KERNELS=reference"), ("fast", "")):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | {"DTRAIN_KERNELS": choice},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.stdout.strip() == answer
        assert ("DTRAIN_KERNELS=fast: must be one of fused, reference" in run.stderr) == (choice == "fast")
