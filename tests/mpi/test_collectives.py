"""The collectives between processes: `mpirun -n P python -m pytest tests/mpi/test_collectives.py`, any P."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator, rules
from dtrain.collectives.closed import CommunicatorClosed
from dtrain.collectives.waiting import CollectiveMismatch, CollectiveTimeout
from tests import collective_cases
from tests.oracle import DTYPES, bits, close, inputs, lengths, same_everywhere, total

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("name", collective_cases.ALL)
def test_case(comm: Communicator, name: str) -> None:
    collective_cases.ALL[name](comm)


def make(comm: Communicator) -> Callable[[int], Array]:
    return lambda count: comm.empty(count, np.float32)


def test_reuse_in_the_window(comm: Communicator) -> None:
    collective_cases.reuse(comm, make(comm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_reductions(comm: Communicator, dtype: np.dtype[Any]) -> None:
    """In place on whole arrays and on slices, blocking and started, shared, scattered: always the sum in rank order."""
    native = dtype.newbyteorder("=")
    for count in lengths(comm.size, dtype):
        arrays = inputs(comm.size, count + 5, native)
        expected = total(arrays)
        buffer = comm.empty(count + 5, native)
        results = []
        for begin, end in [(0, count + 5), (3, count + 3), (5, count + 5)]:
            buffer[...] = arrays[comm.rank]
            assert comm.all_reduce(buffer[begin:end], out=buffer[begin:end]).base is not None
            assert bits(buffer[begin:end]) == bits(expected[begin:end])  # rank order, whatever the slice
            assert bits(buffer[:begin]) == bits(arrays[comm.rank][:begin]), "wrote outside of the slice"
            assert bits(buffer[end:]) == bits(arrays[comm.rank][end:]), "wrote outside of the slice"
            results.append(buffer.copy())
        same_everywhere(comm, results[0])
        buffer[...] = arrays[comm.rank]
        comm.barrier()
        shared = comm.all_reduce_shared(buffer)
        assert bits(shared) == bits(expected) and bits(buffer) == bits(arrays[comm.rank])
        with pytest.raises(ValueError, match="read-only"):
            shared[...] = 0
        assert bits(comm.all_reduce_shared(arrays[comm.rank])) == bits(expected)
        assert bits(comm.all_reduce(buffer)) == bits(expected) or comm.node is None or dtype.kind in "fc"
        block = np.array_split(expected, comm.size)[comm.rank]
        assert bits(comm.reduce_scatter(buffer)) == bits(block)
        assert bits(comm.reduce_scatter_async(buffer).wait()) == bits(block)
        assert bits(buffer) == bits(arrays[comm.rank])
        start = sum(len(part) for part in np.array_split(expected, comm.size)[: comm.rank])
        mine = buffer[start : start + len(block)]
        assert comm.reduce_scatter(buffer, out=mine) is mine
        assert bits(mine) == bits(block)


def test_window_operations_and_layouts(comm: Communicator) -> None:
    for op in ("sum", "prod", "max", "min"):
        for dtype in ("float32", "float16", "int64", "bool", "complex64"):
            arrays = inputs(comm.size, 300, np.dtype(dtype))
            grid = comm.empty((20, 15), dtype)
            grid[...] = arrays[comm.rank].reshape(20, 15)
            comm.all_reduce(grid, op, out=grid)
            assert bits(grid) == bits(total(arrays, op))
    columns = comm.empty((8, 6), np.float64)  # not contiguous, and another array as out: right, if not zero-copy
    columns[...] = comm.rank
    comm.all_reduce(columns[:, 1:3], out=columns[:, 1:3])
    assert np.all(columns[:, 1:3] == sum(range(comm.size))) and np.all(columns[:, 3:] == comm.rank)
    other = comm.empty((8, 6), np.float64)
    columns[...] = comm.rank
    comm.all_reduce(columns, out=other)
    assert np.all(other == sum(range(comm.size))) and np.all(columns == comm.rank)


def test_window_is_used_and_can_be_asked_for(comm: Communicator) -> None:
    array = comm.empty(1000)
    array[...] = 1
    if comm.node is None:
        assert comm.size == 1 or comm.local_size < comm.size
        return
    assert comm.node.arena.place(array) is not None
    assert comm.node.arena.place(array[3:70]) is not None
    assert comm.node.arena.place(array[3:70].reshape(67, 1).view(np.int32)) is not None
    assert comm.node.arena.place(array[::2]) is None
    assert comm.node.arena.place(array.copy()) is None
    comm.all_reduce(array, out=array, algorithm="window")
    assert np.all(array == comm.size)
    with pytest.raises(ValueError, match=r"algorithm='window'.*possible here: auto, .*staged"):
        comm.all_reduce(np.ones(3), algorithm="window")


def test_many_works_in_flight(comm: Communicator) -> None:
    """More works than may be in flight, on slices of one buffer; every second rank comes late."""
    buffer = comm.empty(600 * 64, ml_dtypes.bfloat16)
    for turn in range(3):
        buffer[...] = comm.rank + turn
        if comm.rank % 2 == turn % 2:
            time.sleep(0.01)
        slices = [buffer[begin : begin + 64] for begin in range(0, len(buffer), 64)]
        works = [comm.all_reduce_async(part, out=part) for part in slices]
        early = comm.all_reduce(np.array([1.0]))  # a blocking one in between
        for work in works[::7]:
            work.wait()
        while not all(work.done() for work in works):
            os.sched_yield()
        assert [work.wait() is part for work, part in zip(works, slices, strict=True)]
        assert early[0] == comm.size
        assert np.all(buffer.astype(int) == sum(range(comm.size)) + comm.size * turn)


def test_pieces(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than one MPI call may be goes in pieces; here with a call of 64 bytes."""
    if comm.size > 4:
        pytest.skip("thousands of messages: a few ranks show as much")
    monkeypatch.setattr(type(comm.transport), "limit", 64, raising=False)
    for limits in ("GATHER", "BROADCAST", "ALL_TO_ALL"):
        monkeypatch.setattr(rules, limits, rules.Staged(-1, -1, -1))
    monkeypatch.setattr(rules, "LONG", -1)
    if comm.node is not None:
        monkeypatch.setattr(comm.node, "reads", False)
    comm.forget()  # what was prepared for other limits
    try:
        _in_pieces(comm)
    finally:
        comm.forget()


