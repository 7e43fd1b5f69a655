"""Movement without a copy between: arrays of `comm.empty`, whole and in slices, in place and not."""

import time
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.waiting import CollectiveMismatch
from tests.oracle import DTYPES, bits, inputs, join, lengths, total

Array = np.ndarray[Any, Any]
RECORD = np.dtype([("a", "i2"), ("b", "f8")])
DTYPE_LIST = [dtype for dtype in DTYPES if dtype.isnative]


def shared(comm: Communicator, values: Array, skip: int = 0) -> Array:
    """The values in an array of the window, after `skip` other elements; every rank asks for the same length."""
    longest = int(comm.all_reduce(np.array([len(values)]), "max")[0])
    home = comm.empty((skip + longest, *values.shape[1:]), values.dtype)
    array = home[skip : skip + len(values)]
    array[...] = values
    return array


def names(comm: Communicator) -> list[str]:
    """What can be asked for."""
    return ["auto", "window"] if comm.node is not None else ["auto"]


@pytest.mark.parametrize("dtype", [*DTYPE_LIST, RECORD], ids=str)
def test_every_dtype_and_length(comm: Communicator, dtype: np.dtype[Any]) -> None:
    for count in lengths(comm.size, dtype):
        plain = np.dtype("float64") if dtype == RECORD else dtype
        arrays = [array.astype(dtype) for array in inputs(comm.size, count, plain)]
        mine = shared(comm, arrays[comm.rank], skip=3)
        blocks = [np.array_split(array, comm.size) for array in arrays]
        for algorithm in names(comm):
            root = count % comm.size
            assert bits(comm.all_gather(mine, algorithm=algorithm)) == bits(join(arrays))
            received = comm.all_to_all(mine, algorithm=algorithm)
            assert bits(received) == bits(join([row[comm.rank] for row in blocks]))
            gathered = comm.gather(mine, root, algorithm=algorithm)
            assert (gathered is None) == (comm.rank != root)
            if gathered is not None:
                assert bits(gathered) == bits(join(arrays))
            assert bits(comm.scatter(mine if comm.rank == root else None, root)) == bits(blocks[root][comm.rank])
            if dtype != RECORD:
                result = comm.reduce(mine, root=root, algorithm=algorithm)
                assert (result is None) == (comm.rank != root)
                if result is not None:
                    assert bits(result) == bits(total(arrays)), "not the sum in rank order"
            assert bits(mine) == bits(arrays[comm.rank]), "the source was changed"
            if count % comm.size == 0:
                copy = shared(comm, arrays[comm.rank], skip=1)
                for _ in range(2):  # the second call may be a prepared one
                    copy[...] = arrays[comm.rank]
                    assert comm.all_to_all(copy, out=copy, algorithm=algorithm) is copy
                    assert bits(copy) == bits(received)
                copy[...] = arrays[comm.rank]
                assert comm.all_to_all_async(copy, out=copy).wait() is copy
                assert bits(copy) == bits(received)
            assert bits(comm.all_gather_async(mine).wait()) == bits(join(arrays))
            copy = shared(comm, arrays[comm.rank])
            assert comm.broadcast(copy, root, out=copy, algorithm=algorithm) is copy
            assert bits(copy) == bits(arrays[root])
            copy[...] = arrays[comm.rank]
            assert comm.broadcast_async(copy, root, out=copy).wait() is copy
            assert bits(copy) == bits(arrays[root])


def test_results_in_the_window_too(comm: Communicator) -> None:
    """Gathered, reduced and scattered where the result lies in root's window, where all write or read at once."""
    for count in (1, 2000, 70_001):
        arrays = inputs(comm.size, count, np.dtype("float32"))
        mine = shared(comm, arrays[comm.rank], skip=1)
        for root in {0, comm.size - 1}:
            everything = comm.empty(count * comm.size)
            everything[...] = -1
            comm.gather(mine, root, out=everything if comm.rank == root else None)
            expected = join(arrays) if comm.rank == root else np.full(count * comm.size, -1, np.float32)
            comm.barrier()
            assert bits(everything) == bits(expected)
            own = everything[count * comm.rank : count * (comm.rank + 1)]
            own[...] = arrays[comm.rank]
            comm.gather(own, root, out=everything if comm.rank == root else None)  # in place on root
            comm.barrier()
            assert bits(everything) == bits(expected) or comm.rank != root
            other = comm.empty(count)
            other[...] = 7
            comm.reduce(mine, root=root, out=other if comm.rank == root else None)
            comm.barrier()
            assert bits(other) == (bits(total(arrays)) if comm.rank == root else bits(np.full(count, 7, np.float32)))
            other[...] = arrays[comm.rank]
            comm.reduce(other, root=root, out=other if comm.rank == root else None)  # in place on root
            comm.barrier()
            assert bits(other) == bits(total(arrays) if comm.rank == root else arrays[comm.rank])
            everything[...] = np.arange(count * comm.size)
            own[...] = 0 if comm.rank != root else own
            comm.scatter(everything if comm.rank == root else None, root, out=own)  # in place on root
            assert np.array_equal(own, np.arange(count * comm.size, dtype=np.float32)[count * comm.rank :][:count])


def test_in_place_and_overlapping(comm: Communicator) -> None:
    for count in (1, 3000, 40_000):
        whole = comm.empty((count * comm.size, 2), np.int32)
        expected = np.repeat(np.arange(comm.size, dtype=np.int32), count * 2).reshape(-1, 2)
        own = whole[count * comm.rank : count * (comm.rank + 1)]
        for started in (False, True):
            whole[...] = -1
            own[...] = comm.rank
            gathered = comm.all_gather_async(own, out=whole).wait() if started else comm.all_gather(own, out=whole)
            assert gathered is whole and np.array_equal(whole, expected)
            # The first block is the own one on rank 0 alone.
            whole[...] = -1
            whole[:count] = comm.rank
            first = whole[:count]
            if started:
                comm.all_gather_async(first, out=whole).wait()
            else:
                comm.all_gather(first, out=whole)
            assert np.array_equal(whole, expected)
        whole[...] = expected + 100 * comm.rank
        assert comm.all_to_all(whole, out=whole) is whole
        assert np.array_equal(whole, expected * 100 + comm.rank)


