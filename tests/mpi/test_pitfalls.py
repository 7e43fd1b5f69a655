"""The classic mistakes of collective libraries, each a test: window, staging, MPI's own, exchange, and what auto takes.

    mistake                                            where it would show
    sizes 1, 2, 3, 5, 6, 7, 9, 16                      this file (`mpirun -n P`); test_every_size.py in threads
    counts 0, < p, < 2^k, not divisible, long          test_all_reduce_by_every_way, test_movement_..., test_reduce_...
    some ranks with nothing in uneven collectives      test_some_ranks_have_nothing; test_collectives.py `uneven`
    counts beyond 2^31 bytes                           test_collectives.py test_pieces; test_beyond_2_gib
    in place over input that is still to be read       test_in_place; test_window_moves.py test_in_place_and_overlapping
    aliases, strides, read-only, 0-d, byte order       test_aliases_and_layouts; `collective_cases.shapes`
    float16, bfloat16: sums in float32                 test_small_floats_are_added_in_float32
    sums that depend on the order                      test_the_order_is_that_of_the_ranks
    equal bits on all ranks, NaN and -0.0 too          test_all_reduce_..., test_not_a_number_is_the_same_everywhere
    another result in another run                      test_all_reduce_..., with late ranks
    a bucket changes the sum of an element             test_the_place_in_a_bucket_does_not_matter
    data before flag; buffers reused too early         `collective_cases.reuse`; test_a_rank_far_ahead_waits
    collectives in flight meet one another             test_works_of_all_kinds_in_flight; test_progress.py
    messages of the user meet those of a collective    test_messages_between_collectives
    ranks that do different things                     test_mismatches_are_told; test_collectives.py
    a rank that does not come                          test_collectives.py test_a_late_rank_is_named
    nothing per rank in a window; base not aligned     test_windows_of_nothing_and_alignment
    many windows exhaust descriptors, /dev/shm         test_window_leaks.py; test_many_arrays_one_segment

Algorithms over messages have the same tests in tests of their own.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator, wait_all
from dtrain.collectives.waiting import CollectiveMismatch
from tests.oracle import bits, close, inputs, same_everywhere, total

Array = np.ndarray[Any, Any]


def counts(size: int) -> list[int]:
    """0, 1, around the size and its power of two, odd, around what one pass of the staging holds, long."""
    power = 1 << (size.bit_length() - 1)
    return sorted({0, 1, size - 1, power - 1, size, size + 1, 1023, 4097, 65_537, 300_007})


def homes(comm: Communicator, values: Array) -> Iterator[tuple[Array, list[str]]]:
    """The values in private memory and in the window, each with the algorithms that can be asked for there."""
    ways = ["auto"]
    if comm.size > 1:
        ways += ["native", "exchange"] + (["staged"] if comm.node is not None else [])
    yield values.copy(), ways
    array = comm.empty(len(values) + 3, values.dtype)[3:]  # not at the beginning of a page, nor of a cache line
    array[...] = values
    yield array, [*ways, "window"] if comm.node is not None and len(values) else ways


def late(comm: Communicator, turn: int) -> None:
    """Another rank comes late in every turn."""
    if comm.rank == turn % comm.size:
        time.sleep(1e-3)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_all_reduce_by_every_way(comm: Communicator, dtype: str) -> None:
    """Right, of equal bits on all ranks, and again the same when other ranks come late; the input is unchanged."""
    for count in counts(comm.size)[: -2 if dtype == "int16" else None]:
        arrays = inputs(comm.size, count, np.dtype(dtype))
        expected = total(arrays)
        for home, ways in homes(comm, arrays[comm.rank]):
            for way in [*ways, *(["window_staged"] if "window" in ways else [])]:
                target = home if way == "window" else None  # the window adds up in place
                if way == "native" and not comm.transport.reduces("sum", home):
                    continue
                results = []
                for turn in range(2):
                    late(comm, turn)
                    home[...] = arrays[comm.rank]
                    results.append(bits(comm.all_reduce(home, out=target, algorithm=way)))
                    if target is None:
                        assert bits(home) == bits(arrays[comm.rank]), (way, "the input was changed")
                assert results[0] == results[1], (way, count, "another result when others came late")
                result = np.frombuffer(results[0], dtype)
                close(result, expected)
                same_everywhere(comm, result)


def test_movement_by_every_way(comm: Communicator) -> None:
    for count in counts(comm.size):
        arrays = inputs(comm.size, count, np.dtype("float64"))
        whole = np.concatenate(arrays)
        came = np.concatenate([np.array_split(array, comm.size)[comm.rank] for array in arrays])
        for home, ways in homes(comm, arrays[comm.rank]):
            for way in ways:
                if way == "exchange":
                    continue
                late(comm, count)
                root = count % comm.size
                assert bits(comm.all_gather(home, algorithm=way)) == bits(whole)
                gathered = comm.gather(home, root, algorithm=way)
                assert gathered is None or bits(gathered) == bits(whole)
                if way != "staged" or count % comm.size == 0:
                    assert bits(comm.all_to_all(home, algorithm=way)) == bits(came)
                kept = home if way == "window" else None
                assert bits(comm.broadcast(home, root, out=kept, algorithm=way)) == bits(arrays[root])
                home[...] = arrays[comm.rank]
            part = comm.scatter(home if comm.rank == comm.size - 1 else None, comm.size - 1)
            assert bits(part) == bits(np.array_split(arrays[-1], comm.size)[comm.rank])


def test_reduce_scatter_and_reduce_by_every_way(comm: Communicator) -> None:
    for count in counts(comm.size):
        arrays = inputs(comm.size, count, np.dtype("float32"))
        expected = total(arrays)
        block = np.array_split(expected, comm.size)[comm.rank]
        for home, ways in homes(comm, arrays[comm.rank]):
            for way in ways:
                result = comm.reduce_scatter(home, algorithm=way)
                close(result, block)
                late(comm, count)
                assert bits(comm.reduce_scatter(home, algorithm=way)) == bits(result)
                at_root = comm.reduce(home, root=count % comm.size, algorithm=way)
                assert (at_root is None) == (comm.rank != count % comm.size)
                if at_root is not None:
                    close(at_root, expected)
                assert bits(home) == bits(arrays[comm.rank]), "the input was changed"


def test_some_ranks_have_nothing(comm: Communicator) -> None:
    """All rows on one rank; every second rank without any; nobody with any."""
    size = comm.size
    one = [0] * (size - 1) + [5]
    for rows in (one, [3 * (rank % 2) for rank in range(size)], [0] * size):
        blocks = [np.full((n, 2), rank + 1, np.int32) for rank, n in enumerate(rows)]
        whole = np.concatenate(blocks)
        for place in (False, True):
            mine = comm.empty((5, 2), np.int32)[: rows[comm.rank]] if place else blocks[comm.rank].copy()
            mine[...] = blocks[comm.rank]
            assert np.array_equal(comm.all_gather(mine, counts=rows), whole)
            assert np.array_equal(comm.all_gather_async(mine, counts=rows).wait(), whole)
            gathered = comm.gather(mine, size - 1, counts=rows)
            assert gathered is None or np.array_equal(gathered, whole)
            assert np.array_equal(comm.scatter(whole if comm.rank == 0 else None, counts=rows), blocks[comm.rank])
            everything = comm.empty(whole.shape, np.int32) if place else np.empty_like(whole)
            everything[...] = whole
            assert np.array_equal(comm.reduce_scatter(everything, counts=rows), blocks[comm.rank] * size)
            # Only the last rank sends, and to the first alone.
            sent = [4 if comm.rank == size - 1 and other == 0 else 0 for other in range(size)]
            message = comm.empty((4, 3))[: sum(sent)] if place else np.empty((sum(sent), 3), np.float32)
            message[...] = 7
            came = comm.all_to_all(message, counts=sent)
            assert came.shape == (4 if comm.rank == 0 else 0, 3) and np.all(came == 7)


def test_in_place(comm: Communicator) -> None:
    """Results that lie where the input is: exactly, and shifted by less than its length."""
    size, rank = comm.size, comm.rank
    for count in (1, 7, 20_000):
        for place in (False, True):
            array = comm.empty(count * size, np.int64) if place else np.empty(count * size, np.int64)
            pattern = np.arange(count * size)
            own = array[rank * count : (rank + 1) * count]
            array[...] = pattern + rank
            assert comm.reduce_scatter(array, out=own) is own
            mine = slice(rank * count, (rank + 1) * count)
            assert np.array_equal(own, pattern[mine] * size + sum(range(size)))
            array[...] = pattern + rank
            first = array[:count]  # every rank's result at the beginning of its input
            comm.reduce_scatter(array, out=first)
            assert np.array_equal(first, pattern[mine] * size + sum(range(size)))
            array[...] = pattern + 1000 * rank
            comm.all_to_all(array, out=array)
            assert np.array_equal(array, np.concatenate([pattern[mine] + 1000 * other for other in range(size)]))
            array[...] = -1
            own[...] = rank
            comm.all_gather(own, out=array)
            assert np.array_equal(array, np.repeat(np.arange(size), count))
            array[...] = pattern * rank
            comm.scatter(array if rank == size - 1 else None, size - 1, out=own)
            assert np.array_equal(own, pattern[mine] * (size - 1))


def test_in_place_of_an_empty_block(comm: Communicator) -> None:
    """The library is told of no overlap, and every rank starts the same call."""
    counts = [2] * (comm.size - 1) + [0]
    begin = 2 * comm.rank
    array = np.arange(sum(counts)) + comm.rank
    own = array[begin : begin + counts[comm.rank]]
    expected = own * comm.size + sum(range(comm.size)) - comm.rank * comm.size
    assert comm.reduce_scatter_async(array, out=own, counts=counts, algorithm="native").wait() is own
    assert np.array_equal(own, expected)


@pytest.mark.parametrize("count", [5, 20_000])
@pytest.mark.parametrize("algorithm", ["auto", "staged", "cma", "native", "exchange", "ring"])
def test_in_place_again(comm: Communicator, algorithm: str, count: int) -> None:
    """Private memory, calls of equal shapes in turns: my own block, one that overlaps it, one apart, another array."""
    size, rank = comm.size, comm.rank
    pattern, mine = np.arange(count * size), slice(rank * count, (rank + 1) * count)
    gathers = algorithm in ("auto", "native", "ring")
    adds = algorithm in ("auto", "native", "exchange", "ring")
    if comm.node is not None:
        gathers = gathers or algorithm == "staged" or (algorithm == "cma" and comm.node.reads)
        adds = adds or algorithm == "staged"
    for turn in range(3):
        for begin in (rank * count, abs(rank * count - (size > 1)), None):
            array = np.full(count * size, -1)
            own = np.empty(count, np.int64) if begin is None else array[begin : begin + count]
            if gathers:
                own[...] = rank + turn
                assert comm.all_gather(own, out=array, algorithm=algorithm) is array
                assert np.array_equal(array, np.repeat(np.arange(size) + turn, count))
            if adds:
                array[...] = pattern + rank + turn
                assert comm.reduce_scatter(array, out=own, algorithm=algorithm) is own
                assert np.array_equal(own, (pattern[mine] + turn) * size + sum(range(size)))
                array[...] = pattern + rank + turn
                assert comm.reduce_scatter_async(array, out=own).wait() is own
                assert np.array_equal(own, (pattern[mine] + turn) * size + sum(range(size)))
        if gathers:
            root, given = turn % size, np.full(count, rank + turn)
            result = given if turn == 1 else np.empty_like(given)
            way = "chain" if algorithm == "ring" else algorithm
            assert comm.broadcast(given, root, out=result, algorithm=way) is result
            assert (result == root + turn).all()
            assert result is given or (given == rank + turn).all(), "the source was changed"


def test_aliases_and_layouts(comm: Communicator) -> None:
    """Overlapping views, backwards, every second element, read-only, single numbers, the other byte order."""
    size, shift = comm.size, sum(range(comm.size))
    for place in (False, True):
        line = comm.empty(300, np.float64) if place else np.empty(300)
        for begin in (1, 50, 200):
            line[...] = np.arange(300.0) + comm.rank
            comm.all_reduce(line[:100], out=line[begin : begin + 100])
            assert np.array_equal(line[begin : begin + 100], np.arange(100.0) * size + shift)
        line[...] = np.arange(300.0) + comm.rank
        expected = np.arange(300.0) * size + shift
        assert np.array_equal(comm.all_reduce(line[::-3]), expected[::-3])
        assert np.array_equal(
            comm.all_gather(line[::150]), np.ravel([np.arange(0.0, 300, 150) + r for r in range(size)])
        )
        square = line[:144].reshape(12, 12)
        assert np.array_equal(comm.all_reduce(square.T), expected[:144].reshape(12, 12).T)
        line.flags.writeable = False
        assert np.array_equal(comm.all_reduce(line), expected)
        assert np.array_equal(comm.broadcast(line, size - 1), np.arange(300.0) + size - 1)
        with pytest.raises(ValueError, match="read-only"):
            comm.all_reduce(line, out=line)
        line.flags.writeable = True
    assert comm.all_reduce(np.float64(comm.rank)) == shift and comm.all_reduce(np.array(2)).shape == ()
    other = (np.arange(7) + comm.rank).astype(">i4")
    result = comm.all_reduce(other)
    assert result.dtype == other.dtype and np.array_equal(result, np.arange(7) * size + shift)
    assert np.array_equal(comm.all_gather(other[:1]), np.arange(size))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_small_floats_are_added_in_float32(comm: Communicator, dtype: np.dtype[Any]) -> None:
    """1 + 2^-k of every other rank: in its own precision each of them would be lost, together they are not."""
    tiny = 2.0 ** -(12 if dtype == np.float16 else 9)
    for home, ways in homes(comm, np.full(5000, 1.0 if comm.rank == 0 else tiny).astype(dtype)):
        expected = np.array(np.float32(1 + (comm.size - 1) * np.float32(tiny))).astype(dtype)
        for way in ways:
            if way == "native":
                assert comm.size == 1 or not comm.transport.reduces("sum", home)
            elif way != "window":
                assert np.all(comm.all_reduce(home, algorithm=way) == expected), way
        assert np.all(comm.all_reduce(home, out=home) == expected)


def test_the_order_is_that_of_the_ranks(comm: Communicator) -> None:
    """Sums that another order would change, by all ways of ours: ((x0 + x1) + x2) + ..."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(9001) * 10.0 ** (5 * (rank % 3)) for rank in range(comm.size)]
    backwards = total(arrays[::-1])
    assert comm.size < 3 or bits(backwards) != bits(total(arrays)), "these do not tell the order"
    for home, ways in homes(comm, arrays[comm.rank]):
        for way in ways:
            if way not in ("native", "auto", "window"):
                assert bits(comm.all_reduce(home, algorithm=way)) == bits(total(arrays)), way
        if "window" in ways:
            assert bits(comm.all_reduce(home, out=home, algorithm="window")) == bits(total(arrays))


