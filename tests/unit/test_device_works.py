"""CuPy arrays in works and messages, on the CuPy and NCCL of `tests/fake_cupy.py`. Mirrors `device_works.py`."""

from typing import Any

import ml_dtypes
import numpy as np

from dtrain.collectives import Communicator, wait_all
from tests.fake_cupy import on_gpus

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_started_ones(layout: str, cupy: Any) -> None:
    """Many works under way, waited for in another order on every rank; inputs are read behind the current stream."""
    size = 3

    def run(comm: Communicator) -> None:
        rank, shift = comm.rank, sum(range(size))
        arrays = [cupy.empty(1000 + step, np.float32) for step in range(6)]
        works = []
        for step, array in enumerate(arrays):
            array[...] = float(rank + step)
            works.append(comm.all_reduce_async(array, out=array if step % 2 else None))
            if step == 3:
                assert cupy.asnumpy(comm.all_reduce(cupy.asarray(np.ones(3))))[0] == size
        for step in ([5, 0, 2, 1, 4, 3], [0, 1, 2, 3, 4, 5], [3, 5, 4, 0, 1, 2])[rank]:
            result = works[step].wait()
            assert np.all(cupy.asnumpy(result) == shift + size * step), step
            assert (result is arrays[step]) == bool(step % 2)
            assert works[step].done() and works[step].wait() is result
        mine = cupy.asarray(np.arange(7.0) + 10 * rank)
        everyone = [np.arange(7.0) + 10 * r for r in range(size)]
        others = [np.array_split(one, size) for one in everyone]
        block = np.array_split(sum(everyone), size)[rank]
        cases = [
            (comm.reduce_scatter_async(mine), block),
            (comm.all_gather_async(mine), np.concatenate(everyone)),
            (comm.broadcast_async(mine, 1), everyone[1]),
            (comm.all_to_all_async(mine), np.concatenate([blocks[rank] for blocks in others])),
            (comm.reduce_async(mine, root=1), sum(everyone) if rank == 1 else np.empty(0)),
            (comm.gather_async(mine, 2), np.concatenate(everyone) if rank == 2 else np.empty(0)),
            (comm.scatter_async(mine if rank == 0 else None), others[0][rank]),
        ]
        for result, (_, expected) in zip(wait_all([work for work, _ in cases]), cases, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(result), expected)

    on_gpus(size, run, layout=layout)


def test_the_current_stream_is_used(layout: str, cupy: Any) -> None:
    """What the stream holds when a collective is called comes before it, what is given to it later comes after."""

    def run(comm: Communicator) -> None:
        mine = cupy.asarray(np.zeros(100))
        with cupy.cuda.Stream():
            mine[...] = 1.0
            result = comm.all_reduce(mine)
            mine[...] = 7.0
            twice = cupy.add(result, result)
            work = comm.all_gather_async(twice)
        gathered = work.wait()  # on another stream than the one it was started from, which nobody has waited for
        with cupy.cuda.Stream():
            assert np.all(cupy.asnumpy(result) == comm.size)
            assert np.all(cupy.asnumpy(gathered) == 2 * comm.size)

    on_gpus(2, run, layout=layout)


def test_messages(layout: str, cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        mine = cupy.asarray(np.full((3, 2), comm.rank, BFLOAT16))
        works = [comm.send_async(mine, right, tag=1), comm.send_async(cupy.add(mine, mine), right, tag=2)]
        late = cupy.empty((2, 3, 2), BFLOAT16)[..., 0]
        assert comm.recv(cupy.asarray(np.zeros((3, 2), BFLOAT16)), left, tag=2) is not None
        got = comm.recv(cupy.empty((3, 2), BFLOAT16), left, tag=1)
        assert np.all(cupy.asnumpy(got) == left)
        wait_all(works)
        assert comm.sendrecv(mine, right, late.reshape((2, 3)) if late.flags.c_contiguous else late, left) is late
        assert np.all(cupy.asnumpy(late) == left)
        if comm.rank == 0:
            comm.send(mine, 1)
        elif comm.rank == 1:
            assert np.all(cupy.asnumpy(comm.recv(cupy.empty((3, 2), BFLOAT16), 0)) == 0)

    on_gpus(3, run, layout=layout)