def test_uneven(comm: Communicator) -> None:
    """Counts that differ, also none at all, and places that differ from rank to rank."""
    width = 1500
    counts = [(rank * 5 + 2) % 4 for rank in range(comm.size)]
    rows = [np.full((n, width), rank, np.int16) for rank, n in enumerate(counts)]
    home = comm.empty((sum(counts) + comm.size, width), np.int16)
    start = comm.rank + sum(counts[: comm.rank])
    mine = home[start : start + counts[comm.rank]]
    mine[...] = rows[comm.rank]
    for root in range(comm.size):
        assert np.array_equal(comm.all_gather(mine, counts=counts), np.concatenate(rows))
        assert np.array_equal(comm.all_gather_async(mine, counts=counts).wait(), np.concatenate(rows))
        gathered = comm.gather(mine, root, counts=counts)
        assert gathered is None or np.array_equal(gathered, np.concatenate(rows))
    # rank s sends (s + 2 d) % 4 rows of value 10 s + d to rank d
    sent = [(comm.rank + 2 * other) % 4 for other in range(comm.size)]
    message = shared(comm, np.concatenate([np.full((n, width), 10 * comm.rank + d) for d, n in enumerate(sent)]))
    came = np.concatenate([np.full(((s + 2 * comm.rank) % 4, width), 10 * s + comm.rank) for s in range(comm.size)])
    for algorithm in names(comm):
        assert np.array_equal(comm.all_to_all(message, counts=sent, algorithm=algorithm), came)
        received = [(other + 2 * comm.rank) % 4 for other in range(comm.size)]
        result = comm.all_to_all(message, counts=sent, out_counts=received, algorithm=algorithm)
        assert np.array_equal(result, came)


def test_wrong_counts_are_told(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    if part.node is None:
        return
    message = part.empty(2 * part.size)
    message[...] = 0
    with pytest.raises(CollectiveMismatch, match=r"has 8 bytes for rank \d+, which expects 12 \(out_counts\)"):
        part.all_to_all(message, counts=[2] * part.size, out_counts=[2] * (part.size - 1) + [3])

    comm.barrier()


def test_changing_the_source_after_the_return_is_safe(comm: Communicator) -> None:
    """Over and over with changing values and ranks that come late: a race shows as a wrong value."""
    random = np.random.default_rng(comm.rank)
    count = 3001
    source, whole, other = comm.empty(count), comm.empty(count * comm.size), comm.empty(count)
    ranks = np.repeat(np.arange(comm.size), count)
    own = whole[count * comm.rank : count * (comm.rank + 1)]
    for turn in range(60):
        root = turn % comm.size
        if random.random() < 0.15:
            time.sleep(random.random() * 2e-3)
        source[...] = comm.rank + turn
        assert np.array_equal(comm.all_gather(source), ranks + turn)
        source[...] = -comm.rank - turn
        comm.broadcast(source, root, out=source)
        assert np.all(source == -root - turn)
        source[...] = 3 * turn + comm.rank
        gathered = comm.gather(source, root)
        source[...] = turn
        result = comm.reduce(source, root=root, out=other if turn % 2 and comm.rank == root else None)
        source[...] = 9
        assert gathered is None or np.array_equal(gathered, ranks + 3 * turn)
        assert result is None or np.all(result == turn * comm.size)
        whole[...] = turn * 2
        part = comm.scatter(whole if comm.rank == root else None, root)
        whole[...] = ranks + comm.rank * 10 + turn
        assert np.all(part == turn * 2)
        received = comm.all_to_all(whole)
        comm.all_to_all(whole, out=whole)
        assert np.array_equal(whole, received)
        own[...] = turn + comm.rank
        assert np.array_equal(received, ranks * 10 + comm.rank + turn)
        work = comm.broadcast_async(source, root, out=source)
        gathering = comm.all_gather_async(own, out=whole)
        if random.random() < 0.5:
            work.wait()
        assert np.array_equal(gathering.wait(), ranks + turn)
        assert np.all(work.wait() == 9)


def test_the_window_is_taken(comm: Communicator) -> None:
    """`auto` goes straight through the window for long arrays there; asked for elsewhere, that is refused."""
    if comm.node is None:
        return
    array = comm.empty(40_000)
    array[...] = 1
    before = [int(comm.node._mine[word]) for word in (0, 16)]
    comm.all_gather(array)
    number = int(comm.node._mine[0])
    assert number == before[0] + 1 and comm.node._mine[16] == number, "one collective, with its end published"
    with pytest.raises(ValueError, match=r"algorithm='window'.*possible here: auto, .*staged"):
        comm.all_gather(np.ones(3), algorithm="window")


def test_own_block_gathered_again_by_the_library(comm: Communicator) -> None:
    """In place and again: MPI takes no message from where it delivers one, the second time as the first."""
    everything = comm.empty(comm.size * 500)
    own = everything[comm.rank * 500 : (comm.rank + 1) * 500]
    for turn in range(3):
        everything[...] = -1
        own[...] = comm.rank + turn
        comm.all_gather(own, out=everything, algorithm="native" if comm.size > 1 else "auto")
        assert bits(everything) == bits(np.repeat(np.arange(comm.size, dtype=np.float32) + turn, 500))