def _in_pieces(comm: Communicator) -> None:
    for count in (0, 1, 3, 16, 17, 1000):
        for dtype in (np.dtype("float32"), np.dtype("complex128"), np.dtype("float16")):
            arrays = inputs(comm.size, count, dtype)
            mine, expected = arrays[comm.rank], total(arrays)
            algorithm = "native" if comm.transport.reduces("sum", mine) else "auto"
            close(comm.all_reduce(mine, algorithm=algorithm), expected)
            close(comm.all_reduce_async(mine).wait(), expected)
            close(comm.reduce_scatter(mine, algorithm=algorithm), np.array_split(expected, comm.size)[comm.rank])
            result = comm.reduce(mine, root=comm.size - 1)
            assert (result is not None) == (comm.rank == comm.size - 1)
            if result is not None:
                close(result, expected)
    collective_cases.uneven(comm)
    collective_cases.messages(comm, longest=3001)
    for count in (1, 33, 500):
        arrays = inputs(comm.size, count, np.dtype("float64"))
        mine = arrays[comm.rank]
        assert bits(comm.all_gather(mine)) == bits(np.concatenate(arrays))
        assert bits(comm.all_gather_async(mine).wait()) == bits(np.concatenate(arrays))
        assert bits(comm.broadcast(mine)) == bits(arrays[0])
        gathered = comm.gather(mine)
        assert gathered is None or bits(gathered) == bits(np.concatenate(arrays))
        assert bits(comm.scatter(mine)) == bits(np.array_split(arrays[0], comm.size)[comm.rank])


def test_memory_is_used_again(comm: Communicator) -> None:
    """Arrays die at different times on different ranks; the arena does not grow, and never gives living memory away."""
    part = comm.split(0)
    assert part is not None
    random = np.random.default_rng(comm.rank)
    kept: list[Array] = []
    for turn in range(60):
        array = part.empty(4 << 20, np.uint8)
        array[:: 1 << 16] = turn
        kept.append(array)
        if len(kept) > 6 or (len(kept) > 3 and random.random() < 0.7):
            del kept[random.integers(len(kept) - 1)]  # some live long, and differently long on the ranks
        assert all(np.all(old[:: 1 << 16] == old[0]) for old in kept)
        assert len({int(old[0]) for old in kept}) == len(kept)
    if part.node is not None:
        assert len(part.node.arena._segments) <= 2
    del array
    kept.clear()
    part.close()


