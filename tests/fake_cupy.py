"""A `cupy` with NCCL made of NumPy and threads: what dtrain uses of both, as strict as the real ones and stricter.

    rank (thread) ── use(gpu) ──►  arrays in the memory of that GPU, streams, events
                                   NCCL: every call is compared with those of the other ranks, then done

The first in `fake_cuda.py`, the second in `fake_nccl.py`; here they become modules that can be imported.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from tests import fake_cuda, fake_nccl


def _modules() -> dict[str, ModuleType]:
    root, cuda, nccl = ModuleType("cupy"), ModuleType("cupy.cuda"), ModuleType("cupy.cuda.nccl")
    for name in ("ndarray", "empty", "asarray", "asnumpy", "ascontiguousarray"):
        setattr(root, name, getattr(fake_cuda, name))
    for name, function in {"add": 0, "multiply": 1, "maximum": 2, "minimum": 3}.items():
        setattr(root, name, fake_cuda.ufunc(fake_cuda.OPS[function]))
    for name in ("Stream", "Event", "Device", "get_current_stream", "alloc_pinned_memory"):
        setattr(cuda, name, getattr(fake_cuda, name))
    for name in ("NcclCommunicator", "NcclError", "get_unique_id", "get_version", "groupStart", "groupEnd"):
        setattr(nccl, name, getattr(fake_nccl, name))
    names = ["INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64"]
    for code, name in enumerate(names):
        setattr(nccl, f"NCCL_{name}", code)
    for code, name in enumerate(["SUM", "PROD", "MAX", "MIN"]):
        setattr(nccl, f"NCCL_{name}", code)
    cuda.is_available = lambda: True  # type: ignore[attr-defined]
    cuda.runtime = ModuleType("cupy.cuda.runtime")  # type: ignore[attr-defined]
    cuda.runtime.getDeviceCount = lambda: 2
    cuda.runtime.getDeviceProperties = lambda number: {"name": b"Fake GPU", "totalGlobalMem": 80 << 30}
    nccl.available = True  # type: ignore[attr-defined]
    root.__version__ = "13.0-fake"  # type: ignore[attr-defined]
    root.cuda, cuda.nccl = cuda, nccl  # type: ignore[attr-defined]
    return {"cupy": root, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl}


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`import cupy` gives this module; afterwards as before."""
    import dtrain.collectives

    ours = "dtrain.collectives.nccl"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, ours, raising=False)
        patch.delattr(dtrain.collectives, "nccl", raising=False)
        yield sys.modules["cupy"]
        sys.modules.pop(ours, None)
        vars(dtrain.collectives).pop("nccl", None)


def on_gpus(size: int, function: Callable[..., Any], *args: Any, layout: str = "nccl") -> list[Any]:
    """`function(comm, *args)` on ranks that have a GPU each, or one for all ("staged")."""
    from dtrain.collectives import Communicator, run_threads

    def run(comm: Communicator) -> Any:
        fake_cuda.use(comm.rank if layout == "nccl" else 0)
        result = function(comm, *args)
        comm.close()
        return result

    return run_threads(size, run)
