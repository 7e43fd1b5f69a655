"""What every communicator must do, whatever carries it: cases for `tests/mpi` (processes), `tests/unit` (threads)."""

import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator, wait_all
from dtrain.collectives.dtypes import accumulator
from tests.oracle import DTYPES, OPS, Array, bits, close, inputs, join, lengths, same_everywhere, total


def algorithms(comm: Communicator, table: dict[str, Any]) -> list[str]:
    """auto, and every algorithm of the table that this communicator can always do."""
    names = ["auto"]
    if comm.size > 1:
        names += [name for name in ("native", "exchange") if name in table]
        names += ["staged"] if comm.node is not None and "staged" in table else []
    return names


def all_reduce(comm: Communicator) -> None:
    from dtrain.collectives.algorithms import ALL_REDUCE

    for dtype in DTYPES:
        for count in lengths(comm.size, dtype):
            arrays = inputs(comm.size, count, dtype)
            mine, expected = arrays[comm.rank], total(arrays)
            before = bits(mine)
            for algorithm in algorithms(comm, ALL_REDUCE):
                if algorithm == "native" and not comm.transport.reduces("sum", mine):
                    continue
                result = comm.all_reduce(mine, algorithm=algorithm)
                close(result, expected)
                assert bits(mine) == before, "the input was changed"
                if count in (1025, 70001):
                    same_everywhere(comm, result)
                    assert bits(comm.all_reduce(mine, algorithm=algorithm)) == bits(result)
                inplace = mine.copy()
                assert comm.all_reduce(inplace, out=inplace, algorithm=algorithm) is inplace
                assert bits(inplace) == bits(result)


def operations(comm: Communicator) -> None:
    for op in OPS:
        for dtype in (
            np.dtype("float32"),
            np.dtype("float16"),
            np.dtype("int32"),
            np.dtype(bool),
            np.dtype("complex128"),
        ):
            for count in (3, 5000):
                arrays = inputs(comm.size, count, dtype)
                expected = total(arrays, op)
                close(comm.all_reduce(arrays[comm.rank], op), expected)
                close(comm.all_reduce_async(arrays[comm.rank], op).wait(), expected)
                block = np.array_split(expected, comm.size)[comm.rank]
                close(comm.reduce_scatter(arrays[comm.rank], op), block)
                root = comm.size - 1
                result = comm.reduce(arrays[comm.rank], op, root=root)
                if comm.rank == root:
                    assert result is not None
                    close(result, expected)
                else:
                    assert result is None
    # A NaN is never lost, in no order of the ranks.
    for rank in range(comm.size):
        value = np.array([np.nan if comm.rank == rank else 1.0, 2.0], np.float32)
        assert np.isnan(comm.all_reduce(value, "max")[0]) and comm.all_reduce(value, "min")[1] == 2.0
    # A sum beyond the largest number is infinity, without a warning on one rank that leaves the others waiting.
    huge = np.full(5, np.finfo(np.float32).max)
    assert np.all(np.isinf(comm.all_reduce(huge))) == (comm.size > 1)


def shapes(comm: Communicator) -> None:
    """Layouts of memory: transposed, strided, reversed, 0-d, read-only, empty dims."""
    base = np.arange(24.0).reshape(4, 6) + comm.rank
    forms: list[Array] = [base.T, base[:, ::2], base[::-1], base[1, 1], base[:0], base[:, 1:3]]
    shift = sum(range(comm.size))
    for form in forms:
        expected = (np.asarray(form) - comm.rank) * comm.size + shift
        close(np.asarray(comm.all_reduce(form)), np.asarray(expected))
        out = np.zeros((*form.shape, 2))[..., 0]
        assert comm.all_reduce(form, out=out) is out
        np.testing.assert_array_equal(out, expected)
        frozen = np.array(form)
        frozen.flags.writeable = False
        np.testing.assert_array_equal(comm.all_reduce(frozen), expected)
        np.testing.assert_array_equal(comm.broadcast(form, root=comm.size - 1), form - comm.rank + comm.size - 1)
    strided = base.copy()[:, ::2]
    comm.all_reduce(strided, out=strided)
    np.testing.assert_array_equal(strided, (base[:, ::2] - comm.rank) * comm.size + shift)
    # Overlap that is not "the same memory": the result must be as if there were none.
    line = np.arange(100.0) + comm.rank
    expected = (np.arange(90.0)) * comm.size + shift
    comm.all_reduce(line[:90], out=line[10:])
    np.testing.assert_array_equal(line[10:], expected)