def test_splitting_and_closing_leaks_nothing(comm: Communicator) -> None:
    def turn() -> None:
        part = comm.split(comm.rank % 2)
        assert part is not None
        array = part.empty(10_000)
        array[...] = 1
        part.all_reduce(array, out=array)
        part.all_reduce_shared(array)
        part.all_gather_object([part.rank])
        del array
        part.close()

    def state() -> tuple[int, int, int]:
        gc.collect()
        comm.barrier()
        if not Path("/proc/self/status").exists():
            return 0, 0, 0
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        mapped = len(Path("/proc/self/maps").read_text().splitlines())
        return resident, len(os.listdir("/proc/self/fd")), mapped

    rounds = 200 if comm.size <= 2 else 60 if comm.size <= 4 else 15  # a turn of many ranks takes its time
    for _ in range(min(20, rounds // 2)):
        turn()
    before = state()
    for _ in range(rounds):
        turn()
    after = state()
    assert after[0] - before[0] < (8 << 20), f"resident memory grew by {after[0] - before[0]} bytes"
    assert after[1] <= before[1] + 1 and after[2] <= before[2] + 10, (before, after)


def test_living_arrays_survive_close(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    array = part.empty(1000)
    array[...] = comm.rank
    part.close()
    assert np.all(array == comm.rank)


def test_different_calls_are_told(comm: Communicator) -> None:
    """Ranks that call different things get an error that says who did what, at once."""
    part = comm.split(0)
    assert part is not None
    if part.node is None:
        return
    odd = part.rank == part.size - 1
    with pytest.raises(
        CollectiveMismatch, match=r"all_reduce #1 .*sum, 4 elements.*broadcast #1|broadcast #1.*all_reduce #1"
    ):
        if odd:
            part.broadcast(np.zeros(4, np.float32), root=0)
            part.barrier()
            raise AssertionError("not noticed")
        part.all_reduce(np.zeros(4, np.float32))


def test_a_late_rank_is_named(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    quick = Communicator(part.transport, timeout=0.3)
    if quick.node is None:
        return
    quick.barrier()
    if part.rank == part.size - 1:
        time.sleep(1.0)
    else:
        late = f"rank {part.size - 1}"
        with pytest.raises(
            CollectiveTimeout, match=rf"for {late}\b.*all_reduce #2(.|\n)*{late} last came to barrier #1"
        ):
            quick.all_reduce(np.ones(3))
    comm.barrier()


def test_results_have_equal_bits_on_all_ranks_and_again(comm: Communicator) -> None:
    for count in (5, 1000, 300_000):
        mine = inputs(comm.size, count, np.dtype("float32"))[comm.rank]
        for algorithm in ["auto", "native", "exchange"] if comm.size > 1 else ["auto"]:
            first = comm.all_reduce(mine, algorithm=algorithm)
            same_everywhere(comm, first)
            for _ in range(5):
                assert bits(comm.all_reduce(mine, algorithm=algorithm)) == bits(first)


@pytest.mark.parametrize("warm", [False, True])
def test_a_call_after_close_is_told(comm: Communicator, warm: bool) -> None:
    """Which communicator, and which call in which line; also where calls were prepared before."""
    if comm.size == 1:
        pytest.skip("one rank alone needs nobody")
    part = comm.split(0, name="dp")
    assert part is not None
    short, long = np.ones(4 * comm.size, np.float32), np.ones(200_000 * comm.size, np.float32)
    for _ in range(3 * warm):
        part.all_reduce(short)
        part.all_gather(long)
        part.barrier()
    part.close()
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: part.all_reduce(short),
        "all_gather": lambda: part.all_gather(long),
        "all_to_all": lambda: part.all_to_all(short, algorithm="native"),
        "broadcast": lambda: part.broadcast(short, algorithm="chain"),
        "all_reduce_async": lambda: part.all_reduce_async(long),
        "barrier": lambda: part.barrier(),
        "split": lambda: part.split(0),
        "send": lambda: part.send(short, (part.rank + 1) % part.size),
    }
    for name, call in calls.items():
        with pytest.raises(CommunicatorClosed, match=rf"'dp' is closed, .* in {name}\(.*test_collectives.py:\d+"):
            call()
    part.close()
    comm.barrier()