def test_not_a_number_is_the_same_everywhere(comm: Communicator) -> None:
    """NaN of different bits, infinities of both signs, -0.0: whoever adds, all ranks have the same bits."""
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, 3e38], np.float32)
    values = np.concatenate([np.roll(special, comm.rank)] * 40)
    values.view(np.uint32)[np.isnan(values)] += comm.rank  # another payload on every rank
    for op in ("sum", "max", "min", "prod"):
        for home, ways in homes(comm, values):
            for way in ways:
                if way in ("native", "window"):
                    continue
                same_everywhere(comm, comm.all_reduce(home, op, algorithm=way))
            result = comm.all_reduce(home, op, out=home)
            same_everywhere(comm, result)
            if op in ("max", "min"):
                lost = np.isnan(np.stack([np.roll(special, rank) for rank in range(comm.size)])).any(axis=0)
                assert np.array_equal(np.isnan(result[:7]), lost), "a NaN was dropped"


def test_the_place_in_a_bucket_does_not_matter(comm: Communicator) -> None:
    """An array alone and in the middle of a longer one: the same bits (ways of ours; MPI's own promises nothing)."""
    arrays = inputs(comm.size, 30_000, np.dtype("float32"))
    for home, ways in homes(comm, arrays[comm.rank]):
        for way in [way for way in ways if way in ("staged", "exchange", "window")]:
            home[...] = arrays[comm.rank]
            out = home if way == "window" else None
            bucket = bits(comm.all_reduce(home, out=out, algorithm=way)[777:20_001])
            home[...] = arrays[comm.rank]
            alone = home[777:20_001]
            assert bits(comm.all_reduce(alone, out=alone if way == "window" else None, algorithm=way)) == bucket, way


