"""Ranks start the same operations in the same order and wait wherever they like: nobody hangs, all is right."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, Work

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("algorithm", ["staged", "native", "message"])
def test_a_rank_that_waits_elsewhere_still_computes_its_slice(comm: Communicator, algorithm: str) -> None:
    """Rank 0 is inside another operation when the last rank, which came late to both, waits for the first."""
    if comm.size == 1:
        return
    array = comm.empty(1000)
    array[...] = 1
    other = np.ones(200, np.float32)
    late = comm.rank == comm.size - 1
    comm.barrier()
    if late:
        time.sleep(0.02)
    work = comm.all_reduce_async(array, out=array)
    if late:
        work.wait()
    if algorithm != "message":
        assert np.all(comm.all_reduce(other, algorithm=algorithm) == comm.size)
    elif late:
        comm.send(other, 0)
    elif comm.rank == 0:
        assert np.all(comm.recv(np.zeros(200, np.float32), comm.size - 1) == 1)
    assert np.all(work.wait() == comm.size)


@pytest.fixture(params=[False, True], ids=["waits", "thread"])
def thread(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Who moves started works on: the waits alone, or the thread of `background.py` too."""
    comm.use_progress_thread(request.param)
    yield request.param
    comm.use_progress_thread(False)


@pytest.mark.parametrize("seed", range(4))
def test_waits_in_any_order_and_place(comm: Communicator, seed: int, thread: bool) -> None:
    """Works in the window and in the MPI library, on two communicators, between blocking collectives of all kinds."""
    part = comm.split(0, key=-comm.rank)
    assert part is not None
    common = np.random.default_rng(seed)  # what is done: the same on all ranks
    mine = np.random.default_rng([seed, comm.rank])  # when it is waited for: differs
    total = comm.size * (comm.size + 1) // 2
    buffers = {id(group): group.empty((40, 5000)) for group in (comm, part)}
    open_works: list[tuple[Work, int]] = []
    slots = {id(group): 0 for group in (comm, part)}
    for turn in range(60):
        group = (comm, part)[common.integers(2)]
        kind = common.integers(5)
        if kind <= 1:
            array = buffers[id(group)][slots[id(group)] % 40][: common.integers(1, 5000)]
            slots[id(group)] += 1
            if kind == 1:
                array = np.empty_like(array)
            array[...] = (comm.rank + 1) * turn
            open_works.append((group.all_reduce_async(array, out=array), turn))
        elif kind == 2:
            assert np.all(group.all_reduce(np.full(3, comm.rank + 1)) == total)
        elif kind == 3:
            assert np.all(group.all_reduce(np.full(30_000, comm.rank + 1), algorithm="staged") == total)
        elif comm.size > 1:
            assert np.all(group.all_reduce(np.full(30_000, comm.rank + 1), algorithm="native") == total)
        if mine.random() < 0.1:
            time.sleep(mine.random() * 2e-3)
        while open_works and mine.random() < 0.4:
            work, then = open_works.pop(mine.integers(len(open_works)))
            assert np.all(work.wait() == total * then)
    for work, then in open_works:
        assert np.all(work.wait() == total * then)
    buffers.clear()
    part.close()


@pytest.mark.parametrize("place", ["window", "private"])
def test_the_thread_computes_while_its_rank_does_other_things(comm: Communicator, place: str) -> None:
    """All ranks see a work finished by asking the flags alone: nobody tests, starts or waits."""
    if comm.size == 1 or comm.node is None:
        return
    comm.use_progress_thread(True)
    array = comm.empty(50_000) if place == "window" else np.empty(50_000, np.float32)
    array[...] = comm.rank
    comm.barrier()
    work = comm.all_reduce_async(array, out=array)
    end = time.monotonic() + 60
    while comm._progress.busy() and time.monotonic() < end:
        time.sleep(1e-3)
    assert not comm._progress.busy(), "the thread did not finish the work"
    comm.use_progress_thread(False)
    assert np.all(work.wait() == sum(range(comm.size)))


def test_a_fault_in_the_thread_is_raised_in_the_wait(comm: Communicator) -> None:
    if comm.size == 1:
        return
    part = comm.split(0)
    assert part is not None
    array = part.empty(1000)
    shared = part._progress
    shared.failure = ZeroDivisionError("unlucky")
    try:
        with pytest.raises(ZeroDivisionError, match="unlucky"):
            shared.check()
    finally:
        shared.failure = None
    array[...] = 1
    assert np.all(part.all_reduce_async(array, out=array).wait() == comm.size)
    del array
    part.close()
