"""The course's checks of the collectives (its list C, numbers 13 to 19), each a test that names its number.

Counted are steps and bytes, never seconds (number 20). The oracles are the course's numbers and formulas, plain lists,
and NumPy. Of the course's errors (its list K) only number 2 touches traffic: a reduce_scatter and an all_gather move
what one all_reduce moves, so sharded optimizer states cost 2 Ψ, not 3 Ψ; `test_c17` counts it.
"""

import math

import numpy as np
import pytest

from dtrain.collectives import run_threads
from dtrain.collectives.schedules import schedule
from dtrain.launch import bench_table

SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 16)


def volumes(size, call):
    """(steps, sent, received) of every rank for one call; the arrays have 1,000 numbers of 8 bytes per rank."""

    def rank(comm):
        call(comm, np.ones(1000 * size))
        return tuple(comm.counters.volume())

    return run_threads(size, rank)


def most_steps(found):
    return max(steps for steps, _, _ in found)


def test_c13_three_devices_add_up_three_numbers():
    """[2,4,6] + [1,2,3] + [4,8,12] = [7,14,21] in 2 steps that reduce and 2 that pass on; 7 sits on device 3."""
    ring = schedule("all_reduce", "ring", 3)
    steps = [ring.of(rank) for rank in range(3)]
    assert {len(each) for each in steps} == {4}
    held = [[2, 4, 6], [1, 2, 3], [4, 8, 12]]
    for number in range(4):
        before = [list(row) for row in held]
        for rank in range(3):
            for receive in steps[rank][number].receives:
                assert receive.reduce == (number < 2)
                for chunk in receive.chunks:
                    held[rank][chunk] = before[receive.peer][chunk] + receive.reduce * before[rank][chunk]
        if number == 1:
            assert (held[2][0], held[0][1], held[1][2]) == (7, 14, 21)  # devices 3, 1, 2
    assert held == [[7, 14, 21]] * 3

    def rank(comm):
        mine = np.array([[2, 4, 6], [1, 2, 3], [4, 8, 12]])[comm.rank]
        total = comm.all_reduce(mine, algorithm="ring").tolist()
        return total, comm.counters.volume("all_reduce", "ring").steps

    assert run_threads(3, rank) == [([7, 14, 21], 4)] * 3