def test_a_rank_far_ahead_waits(comm: Communicator) -> None:
    """Broadcasts need nobody but root: it runs ahead until its memory is still being read, never over it."""
    for place in (False, True):
        buffer = comm.empty(50_000) if place else np.empty(50_000, np.float32)
        for turn in range(30):
            buffer[...] = turn if comm.rank == 0 else -1
            if comm.rank == comm.size - 1 and turn % 10 == 0:
                time.sleep(2e-3)
            comm.broadcast(buffer, out=buffer)
            assert buffer[0] == turn and buffer[-1] == turn and np.all(buffer == turn)


def test_works_of_all_kinds_in_flight(comm: Communicator) -> None:
    """Of every kind several at once on one communicator, waited for from the last to the first."""
    size, rank = comm.size, comm.rank
    for place in (False, True):
        sources = [comm.empty(200 * size) if place else np.empty(200 * size, np.float32) for _ in range(3)]
        works, expected = [], []
        for turn, source in enumerate(sources):
            source[...] = rank + turn
            each = np.repeat(np.arange(size) + turn, 200).astype(np.float32)
            all_sum = np.full(200 * size, sum(range(size)) + size * turn, np.float32)
            at_end = rank == size - 1
            works += [comm.all_reduce_async(source), comm.reduce_scatter_async(source), comm.all_to_all_async(source)]
            expected += [all_sum, all_sum[:200], each]
            works += [comm.all_gather_async(source[:200]), comm.broadcast_async(source, size - 1)]
            expected += [each, np.full(200 * size, size - 1 + turn)]
            works += [comm.reduce_async(source, root=size - 1), comm.gather_async(source[:200], size - 1)]
            expected += [all_sum if at_end else all_sum[:0], each if at_end else each[:0]]
            works += [comm.scatter_async(source if rank == 0 else None), comm.barrier_async()]
            expected += [np.full(200, turn), all_sum[:0]]
        for work, right in zip(reversed(works), reversed(expected), strict=True):
            assert np.array_equal(work.wait(), right)