def reduce_scatter(comm: Communicator) -> None:
    from dtrain.collectives.algorithms import REDUCE_SCATTER

    for dtype in DTYPES:
        for count in lengths(comm.size, dtype):
            arrays = inputs(comm.size, count, dtype)
            expected = np.array_split(total(arrays), comm.size)[comm.rank]
            for algorithm in algorithms(comm, REDUCE_SCATTER):
                if algorithm == "native" and not comm.transport.reduces("sum", arrays[0]):
                    continue
                close(comm.reduce_scatter(arrays[comm.rank], algorithm=algorithm), expected)
            close(comm.reduce_scatter_async(arrays[comm.rank]).wait(), expected)
    # Rows, uneven counts with a zero, and in place.
    counts = [3 * rank for rank in range(comm.size)]
    grid = np.arange(sum(counts) * 2.0).reshape(-1, 2) + comm.rank
    start = sum(counts[: comm.rank])
    expected = (grid - comm.rank)[start : start + counts[comm.rank]] * comm.size + sum(range(comm.size))
    np.testing.assert_array_equal(comm.reduce_scatter(grid, counts=counts), expected)
    block = grid[start : start + counts[comm.rank]]
    comm.reduce_scatter(grid, out=block, counts=counts)
    np.testing.assert_array_equal(block, expected)


def scans(comm: Communicator) -> None:
    """By every way, elsewhere and in place; an exclusive one leaves rank 0 with what changes no sum."""
    from dtrain.collectives.algorithms import EXSCAN, SCAN

    for dtype in DTYPES:
        for count in lengths(comm.size, dtype):
            arrays = inputs(comm.size, count, dtype)
            mine = arrays[comm.rank]
            before = total(arrays[: comm.rank]) if comm.rank else np.zeros_like(mine)
            with_mine = total(arrays[: comm.rank + 1])
            ways = {"native", "staged"}  # these round small floats once, schedules in every step
            if accumulator(dtype) == dtype:
                ways |= {"auto", "copy", "chain", "doubling"}
            if comm.size > 1 and not comm.transport.reduces("sum", mine):
                ways -= {"native"}
            for algorithm in sorted(ways & {"chain", *algorithms(comm, SCAN)}):
                close(comm.scan(mine, algorithm=algorithm), with_mine)
            for algorithm in sorted(ways & {"doubling", *algorithms(comm, EXSCAN)}):
                found = mine.copy()
                assert comm.exscan(found, out=found, algorithm=algorithm) is found
                close(found, before)


def movement(comm: Communicator) -> None:
    """all_gather, gather, scatter, all_to_all, broadcast in every dtype and length."""
    for dtype in [*DTYPES, np.dtype("S3"), np.dtype([("a", "i4"), ("b", "f8")])]:
        for count in lengths(comm.size, dtype):
            if dtype.kind in "SV" and dtype != ml_dtypes.bfloat16:
                arrays = [np.full(count, rank + 1).astype("i4").astype(dtype) for rank in range(comm.size)]
            else:
                arrays = inputs(comm.size, count, dtype)
            mine, whole, each = arrays[comm.rank], bits(join(arrays)), [bits(array) for array in arrays]
            for algorithm in ["auto"] if comm.node is None else ["auto", "native", "staged"]:
                everything = comm.all_gather(mine, algorithm=algorithm)
                assert everything.dtype == dtype
                assert bits(everything) == whole
                for root in {0, comm.size - 1}:
                    assert bits(comm.broadcast(mine, root, algorithm=algorithm)) == each[root]
                    gathered = comm.gather(mine, root, algorithm=algorithm)
                    assert (gathered is None) == (comm.rank != root)
                    if gathered is not None:
                        assert bits(gathered) == whole
            blocks = [np.array_split(array, comm.size) for array in arrays]
            received = comm.all_to_all(mine)
            assert bits(received) == bits(join([row[comm.rank] for row in blocks]))
            part = comm.scatter(mine if comm.rank == comm.size - 1 else None, root=comm.size - 1)
            assert part.dtype == dtype.newbyteorder("=") or part.dtype == dtype
            assert bits(part) == bits(blocks[comm.size - 1][comm.rank].astype(part.dtype))
            assert bits(comm.all_gather_async(mine).wait()) == whole
            assert bits(comm.broadcast_async(mine, 0).wait()) == each[0]


