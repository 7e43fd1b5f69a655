"""The CUDA source without a GPU: compiled as C++, run as a grid of one block of one thread, against the reference.

This checks formulas, arguments and wrappers; what needs a GPU (sums over threads, CuPy itself) is in
tests/gpu/test_kernels_cuda.py.
"""

import ctypes
import inspect
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.arrays import Array
from dtrain.kernels import NAMES, cuda, reference

PRELUDE = """
#include <cmath>
#include <initializer_list>
using namespace std;
#define __global__
#define __device__ static
#define __shared__ static
struct Index { int x; };
static const Index blockIdx = {0}, threadIdx = {0}, blockDim = {1}, gridDim = {1};
static void __syncthreads() {}
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder: Path = tmp_path_factory.mktemp("cuda")
    (folder / "kernels.cpp").write_text(PRELUDE + cuda.SOURCE)
    found = {}
    for dtype, real in (("float32", "float"), ("float64", "double")):
        target = folder / f"{real}.so"
        defines = [f"-D{name}={value}" for name, value in {"real": real, **cuda.DEFINES}.items()]
        command = [compiler, "-O1", "-shared", "-fPIC", *defines, "-o", str(target), str(folder / "kernels.cpp")]
        subprocess.run(command, check=True, timeout=100)
        found[dtype] = ctypes.CDLL(str(target))
    return found


@pytest.fixture(autouse=True)
def on_the_cpu(libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(name: str, dtype: np.dtype[Any], blocks: int, *arguments: Any) -> None:
        converted = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous and argument.dtype in (dtype, np.int64)
                converted.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                converted.append({int: ctypes.c_int64, float: ctypes.c_double}[type(argument)](argument))
        if blocks:
            getattr(libraries[dtype.name], name)(*converted)

    monkeypatch.setattr(cuda, "_launch", launch)


def normal(dtype: Any, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def compare(name: str, dtype: Any, *args: Any) -> None:
    want, got = getattr(reference, name)(*args), cuda.FUSED[name](*args)
    tolerance = 64 * float(np.finfo(dtype).eps)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        if other is None:
            assert one is None
        else:
            assert one.dtype == other.dtype and one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_offers_the_whole_table() -> None:
    assert set(vars(cuda.KERNELS)) == set(NAMES)
    for name, kernel in cuda.FUSED.items():
        assert inspect.signature(kernel) == inspect.signature(getattr(reference, name)), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 2), (3, 33), (2, 3, 8), (0, 4)])
def test_kernels(dtype: Any, shape: tuple[int, ...]) -> None:
    x, g, w, b = normal(dtype, *shape), normal(dtype, *shape, seed=1), *normal(dtype, 2, shape[-1])
    for weight, bias in ((w, b), (None, None)):
        compare("layer_norm", dtype, x, weight, bias, 1e-3)
        _, mean, rstd = reference.layer_norm(x, weight, bias, 1e-3)
        compare("layer_norm_vjp", dtype, g, x, weight, mean, rstd)
        for approximate in (False, True):
            compare("gelu", dtype, x, bias, approximate)
            compare("gelu_vjp", dtype, g, x, bias, approximate)
    compare("softmax", dtype, 10 * x)
    ids = np.arange(x[..., 0].size) + 2**40
    for p in (0.0, 0.3, 1.0):
        compare("dropout", dtype, x, p, 0xFEDCBA9876543210, ids)
    logits = x.reshape(-1, shape[-1])
    targets = np.arange(len(logits)) % shape[-1]
    targets[::2] = -5
    compare("cross_entropy", dtype, logits, targets, -5)
    logsumexp = reference.cross_entropy(logits, targets, -5)[1]
    compare("cross_entropy_vjp", dtype, normal(dtype, len(logits)), logits, targets, logsumexp, -5)
    compare("embedding_vjp", dtype, logits, np.arange(len(logits)) % 2, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(dtype: Any, decoupled: bool) -> None:
    runs = []
    for kernel in (cuda.adam, reference.adam):
        p, g, m, v = np.abs(normal(dtype, 4, 50))
        kernel(p, g, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, decoupled, 0.1, 0.01, 0.5)
        runs.append(np.stack((p, m, v)))
    np.testing.assert_allclose(*runs, rtol=32 * float(np.finfo(dtype).eps))


def test_half_precision_goes_through_float32() -> None:
    x = normal(np.float16, 3, 5)
    want = reference.softmax(x.astype(np.float32)).astype(np.float16)
    np.testing.assert_allclose(cuda.for_dtype(x.dtype).softmax(x), want, rtol=1e-3)
    with pytest.raises(TypeError, match="int32"):
        cuda.for_dtype(np.dtype(np.int32))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_nvcc_accepts_the_source(tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text(cuda.SOURCE)
    defines = [f"-D{name}={value}" for name, value in {"real": "float", **cuda.DEFINES}.items()]
    command = ["nvcc", "-ptx", *defines, "-o", str(tmp_path / "kernels.ptx"), str(tmp_path / "kernels.cu")]
    subprocess.run(command, check=True, timeout=100)
