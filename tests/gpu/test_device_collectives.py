"""CuPy arrays in the collectives on real GPUs: `mpirun -n P python -m pytest tests/gpu/test_device_collectives.py`.

With as many GPUs as ranks NCCL does it; with fewer, several ranks share one and everything goes through host memory.
`tests/unit/test_device_collectives.py` tries more cases on a CuPy and NCCL made of NumPy.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")
if not cupy.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from dtrain.collectives import Communicator, run_threads, wait_all, world  # noqa: E402 - after the skips
from dtrain.collectives.schedules import catalogue  # noqa: E402
from tests.oracle import bits, close, inputs, total  # noqa: E402

DTYPES = [np.dtype(word) for word in ("f4", "f8", "f2", "i2", "u8", "?", "c8")]


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    comm = world()
    cupy.cuda.Device(comm.local_rank % cupy.cuda.runtime.getDeviceCount()).use()
    yield comm


def check(comm: Communicator) -> None:
    """Every collective, blocking and started, against NumPy."""
    rank, size = comm.rank, comm.size
    for dtype in DTYPES:
        for count in (0, 1, size - 1, size, size + 1, 100_003):
            arrays = inputs(size, count, dtype)
            mine, whole = cupy.asarray(arrays[rank]), np.concatenate(arrays)
            tolerance = 2e-2 if dtype == np.float16 else 1e-5
            for op in ("sum", "max") if dtype.kind != "c" else ("sum", "prod"):
                expected = total(arrays, op)
                for result in (comm.all_reduce(mine, op), comm.all_reduce_async(mine, op).wait()):
                    assert isinstance(result, cupy.ndarray) and result.dtype == dtype
                    np.testing.assert_allclose(result.get(), expected, rtol=tolerance, atol=tolerance)
                block = np.array_split(expected, size)[rank]
                np.testing.assert_allclose(comm.reduce_scatter(mine, op).get(), block, rtol=tolerance, atol=tolerance)
            np.testing.assert_array_equal(mine.get(), arrays[rank], "the input was changed")
            copy = mine.copy()
            assert comm.all_reduce(copy, out=copy) is copy
            assert len(set(comm.all_gather_object(zlib.crc32(copy.get().tobytes())))) == 1, "the ranks' bits differ"
            root = count % size
            at_root = comm.reduce(mine, root=root)
            assert (at_root is None) == (rank != root)
            assert bits(comm.all_gather(mine).get()) == bits(comm.all_gather_async(mine).wait().get()) == bits(whole)
            assert bits(comm.broadcast(mine, root).get()) == bits(arrays[root])
            gathered = comm.gather(mine, root)
            assert gathered is None or bits(gathered.get()) == bits(whole)
            part = comm.scatter(mine if rank == root else None, root)
            assert bits(part.get()) == bits(np.array_split(arrays[root], size)[rank])
            came = np.concatenate([np.array_split(array, size)[rank] for array in arrays])
            assert bits(comm.all_to_all(mine).get()) == bits(came)


def test_every_collective(comm: Communicator) -> None:
    check(comm)


def test_which_way(comm: Communicator) -> None:
    comm.all_reduce(cupy.ones(10, "f4"))
    gpus = cupy.cuda.runtime.getDeviceCount()
    if comm.size > 1 and comm.local_size == comm.size:
        assert (comm.gpu.hindrance is None) == (gpus >= comm.size)
    if comm.size > 1 and comm.gpu.hindrance is None:
        assert comm.last is not None and comm.last.algorithm == "nccl"


def test_schedules_over_nccl(comm: Communicator) -> None:
    if comm.size == 1 or comm.gpu.hindrance is not None:
        pytest.skip("needs a GPU for every one of at least two ranks")
    arrays = inputs(comm.size, 10_007, np.dtype("f8"))
    for name, row in catalogue.ALGORITHMS["all_reduce"].items():
        if row.sizes(comm.size):
            close(comm.all_reduce(cupy.asarray(arrays[comm.rank]), algorithm=name).get(), total(arrays))


def test_streams(comm: Communicator) -> None:
    """Long work before and after on a stream of its own: started collectives read what it leaves there."""
    for _ in range(20):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            array = cupy.zeros(1 << 20, "f4")
            for _ in range(50):
                array += 1
            works = [comm.all_reduce_async(array), comm.all_gather_async(array[:10])]
            total_, rows = wait_all(works)
            array[...] = -1
            assert bool((total_ == 50 * comm.size).all()) and bool((rows == 50).all())
            stream.synchronize()


def test_messages(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    out = cupy.empty(1000, "f2")
    comm.sendrecv(cupy.full(1000, comm.rank, "f2"), right, out, left)
    assert bool((out == left).all())


def test_several_ranks_on_one_gpu() -> None:
    """Threads as ranks, all on the current GPU: everything is staged."""

    def run(comm: Communicator) -> Any:
        check(comm)
        return comm.gpu.hindrance

    assert all("share GPU" in text for text in run_threads(3, run))