def uneven(comm: Communicator) -> None:
    """Counts that differ from rank to rank, in two dims, and in place."""
    counts = [rank % 3 * 2 for rank in range(comm.size)]
    rows = [np.full((count, 3), rank, np.int16) for rank, count in enumerate(counts)]
    expected = np.concatenate(rows)
    assert np.array_equal(comm.all_gather(rows[comm.rank], counts=counts), expected)
    assert np.array_equal(comm.all_gather_async(rows[comm.rank], counts=counts).wait(), expected)
    gathered = comm.gather(rows[comm.rank], counts=counts)
    assert gathered is None or np.array_equal(gathered, expected)
    assert np.array_equal(comm.scatter(expected if comm.rank == 0 else None, counts=counts), rows[comm.rank])
    out = np.full((sum(counts), 3), -1, np.int16)
    start = sum(counts[: comm.rank])
    out[start : start + counts[comm.rank]] = rows[comm.rank]
    comm.all_gather(out[start : start + counts[comm.rank]], out=out, counts=counts)
    assert np.array_equal(out, expected)
    # rank s sends (s + 2 d) % 4 rows of value 10 s + d to rank d
    sent = [(comm.rank + 2 * other) % 4 for other in range(comm.size)]
    message = np.concatenate([np.full((count, 2), 10 * comm.rank + other) for other, count in enumerate(sent)])
    came = np.concatenate([np.full(((s + 2 * comm.rank) % 4, 2), 10 * s + comm.rank) for s in range(comm.size)])
    assert np.array_equal(comm.all_to_all(message, counts=sent), came)
    received = [(other + 2 * comm.rank) % 4 for other in range(comm.size)]
    assert np.array_equal(comm.all_to_all(message, counts=sent, out_counts=received), came)
    square = np.arange(comm.size * 2) + 100 * comm.rank
    comm.all_to_all(square, out=square)
    mine = np.arange(2 * comm.rank, 2 * comm.rank + 2)
    assert np.array_equal(square, np.concatenate([mine + 100 * other for other in range(comm.size)]))


def messages(comm: Communicator, longest: int = 100_000) -> None:
    """send, recv and their twins around a ring; tags keep messages apart."""
    if comm.size == 1:
        return
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for count in (0, 1, longest):
        mine = np.full(count, comm.rank, ml_dtypes.bfloat16)
        out = np.empty(count, ml_dtypes.bfloat16)
        assert comm.sendrecv(mine, right, out, left) is out
        assert np.all(out == left)
    first, second = np.full((3, 2), comm.rank), np.full((3, 2), comm.rank + 100)
    works = [comm.send_async(first, right, tag=1), comm.send_async(second, right, tag=2)]
    late = np.empty((2, 3), int).T
    receiving = comm.recv_async(late, left, tag=2)
    early = comm.recv(np.empty((3, 2), int), left, tag=1)
    assert receiving.wait() is late
    wait_all(works)
    assert np.all(early == left) and np.all(late == left + 100)
    if comm.rank == 0:
        comm.send(first, 1)
    elif comm.rank == 1:
        assert np.all(comm.recv(np.empty((3, 2), int), 0) == 0)


