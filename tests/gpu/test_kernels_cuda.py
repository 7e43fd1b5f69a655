"""Every kernel of the CuPy backend against the reference on NumPy."""

from typing import Any

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")
if not cupy.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from dtrain import kernels  # noqa: E402 - after the skips
from dtrain.kernels import reference  # noqa: E402


def to(function: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to(function, part) for part in value)
    return function(value) if isinstance(value, np.ndarray | cupy.ndarray) else value


def compare(name: str, *args: Any, updated: tuple[int, ...] = ()) -> None:
    device = [to(cupy.asarray, arg) for arg in args]
    host = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
    dtype = next(arg.dtype for arg in args if isinstance(arg, np.ndarray))
    got = getattr(kernels.of(cupy.zeros(1, dtype)), name)(*device)
    want = getattr(reference, name)(*host)
    pairs = list(zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True))
    pairs += [(device[i], host[i]) for i in updated]
    tolerance = 256 * float(np.finfo(dtype).eps)
    for one, other in pairs:
        if other is None:
            assert one is None
        else:
            np.testing.assert_allclose(to(cupy.asnumpy, one), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 2), (7, 33), (2, 3, 1000), (70000, 3), (0, 4)])
def test_rows_and_elements(dtype: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, g, up = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    w, b = rng.standard_normal((2, shape[-1])).astype(dtype)
    for weight, bias in ((w, b), (None, None)):
        compare("layer_norm", x, weight, bias, 1e-3)
        _, mean, rstd = reference.layer_norm(x, weight, bias, 1e-3)
        if shape[0] < 70000:  # sums over so many rows differ by more than the tolerance
            compare("layer_norm_vjp", g, x, weight, mean, rstd)
            compare("rms_norm_vjp", g, x, weight, reference.rms_norm(x, weight, 1e-3)[1])
            for approximate in (False, True):
                compare("gelu_vjp", g, x, bias, approximate)
        compare("rms_norm", x, weight, 1e-3)
        compare("bias_residual", x, bias, g)
        for approximate in (False, True):
            compare("gelu", x, bias, approximate)
    for name in ("silu", "softmax", "log_softmax"):
        compare(name, x)
    compare("silu_vjp", g, x)
    compare("swiglu", x, up)
    compare("swiglu_vjp", g, x, up)
    compare("softmax_vjp", g, reference.softmax(x))
    compare("log_softmax_vjp", g, reference.log_softmax(x))
    compare("dropout", x, 0.3, 0xFEDCBA9876543210, np.arange(x[..., 0].size) + 2**40)
    compare("sum_squares", x)
    logits = x.reshape(-1, shape[-1])
    targets = np.arange(len(logits)) % shape[-1]
    targets[::2] = -5
    compare("cross_entropy", logits, targets, -5)
    logsumexp = reference.cross_entropy(logits, targets, -5)[1]
    compare("cross_entropy_vjp", logits[:, 0].copy(), logits, targets, logsumexp, -5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_rotary(dtype: Any, causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal((2, 2, 5, 4, 8)).astype(dtype)
    k, v = rng.standard_normal((2, 2, 7, 2, 8)).astype(dtype)
    compare("attention", q, k, v, causal, 0.3)
    compare("attention_vjp", g, q, k, v, *reference.attention(q, k, v, causal, 0.3), causal, 0.3)
    compare("rotary", q, *rng.standard_normal((2, 5, 4)).astype(dtype), causal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embedding_and_optimizers(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (3, 40))
    compare("embedding", rng.standard_normal((5, 300)).astype(dtype), ids)
    compare("embedding_vjp", rng.standard_normal((3, 40, 300)).astype(dtype), ids, 5)
    p, g, m, v = np.abs(rng.standard_normal((4, 1000))).astype(dtype)
    for flag in (False, True):
        compare("adam", p, g, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, flag, 0.1, 0.01, 0.5, updated=(0, 2, 3))
        compare("sgd", p, g, m, 0.1, 0.9, flag, 0.01, 0.5, updated=(0, 2))
    compare("adam_direction", g, m, v, p, 0.9, 0.99, 1e-8, 0.01, 0.1, 0.01, 0.5, np.zeros_like(p), updated=(1, 2, 11))
    compare("axpy", p, g, 0.3, updated=(0,))
