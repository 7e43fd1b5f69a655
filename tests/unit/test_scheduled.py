"""Schedules through a communicator, the ranks as threads: asked for, refused, counted, in any form of memory."""

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.collectives.algorithms import TABLES, names
from dtrain.collectives.counters import Volume
from dtrain.collectives.schedules import ALGORITHMS, Algorithm, Receive, Send, Step, schedule
from dtrain.collectives.schedules.interpreter import interpret
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.schedule import custom
from dtrain.collectives.waiting import CollectiveMismatch
from tests.nodes_in_threads import run_nodes
from tests.schedule_cases import ROOTED, ROWS, given


def test_every_algorithm_of_every_collective_can_be_asked_for():
    """Right results, the schedule's name, and its own steps and bytes counted; 1 to 5 ranks as threads."""
    rng = np.random.default_rng(3)

    def run(comm, collective, text, plan, inputs, counts, expected):
        array, op = inputs[comm.rank], "sum"
        method = getattr(comm, collective)
        rooted = {"root": plan.root} if collective in ROOTED else {}
        comm.counters.reset()
        if collective in ("all_gather", "gather"):
            result = method(array, counts=counts, algorithm=text, **rooted)
        elif collective == "all_to_all":
            result = method(array, counts=counts[comm.rank], out_counts=counts[:, comm.rank], algorithm=text)
        elif collective in ("broadcast", "scatter"):
            result = method(array if comm.rank == plan.root else np.zeros(counts), algorithm=text, **rooted)
        else:
            result = method(array, op, algorithm=text, **rooted)
        wanted = expected[comm.rank]
        if result is None:
            assert not len(wanted)
        elif collective == "exscan" and comm.rank == 0:
            assert not result.any()
        else:
            assert result.tobytes() == wanted.tobytes(), (text, comm.rank, result, wanted)
        if comm.size > 1 and sum(map(len, inputs)):
            assert comm.last[:2] == (collective, plan.name)
            steps = [step for step in plan.of(comm.rank) if step.sends or step.receives]
            lengths = 8 * plan.specification.lengths(counts)
            sent = sum(int(lengths[c % plan.parts]) for step in steps for s in step.sends for c in s.chunks)
            received = sum(int(lengths[c % plan.parts]) for step in steps for r in step.receives for c in r.chunks)
            assert comm.counters.volume(collective, plan.name) == Volume(len(steps), sent, received)

    def all_of(comm, cases):
        for case in cases:
            run(comm, *case)

    for size in range(1, 6):
        cases = []
        for collective, name in ROWS:
            row = ALGORITHMS[collective][name]
            if not row.sizes(size):
                continue
            parameters = {"segments": 3} if "segments" in row.parameters else {}
            text = name + "".join(f":{key}={value}" for key, value in parameters.items())
            plan = schedule(collective, name, size, root=size - 1 if collective in ROOTED else 0, **parameters)
            for count in (0, 1, size + 1, 50):
                inputs, counts = given(plan, count, rng, np.dtype(np.float64))
                cases.append((collective, text, plan, inputs, counts, interpret(plan, inputs, counts=counts)))
        run_threads(size, all_of, cases)


def test_barrier_waits_for_all():
    here = []

    def run(comm):
        here.append(comm.rank)
        comm.barrier("dissemination")
        assert len(here) == comm.size
        assert comm.size == 1 or comm.counters.volume("barrier", "dissemination") == (
            (comm.size - 1).bit_length(),
            0,
            0,
        )

    for size in (1, 2, 5, 8):
        here.clear()
        run_threads(size, run)


def test_one_function_for_two_collectives():
    """It is bound, and proven, for each: what is right as the one may be wrong as the other."""

    def everyone(rank, size, root=0):
        """Every vector to everybody: an all_gather, and a gather where only the root looks at it."""
        peers = [peer for peer in range(size) if peer != rank]
        yield Step([Send(peer, [rank]) for peer in peers], [Receive(peer, [peer]) for peer in peers])

    def run(comm):
        mine, all_of_them = np.full(2, comm.rank), np.repeat(np.arange(comm.size), 2)
        assert comm.all_gather(mine, algorithm=everyone).tolist() == all_of_them.tolist()
        whole = comm.gather(mine, 0, algorithm=everyone)
        assert whole.tolist() == all_of_them.tolist() if comm.rank == 0 else whole is None
        with pytest.raises(ScheduleError, match="broadcast everyone"):
            comm.broadcast(np.ones(6), 0, algorithm=everyone)

    run_threads(3, run)