def test_messages_between_collectives(comm: Communicator) -> None:
    """A message sent before collectives and received after them, with every tag that MPI's own might use."""
    if comm.size == 1:
        return
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = [comm.send_async(np.full(10, tag), right, tag) for tag in (0, 1, 32766)]
    big = np.ones(300_000, np.float32)
    for way in ("native", "exchange", "auto"):
        assert comm.all_reduce(big, algorithm=way)[-1] == comm.size
    assert len(comm.all_to_all(big)) >= len(big) // comm.size
    for tag in (32766, 0, 1):
        assert np.all(comm.recv(np.empty(10, int), left, tag) == tag)
    wait_all(sent)


@pytest.mark.parametrize("what", ["op", "count", "dtype", "root", "collective"])
def test_mismatches_are_told(comm: Communicator, what: str) -> None:
    """Every difference between the ranks is an error on some rank that names both, before anything blocks."""
    part = comm.split(0)
    assert part is not None
    if part.node is None:
        return
    odd = part.rank == part.size - 1
    array = np.zeros(9 if odd and what == "count" else 8, np.int32 if odd and what == "dtype" else np.float32)
    with pytest.raises(CollectiveMismatch, match=r"do not do the same: rank \d+ came to .*, rank \d+ to "):
        if what == "root":
            part.broadcast(array, root=1 if odd else 0)
        elif what == "collective" and odd:
            part.all_gather(array)
        else:
            part.all_reduce(array, "max" if odd and what == "op" else "sum")
        part.barrier()
        raise AssertionError("not noticed")
    comm.barrier()