def objects(comm: Communicator) -> None:
    value = {"rank": comm.rank, "text": "ä" * comm.rank, "nothing": None, "deep": [1.5, [True]]}
    expected = [{"rank": r, "text": "ä" * r, "nothing": None, "deep": [1.5, [True]]} for r in range(comm.size)]
    assert comm.all_gather_object(value) == expected
    assert comm.broadcast_object(value, comm.size - 1) == expected[-1]
    assert comm.broadcast_object(object() if comm.rank else "x" * 300_000, 0) == "x" * 300_000


def groups(comm: Communicator) -> None:
    """split: colors, keys that turn the order around, None, groups of one, groups of groups."""
    assert len(comm.hosts) == comm.size and comm.hosts[comm.rank] == comm.host
    assert 0 <= comm.local_rank < comm.local_size <= comm.size
    part = comm.split(comm.rank % 2, key=-comm.rank)
    assert part is not None
    members = sorted((rank for rank in range(comm.size) if rank % 2 == comm.rank % 2), reverse=True)
    assert part.size == len(members) and members[part.rank] == comm.rank
    assert part.all_gather(np.array([comm.rank])).tolist() == members
    again = part.split(0 if part.rank == 0 else None)
    assert (again is None) == (part.rank != 0)
    if again is not None:
        assert again.size == 1 and again.all_reduce(np.arange(3)).tolist() == [0, 1, 2]
        again.close()
    close(part.all_reduce(np.full(5, float(comm.rank))), np.full(5, float(sum(members))))
    part.close()


def refusals(comm: Communicator) -> None:
    """Errors name the argument, its value and what is allowed; nothing was communicated, so the ranks go on."""
    array = np.zeros(6, np.float32)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: comm.all_reduce(array, "mean"), "op='mean'.*sum, prod, max, min"),
        (lambda: comm.all_reduce(array, out=np.zeros(5, np.float32)), r"out has shape \(5,\).*\(6,\)"),
        (lambda: comm.all_reduce(array, out=np.zeros(6)), "out has dtype float64.*float32"),
        (lambda: comm.all_reduce(array, algorithm="magic"), "algorithm='magic'.*auto"),
        (lambda: comm.all_reduce(np.array(["a"])), "dtype=<U1"),
        (lambda: comm.all_gather(np.array([None])), "dtype=object"),
        (lambda: comm.broadcast(array, root=comm.size), f"root={comm.size}.*0 to {comm.size - 1}"),
        (lambda: comm.reduce(array, root=-1), "root=-1"),
        (lambda: comm.send(array, comm.rank), "this rank itself"),
        (lambda: comm.recv(array, comm.size), f"source={comm.size}"),
        (lambda: comm.reduce_scatter(array, counts=[6] * (comm.size + 1)), "counts="),
        (lambda: comm.all_to_all(array, counts=[5] + [0] * (comm.size - 1)), "with the sum 6"),
        (lambda: comm.split(-2), "color=-2"),
        (lambda: comm.empty(-1), "shape=-1"),
    ]
    frozen = np.zeros(6, np.float32)
    frozen.flags.writeable = False
    cases.append((lambda: comm.all_reduce(array, out=frozen), "read-only"))
    for call, pattern in cases:
        with pytest.raises(ValueError, match=pattern):
            call()
    comm.barrier()