def test_what_cannot_be_is_refused_with_what_can():
    def refuse(comm):
        x = np.ones(4)
        for algorithm, message in [
            ("rings", "not an algorithm; allowed: auto, copy, .*native.*ring, segmented_ring"),
            ("ring:segments=2", "segments=2: allowed after ring: :segment_bytes=NUMBER"),
            ("segmented_ring:segments=0", "segments=0: allowed after segmented_ring: :segments=NUMBER"),
            ("hierarchical:local=2", "local=2: 3 ranks cannot be cut"),
            (7, "a name, a row of dtrain.collectives.schedules.Algorithm, or a function"),
        ]:
            with pytest.raises(ValueError, match=message):
                comm.all_reduce(x, algorithm=algorithm)
        with pytest.raises(ValueError, match=r"size=3: not possible.*it needs a power of two"):
            comm.all_gather(x, algorithm="recursive_doubling")
        with pytest.raises(ValueError, match="allowed: auto, copy, staged, native, dissemination"):
            comm.barrier("ring")

    run_threads(3, refuse)
    with pytest.raises(ValueError, match="not an algorithm"):
        single().all_reduce(np.ones(3), algorithm="rings")
    assert set(TABLES) == set(ALGORITHMS) and "neighbour_exchange" in names("all_gather")


def reversed_ring(rank, size):
    for k in range(2 * (size - 1) if size > 1 else 0):
        j = k if k < size - 1 else k - size
        sent, received = (rank + j) % size, (rank + j + 1) % size
        yield Step([Send((rank - 1) % size, [sent])], [Receive((rank + 1) % size, [received], reduce=k < size - 1)])


def test_an_algorithm_of_ones_own_runs_once_it_is_proven():
    row = Algorithm(reversed_ring, lambda size: schedule("all_reduce", "ring", size).cost, lambda size: size)
    short = custom(lambda rank, size: list(reversed_ring(rank, size))[:-1], parts=4)

    def run(comm):
        for own in (row, reversed_ring):
            assert comm.all_reduce(np.arange(9.0), algorithm=own).tolist() == (4 * np.arange(9.0)).tolist()
            assert comm.last == ("all_reduce", "reversed_ring", 72)
        with pytest.raises(ScheduleError, match="after the last step: expected the sum of ranks 0-3"):
            comm.all_reduce(np.arange(9.0), algorithm=short)

    run_threads(4, run)


def test_in_place_and_overlapping():
    """What is still to be sent is not overwritten by what comes, whatever the two arrays have in common."""

    def run(comm):
        size, rank = comm.size, comm.rank
        for name in ALGORITHMS["all_reduce"]:
            x = np.arange(10.0) + rank
            assert comm.all_reduce(x, out=x, algorithm=name) is x
            assert x.tolist() == (size * np.arange(10.0) + sum(range(size))).tolist(), name
            y = np.arange(11.0)
            comm.all_reduce(y[:-1], out=y[1:], algorithm=name)
            assert y[1:].tolist() == (size * np.arange(10.0)).tolist(), name
        for name in ALGORITHMS["reduce_scatter"]:
            x = np.arange(2.0 * size) * (rank + 1)
            mine = x[2 * rank : 2 * rank + 2]
            comm.reduce_scatter(x, out=mine, algorithm=name)
            factor = size * (size + 1) // 2
            assert mine.tolist() == [factor * 2 * rank, factor * (2 * rank + 1)], name
        for name in ALGORITHMS["all_gather"]:
            x = np.full(3 * size, -1.0)
            x[3 * rank : 3 * rank + 3] = rank
            comm.all_gather(x[3 * rank : 3 * rank + 3], out=x, algorithm=name)
            assert x.tolist() == np.repeat(np.arange(float(size)), 3).tolist(), name
        for name in ALGORITHMS["all_to_all"]:
            x = 10.0 * rank + np.arange(size)
            comm.all_to_all(x, out=x, algorithm=name)
            assert x.tolist() == [10.0 * other + rank for other in range(size)], name
        for name in ALGORITHMS["scan"]:
            x = np.ones(5)
            comm.scan(x, out=x, algorithm=name)
            assert x.tolist() == [rank + 1.0] * 5, name
        x = np.full(5, 2.0)
        comm.exscan(x, "prod", out=x)
        assert x.tolist() == [2.0**rank] * 5

    for size in (2, 4):
        run_threads(size, run)