def test_windows_of_nothing_and_alignment(comm: Communicator) -> None:
    for dtype in ("uint8", "float64", "complex128"):
        nothing = comm.empty((0, 3), dtype)
        assert comm.all_reduce(nothing, out=nothing) is nothing and comm.all_gather(nothing).shape == (0, 3)
        for count in (1, 3, 5000):
            array = comm.empty(count, dtype)
            assert comm.node is None or array.ctypes.data % 64 == 0, "two arrays on one cache line"
            array[...] = 1
            assert np.all(comm.all_reduce(array, out=array) == (comm.size if dtype != "uint8" else comm.size % 256))


def test_many_arrays_one_segment(comm: Communicator) -> None:
    """A thousand living arrays take no more segments than their bytes need."""
    part = comm.split(0)
    assert part is not None
    arrays = [part.empty(100) for _ in range(1000)]
    if part.node is not None:
        assert len(part.node.arena._segments) == 1
    arrays[-1][...] = 1
    assert np.all(part.all_reduce(arrays[-1], out=arrays[-1]) == part.size)
    del arrays
    part.close()


@pytest.mark.skipif("DTRAIN_TEST_LONG" not in os.environ, reason="9 GB and a minute: DTRAIN_TEST_LONG=1 runs it")
def test_beyond_2_gib(comm: Communicator) -> None:
    if comm.size != 2:
        pytest.skip("two ranks are enough")
    count = (1 << 31) + 7
    array = np.full(count, comm.rank + 1, np.uint8)
    for way in ("native", "auto"):
        comm.broadcast(array, 1, out=array, algorithm=way)
        assert array[0] == array[-1] == 2 and int(array[:: 1 << 20].sum()) == 2 * len(array[:: 1 << 20])
        array[...] = comm.rank + 1
        comm.all_reduce(array, out=array, algorithm=way)
        assert array[0] == array[-1] == array[1 << 31] == 3
        array[...] = comm.rank + 1