@pytest.mark.parametrize("size", SIZES)
def test_c14_a_ring(size):
    """2 (p-1) steps and 2 (p-1)/p n bytes from every rank; half of both for each of its halves."""
    n = 8000 * size
    half = (size - 1, n * (size - 1) // size, n * (size - 1) // size)
    whole = tuple(2 * number for number in half)
    assert volumes(size, lambda comm, x: comm.all_reduce(x, algorithm="ring")) == [whole] * size
    assert volumes(size, lambda comm, x: comm.reduce_scatter(x, algorithm="ring")) == [half] * size
    assert volumes(size, lambda comm, x: comm.all_gather(x[:1000], algorithm="ring")) == [half] * size
    if size == 8:
        assert whole[:2] == (14, 1.75 * n)


@pytest.mark.parametrize("size", SIZES)
def test_c15_recursive_halving_and_doubling(size):
    """Of 2^k ranks: 2 log2 p steps, bytes of a ring; else 2 floor(log2 p) + 2 steps, p - 2^k ranks folded first."""
    found = volumes(size, lambda comm, x: comm.all_reduce(x, algorithm="rabenseifner"))
    power = 2 ** int(math.log2(size))
    folded = size - power
    assert most_steps(found) == 2 * int(math.log2(size)) + (2 if folded else 0)
    n = 8000 * size
    if not folded:
        assert {sent for _, sent, _ in found} == {2 * n * (size - 1) // size}
        if size == 8:
            assert most_steps(found) == 6
        return
    steps = [schedule("all_reduce", "rabenseifner", size).of(rank) for rank in range(size)]
    first = [(rank, send.peer) for rank in range(size) for send in steps[rank][0].sends]
    last = [(rank, send.peer) for rank in range(size) for send in steps[rank][-1].sends if len(steps[rank]) > 1]
    assert len(first) == folded == {5: 1, 6: 2, 7: 3}.get(size, folded)
    assert all(abs(a - b) == 1 for a, b in first), "neighbours"
    away = {a for a, _ in first}
    assert {(b, a) for a, b in first} <= set(last), "the same pairs in the end"
    between = {
        peer
        for rank in range(size)
        if rank not in away
        for step in steps[rank][1:-1]
        for peer in map(peer_of, step.sends)
    }
    assert not between & away, "a folded rank waits while the 2^k others work"
    assert {found[rank][0] for rank in away} == {2}


def peer_of(message):
    return message.peer


@pytest.mark.parametrize("size", SIZES)
def test_c16_pairs_mesh_and_tree(size):
    """Pairwise all_to_all: p-1 steps with the partners r + k and r - k; a mesh: one; a tree: ceil(log2 p)."""
    n = 8000 * size
    part = n * (size - 1) // size
    pairwise = volumes(size, lambda comm, x: comm.all_to_all(x, algorithm="pairwise"))
    assert pairwise == [(size - 1, part, part)] * size
    for rank in range(size):
        partners = [
            ([send.peer for send in step.sends], [receive.peer for receive in step.receives])
            for step in schedule("all_to_all", "pairwise", size).of(rank)
        ]
        shifts = [([(rank + k) % size], [(rank - k) % size]) for k in range(1, size)]
        assert [pair for pair in partners if pair[0]] == shifts
    assert volumes(size, lambda comm, x: comm.all_to_all(x, algorithm="direct")) == [(1, part, part)] * size
    tree = volumes(size, lambda comm, x: comm.broadcast(x, algorithm="binomial"))
    assert len(schedule("broadcast", "binomial", size).of(0)) == most_steps(tree) == math.ceil(math.log2(size))
    assert sum(sent for _, sent, _ in tree) == sum(got for _, _, got in tree) == (size - 1) * n
    assert sorted(got for _, _, got in tree) == [0] + [n] * (size - 1)


@pytest.mark.parametrize("size", SIZES)
def test_c17_one_is_made_of_others(size):
    """all_reduce = reduce + broadcast = reduce_scatter + all_gather, to the byte; all_to_all twice = identity; and
    all_gather and reduce_scatter are transposes of one another: the backward of each is the other."""

    def rank(comm):
        random = np.random.default_rng(comm.rank)
        x = random.integers(-9, 9, 6 * size).astype(np.float64)
        total = comm.all_reduce(x, algorithm="ring")
        sums = comm.reduce(x)
        assert (comm.broadcast(sums if comm.rank == 0 else np.empty_like(x)) == total).all()
        assert (comm.all_gather(comm.reduce_scatter(x)) == total).all()
        assert (comm.all_to_all(comm.all_to_all(x)) == x).all()
        y, block = random.integers(-9, 9, 6 * size).astype(np.float64), x[:6]
        gathered = comm.all_reduce(np.array([comm.all_gather(block) @ y, block @ comm.reduce_scatter(y)]))
        assert gathered[0] == gathered[1]
        comm.counters.reset()
        comm.all_reduce(x, algorithm="ring")
        comm.all_gather(comm.reduce_scatter(x, algorithm="ring"), algorithm="ring")
        volume = comm.counters.volume
        assert volume("all_reduce") == tuple(np.add(volume("reduce_scatter"), volume("all_gather")))

    run_threads(size, rank)


def test_c18_bus_factors():
    """Of 8 ranks: 1.75 for all_reduce, 0.875 for what is moved in blocks, 1 for what is in one place whole."""
    for size in (2, 3, 8, 64):
        factors = {name: formula.bus(size) for name, formula in bench_table.COLLECTIVES.items()}
        assert factors["all_reduce"] == 2 * (size - 1) / size
        assert {factors[name] for name in ("reduce_scatter", "all_gather", "all_to_all")} == {(size - 1) / size}
        assert factors["broadcast"] == factors["reduce"] == 1
    assert bench_table.COLLECTIVES["all_reduce"].bus(8) == 1.75
    row = bench_table.row("all_reduce", (8 << 20, 2 << 20, "float32", "sum"), "ring", "in-place", [1e-3], 0, 8)
    assert row.algbw == pytest.approx((8 << 20) / 1e-3 / 1e9) and row.busbw == pytest.approx(1.75 * row.algbw)


def test_c19_the_table_of_a_benchmark():
    """Sizes from 8 K to 64 M, each twice the one before; size, time, bandwidth and the verdict in every row."""
    assert bench_table.parse_sizes("8K:64M", 2) == tuple(8192 << power for power in range(14))
    row = bench_table.row(
        "all_reduce", (8192, 2048, "float32", "sum"), "ring", "out-of-place", [2e-6, 4e-6, 9e-6], 0, 4
    )
    titles = "\n".join(bench_table.titles(("out-of-place",)))
    line = bench_table.line([row]).split()
    for word in ("size", "time", "algbw", "busbw", "algorithm", "#wrong"):
        assert word in titles
    assert line[0] == "8192" and "ring" in line and "4.00" in line and line[-1] == "0"