def test_forms_of_arrays():
    """Strides, read-only, no dimension, another byte order, nothing: as for all other ways to do a collective."""

    def run(comm):
        grid = np.arange(24.0).reshape(4, 6) + comm.rank
        grid.flags.writeable = False
        total = comm.size * np.arange(24.0).reshape(4, 6) + sum(range(comm.size))
        out = np.zeros((6, 8)).T[::2, :]
        comm.all_reduce(grid, out=out, algorithm="rabenseifner")
        assert np.array_equal(out, total)
        assert np.array_equal(comm.all_reduce(grid[:, ::3], algorithm="ring"), total[:, ::3])
        assert comm.all_reduce(np.float32(2), algorithm="tree").tolist() == 2.0 * comm.size
        swapped = comm.all_reduce(grid.astype(">f8"), algorithm="double_tree")
        assert swapped.dtype == np.dtype(">f8") and np.array_equal(swapped, total)
        words = comm.all_gather(np.array([f"rank {comm.rank}"]), algorithm="bruck")
        assert words.tolist() == [f"rank {rank}" for rank in range(comm.size)]
        assert comm.all_reduce(np.empty((0, 3)), algorithm="ring").shape == (0, 3)
        with pytest.raises(ValueError, match="op='mean': not an operation; allowed: sum"):
            comm.all_reduce(grid, "mean", algorithm="ring")

    run_threads(3, run)


def test_half_precision():
    """Added in float32; rounded once in each step, so once by `direct` and at every rank of a ring."""
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        big = {"float16": 2048, "bfloat16": 256}[dtype.name]  # and 1 is half a unit of the last place
        inputs = [np.full(8, value, dtype) for value in (big, 1, 1, 1)]
        run = lambda comm, name: comm.all_reduce(inputs[comm.rank], algorithm=name)  # noqa: B023, E731
        for name in ("direct", "gather_reduce"):
            assert run_threads(4, run, name)[2].tolist() == [float(np.float32(big + 3).astype(dtype))] * 8
        assert float(run_threads(4, run, "tree")[0][0]) != float(big + 3)
        assert len({result.tobytes() for result in run_threads(4, run, "ring")}) == 1


def test_sums_by_direct_do_not_depend_on_buckets():
    """In the order of the ranks, from the left, wherever an element lies: cut or joined arrays give the same bits."""
    inputs = [np.random.default_rng(rank).standard_normal(40).astype(np.float32) for rank in range(5)]
    expected = inputs[0]
    for array in inputs[1:]:
        expected = expected + array

    def run(comm, name):
        x = inputs[comm.rank]
        parts = [comm.all_reduce(x[begin:end], algorithm=name) for begin, end in ((0, 3), (3, 17), (17, 40))]
        return np.concatenate(parts), comm.all_reduce(x, algorithm=name)

    for name in ("direct", "gather_reduce"):
        for parts, whole in run_threads(5, run, name):
            assert parts.tobytes() == whole.tobytes() == expected.tobytes()
    parts, whole = run_threads(5, run, "ring")[0]
    assert parts.tobytes() != whole.tobytes()  # what this is about


def test_a_call_too_many_is_a_mismatch():
    """On one node, whatever differs is told by name, and no data of the wrong call is used."""
    x = np.ones(8)
    wrong = [
        (lambda c: c.all_reduce(x, algorithm="ring"), lambda c: c.all_reduce(x, algorithm="tree"), "ring.*tree"),
        (lambda c: c.all_reduce(x, algorithm="ring"), lambda c: c.broadcast(x, algorithm="binomial"), "all_reduce.*b"),
        (lambda c: c.all_reduce(x, algorithm="ring"), lambda c: c.all_reduce(x[:5], algorithm="ring"), "8 el.*5 el"),
        (lambda c: c.scan(x), lambda c: c.scan(x.astype("f4")), "dtype f8.*dtype f4"),
        (lambda c: c.reduce(x, root=0, algorithm="binomial"), lambda c: c.reduce(x, root=1, algorithm="binomial"), ""),
    ]
    for first in (True, False):  # the very first schedule, or a later one
        for one, other, message in wrong:

            def run(comm, one=one, other=other, first=first):
                if not first:
                    comm.all_reduce(x, algorithm="direct")
                (one if comm.rank == 0 else other)(comm)
                comm.barrier()

            with pytest.raises(CollectiveMismatch, match=r"the ranks do not do the same: rank [01] came to") as told:
                run_nodes([0, 0], run)
            parts = message.split(".*")
            assert all(part in str(told.value) for part in parts), told.value