def twins(comm: Communicator) -> None:
    """Every collective has a started form with the result of the blocking one; all are under way together."""
    for dtype in (np.dtype("float32"), np.dtype("float16")):
        for count in (0, 1, comm.size + 1, 5001, 70_001):
            arrays = inputs(comm.size, count, dtype)
            root = count % comm.size
            for make in (np.empty_like, lambda array: comm.empty(array.shape, array.dtype)):
                mine = make(arrays[comm.rank])
                mine[...] = arrays[comm.rank]
                works = {
                    "all_reduce": comm.all_reduce_async(mine),
                    "all_gather": comm.all_gather_async(mine),
                    "reduce": comm.reduce_async(mine, "max", root),
                    "scan": comm.scan_async(mine, "min"),
                    "exscan": comm.exscan_async(mine, "max"),
                    "barrier": comm.barrier_async(),
                    "reduce_scatter": comm.reduce_scatter_async(mine),
                    "gather": comm.gather_async(mine, root),
                    "scatter": comm.scatter_async(mine if comm.rank == root else None, root),
                    "all_to_all": comm.all_to_all_async(mine),
                    "broadcast": comm.broadcast_async(mine, root),
                }
                blocks = [np.array_split(array, comm.size) for array in arrays]
                results = {name: works[name].wait() for name in sorted(works)}  # another order than that of the starts
                close(results["all_reduce"], total(arrays))
                close(results["reduce_scatter"], np.array_split(total(arrays), comm.size)[comm.rank])
                assert bits(results["all_gather"]) == bits(join(arrays))
                assert bits(results["all_to_all"]) == bits(join([row[comm.rank] for row in blocks]))
                assert bits(results["scatter"]) == bits(blocks[root][comm.rank])
                assert bits(results["broadcast"]) == bits(arrays[root])
                at_root = comm.rank == root
                assert bits(results["gather"]) == (bits(join(arrays)) if at_root else b"")
                assert bits(results["reduce"]) == (bits(total(arrays, "max")) if at_root else b"")
                assert bits(results["scan"]) == bits(total(arrays[: comm.rank + 1], "min"))
                least = np.full_like(mine, -np.inf)
                assert bits(results["exscan"]) == bits(total(arrays[: comm.rank], "max") if comm.rank else least)
    rows = [rank + 1 for rank in range(comm.size)]
    mine = comm.empty(sum(rows))
    mine[...] = comm.rank
    uneven = comm.all_to_all_async(mine, counts=rows)
    assert np.all(uneven.wait() == np.repeat(np.arange(comm.size), comm.rank + 1))


def in_flight(comm: Communicator) -> None:
    """Many works at once, with blocking collectives in between, waited for in any order."""
    for start_all in (0, 1):
        works = []
        for step in range(10):
            array = np.full(1000 + step, comm.rank + step + start_all, np.float32 if step % 3 else np.float16)
            works.append(comm.all_reduce_async(array, out=array))
            if step == 4:
                assert comm.all_reduce(np.array([1]))[0] == comm.size
        order = [7, 2, 9, 0, 1, 3, 4, 5, 6, 8] if start_all else list(range(10))
        for step in order:
            result = works[step].wait()
            assert np.all(result == sum(range(comm.size)) + comm.size * (step + start_all))
            assert works[step].done() and works[step].wait() is result


def reuse(comm: Communicator, make: Callable[[int], Array]) -> None:
    """The same buffers over and over with changing values and ranks that come late: a race shows as a wrong sum."""
    rounds = 200 if comm.size <= 4 else 100
    buffer = make(20_011)
    slices = [buffer[:7], buffer[7:9000], buffer[9000:]]
    random = np.random.default_rng(comm.rank)
    ranks = sum(range(comm.size))
    for step in range(rounds):
        if random.random() < 0.1:
            time.sleep(random.random() * 2e-3)
        buffer[...] = comm.rank + step
        if step % 2:
            wait_all([comm.all_reduce_async(part, out=part) for part in slices])
        else:
            for part in slices:
                comm.all_reduce(part, out=part)
        expected = ranks + comm.size * step
        assert np.all(buffer == expected), (step, buffer[buffer != expected][:5], expected)
        if step % 5 == 0:
            block = comm.reduce_scatter(buffer)
            assert np.all(block == expected * comm.size)
        if step % 7 == 0:
            shared = comm.all_reduce_shared(buffer)
            assert np.all(shared == expected * comm.size) and not shared.flags.writeable


ALL: dict[str, Callable[[Communicator], None]] = {
    "all_reduce": all_reduce,
    "operations": operations,
    "shapes": shapes,
    "reduce_scatter": reduce_scatter,
    "scans": scans,
    "movement": movement,
    "uneven": uneven,
    "messages": messages,
    "objects": objects,
    "groups": groups,
    "refusals": refusals,
    "twins": twins,
    "in_flight": in_flight,
    "reuse": lambda comm: reuse(comm, lambda count: np.empty(count, np.float32)),
}
