"""Schedules as data, run by the interpreter and by the executor on threads, beside NumPy."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain.collectives import run_threads
from dtrain.collectives.schedules import ALGORITHMS, Schedule, schedule
from dtrain.collectives.schedules.interpreter import interpret
from dtrain.collectives.schedules.rounds import rounds, table
from dtrain.collectives.schedules.specification import PROMISES, specification
from tests.schedule_cases import execute

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows]
ROOTED = ("broadcast", "reduce", "gather", "scatter")


def case(plan, count, rng, dtype=np.int64):
    """Inputs of all ranks, counts, and the results by NumPy."""
    size, root = plan.size, plan.root
    whole = lambda n: (rng.integers(-9, 9, n)).astype(dtype)  # noqa: E731
    none, counts = np.empty(0, dtype), count
    if plan.collective == "all_to_all":
        counts = rng.integers(0, count + 2, (size, size))
        blocks = [[whole(counts[i, j]) for j in range(size)] for i in range(size)]
        inputs = [np.concatenate(row) for row in blocks]
        return inputs, counts, [np.concatenate([blocks[i][j] for i in range(size)]) for j in range(size)]
    if plan.collective in ("all_gather", "gather"):
        counts = rng.integers(0, count + 2, size)
        inputs = [whole(n) for n in counts]
        everything = np.concatenate(inputs)
        at_all = plan.collective == "all_gather"
        return inputs, counts, [everything if at_all or rank == root else none for rank in range(size)]
    if plan.collective in ("broadcast", "scatter"):
        inputs = [whole(count) if rank == root else none for rank in range(size)]
        cut = np.array_split(inputs[root], size)
        return inputs, counts, [inputs[root] if plan.collective == "broadcast" else cut[rank] for rank in range(size)]
    inputs = [whole(count) for _ in range(size)]
    total = np.sum(inputs, axis=0, dtype=dtype)
    results = {
        "all_reduce": lambda rank: total,
        "reduce_scatter": lambda rank: np.array_split(total, size)[rank],
        "reduce": lambda rank: total if rank == root else none,
        "scan": lambda rank: np.sum(inputs[: rank + 1], axis=0, dtype=dtype),
        "exscan": lambda rank: np.sum(inputs[:rank], axis=0, dtype=dtype) if rank else none,
        "barrier": lambda rank: inputs[rank],
    }[plan.collective]
    return inputs, counts, [results(rank) for rank in range(size)]


def plans(collective, name, sizes):
    for size in sizes:
        if ALGORITHMS[collective][name].sizes(size):
            for root in {0, size - 1} if collective in ROOTED else {0}:
                yield schedule(collective, name, size, root=root)


@pytest.mark.parametrize("collective, name", [row for row in ROWS if row[0] != "barrier"])
def test_interpreter_beside_numpy(collective, name):
    rng = np.random.default_rng(1)
    for plan in plans(collective, name, [*range(1, 10), 16]):
        for count in {0, 1, plan.size - 1, plan.size, plan.size + 1, 37}:
            inputs, counts, expected = case(plan, count, rng)
            kept = [array.copy() for array in inputs]
            found = interpret(plan, inputs, counts=counts)
            for rank, (a, b) in enumerate(zip(found, expected, strict=True)):
                np.testing.assert_array_equal(a, b, err_msg=f"{plan.size} ranks, {count} elements, rank {rank}")
            assert all(np.array_equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("collective, name", [row for row in ROWS if row[0] != "barrier"])
def test_executor_has_the_bits_of_the_interpreter(collective, name):
    rng = np.random.default_rng(2)
    for plan in plans(collective, name, [1, 2, 5, 8]):
        for count in (0, plan.size - 1, 29):
            inputs, counts, _ = case(plan, count, rng, np.float64)
            inputs = [array * np.pi for array in inputs]
            expected = interpret(plan, inputs, counts=counts)
            for segment_bytes in (24, 1 << 18):
                run = lambda comm: execute(comm.transport, plan, inputs[comm.rank], counts, segment_bytes=segment_bytes)  # noqa: B023, E731
                for a, b in zip(run_threads(plan.size, run), expected, strict=True):
                    np.testing.assert_array_equal(a, b)


class LateSends:
    """Messages of rank 0 are read only after a while, as MPI may do it: until `wait`. In the order of all sends."""

    def __init__(self, transport):
        self.transport, self.rank, self.size = transport, transport.rank, transport.size
        self.sender = ThreadPoolExecutor(1)

    def start_send(self, array, destination, tag):
        def send():
            time.sleep(0.03 if self.rank == 0 else 0.0)
            self.transport.send(array, destination, tag)

        sent = self.sender.submit(send)
        return SimpleNamespace(wait=sent.result, test=sent.done)

    def start_recv(self, out, source, tag):
        return self.transport.start_recv(out, source, tag)


@pytest.mark.parametrize("name", ["recursive_doubling", "rabenseifner", "ring", "direct"])
def test_executor_leaves_alone_what_is_still_being_sent(name):
    plan = schedule("all_reduce", name, 4)
    inputs = list(np.random.default_rng(8).standard_normal((4, 8)))
    expected = interpret(plan, inputs)
    results = run_threads(4, lambda comm: execute(LateSends(comm.transport), plan, inputs[comm.rank]))
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, right)


def test_executor_in_place_and_out():
    plan = schedule("all_reduce", "ring", 3)

    def run(comm):
        array = np.arange(10.0) + comm.rank
        out = np.empty(10)
        result = execute(comm.transport, plan, array, out=out)
        assert result is out and array[0] == comm.rank
        execute(comm.transport, plan, array, out=array)
        return np.array_equal(array, out) and np.array_equal(out, 3 * np.arange(10.0) + 3)

    assert all(run_threads(3, run))


def test_executor_in_place_where_blocks_move():
    """reduce_scatter into a slice of its own input: what is still to be sent must not be overwritten."""
    plan = schedule("reduce_scatter", "pairwise", 4)

    def run(comm):
        array = np.arange(8.0) * (comm.rank + 1)
        return execute(comm.transport, plan, array, out=array[:2])

    for rank, block in enumerate(run_threads(4, run)):
        np.testing.assert_array_equal(block, 10 * np.arange(8.0)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("op, ufunc", [("max", np.maximum), ("min", np.minimum), ("prod", np.multiply)])
def test_operations(op, ufunc):
    inputs = list(np.random.default_rng(4).standard_normal((5, 7)))
    plan = schedule("all_reduce", "rabenseifner", 5)
    expected = ufunc.reduce(inputs, axis=0)
    for result in interpret(plan, inputs, op):
        np.testing.assert_allclose(result, expected, rtol=1e-14)
    for result in run_threads(5, lambda comm: execute(comm.transport, plan, inputs[comm.rank], op=op)):
        np.testing.assert_allclose(result, expected, rtol=1e-14)


def test_half_precision_is_added_in_single():
    plan = schedule("reduce_scatter", "direct", 4)  # all arrivals in one step: one rounding
    inputs = [np.full(4, value, np.float16) for value in (2048, 1, 1, 1)]
    for result in (
        *interpret(plan, inputs),
        *run_threads(4, lambda comm: execute(comm.transport, plan, inputs[comm.rank])),
    ):
        np.testing.assert_array_equal(result, np.float16(np.float32(2051)))


def test_all_ranks_have_the_same_bits():
    inputs = list(np.random.default_rng(6).standard_normal((7, 50)).astype(np.float32))
    for name in ALGORITHMS["all_reduce"]:
        results = interpret(schedule("all_reduce", name, 7), inputs)
        assert all(np.array_equal(results[0].view(np.uint32), result.view(np.uint32)) for result in results), name
    first = interpret(schedule("all_reduce", "direct", 7), inputs)[0]
    total = inputs[0]
    for array in inputs[1:]:
        total = total + array
    assert np.array_equal(first, total)  # strictly from the left


def test_barrier_holds_all():
    plan = schedule("barrier", "dissemination", 5)
    here = []

    def run(comm):
        here.append(comm.rank)
        execute(comm.transport, plan, np.zeros(1, np.uint8), op="max")
        return len(here)

    assert run_threads(5, run) == [5] * 5


def test_ring_of_the_course():
    """[2,4,6] + [1,2,3] + [4,8,12] = [7,14,21]; after the first half 7 is on the third rank, 14 on the first, 21 on
    the second."""
    inputs = [np.array(values) for values in ([2, 4, 6], [1, 2, 3], [4, 8, 12])]
    plan = schedule("all_reduce", "ring", 3)
    assert [result.tolist() for result in interpret(plan, inputs)] == [[7, 14, 21]] * 3
    last_sums = [plan.of(rank)[1].receives[0] for rank in range(3)]
    assert [(receive.reduce, receive.chunks) for receive in last_sums] == [(True, (1,)), (True, (2,)), (True, (0,))]


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter"])
def test_sums_are_conjugate(collective):
    """all_reduce = reduce + broadcast = reduce_scatter + all_gather; all_to_all twice = identity."""
    rng = np.random.default_rng(7)
    inputs = [rng.integers(0, 100, 12) for _ in range(6)]
    total = interpret(schedule("all_reduce", "rabenseifner_halves", 6), inputs)
    blocks = interpret(schedule("reduce_scatter", "recursive_halving", 6), inputs)
    gathered = interpret(schedule("all_gather", "bruck", 6), blocks)
    reduced = interpret(schedule("reduce", "chain", 6, root=2), inputs)
    sent = interpret(schedule("broadcast", "circulant", 6, root=2), reduced, counts=12)
    for rank in range(6):
        np.testing.assert_array_equal(total[rank], gathered[rank])
        np.testing.assert_array_equal(total[rank], sent[rank])
    swap = schedule("all_to_all", "bruck", 6)
    twice = interpret(swap, interpret(swap, inputs))
    assert all(np.array_equal(a, b) for a, b in zip(twice, inputs, strict=True))


@pytest.mark.parametrize("collective, name", [(c, n) for c, n in ROWS if ALGORITHMS[c][n].regular])
def test_one_call_for_all_ranks_gives_the_steps_of_each(collective, name):
    for plan in plans(collective, name, [1, 2, 5, 8, 12]):
        programs = [plan.of(rank) for rank in range(plan.size)]
        for t, from_above in enumerate(rounds(plan)):
            one_by_one = table([program[t] for program in programs])
            for ours, theirs in ((from_above.sends, one_by_one.sends), (from_above.receives, one_by_one.receives)):
                assert listed(ours) == listed(theirs), (plan.size, t)
        assert all(len(program) == t + 1 for program in programs) if programs[0] else True


def listed(messages):
    return sorted(
        (messages.rank[m], messages.peer[m], bool(messages.reduce[m]), messages.chunks_of(m).tolist())
        for m in range(len(messages))
    )


def test_a_schedule_can_be_printed():
    text = str(schedule("all_reduce", "ring", 2))
    assert text.splitlines() == [
        "all_reduce ring, 2 ranks, 2 chunks",
        "rank 0: →1 0  ←1 +1 | →1 1  ←1 0",
        "rank 1: →0 1  ←0 +0 | →0 0  ←0 1",
    ]


def test_lengths():
    assert specification("all_reduce", 4, 4).lengths(10).tolist() == [3, 3, 2, 2]
    assert specification("all_reduce", 4, 4).lengths(3).tolist() == [1, 1, 1, 0]
    assert specification("all_gather", 2, 2).lengths([3, 4]).tolist() == [2, 1, 2, 2]
    assert specification("all_to_all", 2, 1).lengths(3).tolist() == [2, 1, 2, 1]
    assert specification("all_to_all", 2, 1).lengths([[1, 2], [3, 4]]).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="counts of shape"):
        specification("all_gather", 2, 1).lengths([1, 2, 3])
    assert set(PROMISES) == set(ALGORITHMS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("all_sum", "ring", 4), "not a collective; allowed: all_reduce"),
        (("all_reduce", "rings", 4), "not an algorithm of all_reduce; allowed: ring"),
        (("all_reduce", "ring", 0), "size=0: not possible"),
        (("all_gather", "recursive_doubling", 6), "it needs a power of two"),
        (("broadcast", "chain", 4, 4), "root=4: allowed: 0 to 3"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)
    with pytest.raises(ValueError, match="pieces: not a parameter of it; allowed: segments"):
        schedule("broadcast", "chain", 4, pieces=3)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="rank 1: 2 elements given, 3 expected"):
        interpret(schedule("all_reduce", "ring", 2), [np.zeros(3), np.zeros(2)])
    assert isinstance(schedule("scan", "chain", 3), Schedule)
