"""Collectives that are one call of machine code: NumPy's sums, whoever does them otherwise, wherever the arrays lie."""

import time
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, flags, node, parts, window
from dtrain.collectives.waiting import CollectiveMismatch
from tests.oracle import bits, normals


def numbers(rank: int, count: int, dtype: str) -> np.ndarray:
    return (normals(rank, count) * 100).astype(dtype)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bits; of long arrays without a copy."""
    return found.dtype == expected.dtype and np.array_equal(found.view(np.uint8), expected.view(np.uint8))


def check(comm: Communicator, count: int, dtype: str = "float32", op: str = "sum") -> None:
    """Every prepared collective three times against NumPy, in the window and elsewhere; new data in every round: twice
    those of the round before, which doubles all results, to the bit."""
    ufunc = {"sum": np.add, "max": np.maximum}[op]
    home = comm.empty(count * comm.size, dtype)
    rows = np.stack([numbers(rank, count * comm.size, dtype) for rank in range(comm.size)])
    blocks = rows.reshape(comm.size, comm.size, count)
    wide = "float32" if dtype == "float16" else dtype
    total = rows[0].astype(wide)
    for row in rows[1:]:
        ufunc(total, row.astype(wide), out=total)
    total = total.astype(dtype)
    mine = slice(comm.rank * count, (comm.rank + 1) * count)
    for where in (home, np.empty_like(home)):
        for turn in range(3):
            if turn:
                rows += rows
                total += total
            came = np.concatenate([row[comm.rank] for row in blocks])

            where[...] = rows[comm.rank]
            assert same(comm.all_reduce_shared(where, op), total)
            assert same(comm.all_reduce(where, op), total)
            assert same(comm.reduce_scatter(where, op), total[mine])
            assert same(comm.all_to_all(where), came)
            assert same(where, rows[comm.rank])
            assert comm.all_to_all(where, out=where) is where
            assert same(where, came)
            where[...] = rows[comm.rank]
            assert same(comm.all_gather(where), rows.reshape(-1))
            own = np.concatenate([row[rank] for rank, row in enumerate(blocks)])
            assert same(comm.all_gather(where[mine], out=where), own)
            where[...] = rows[comm.rank]
            assert same(comm.all_reduce(where, op, out=where), total)


@pytest.mark.parametrize("count", [1, 777, 40_000, 300_001])
def test_every_form(bold: Communicator, count: int) -> None:
    check(bold, min(count, 100_003 if bold.size > 4 else count))  # as long in all as on fewer ranks


@pytest.mark.parametrize("kind", ["float64 sum", "int32 sum", "float16 sum", "float32 max"])
def test_dtypes_and_operations(bold: Communicator, kind: str) -> None:
    check(bold, 5000, *kind.split())


@pytest.mark.parametrize("who", [0, 1])
def test_ranks_without_machine_code_meet_those_with(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, who: int
) -> None:
    monkeypatch.setattr(node, "CHECKED", 0)
    if comm.rank % 2 == who:
        monkeypatch.setattr(parts, "machine_code", lambda: None)
    other = comm.split(0)
    assert other is not None
    try:
        check(other, 5000)
    finally:
        other.close()


def test_peers_may_move_their_arrays(bold: Communicator) -> None:
    """The place that a peer puts aside is looked up in every call; a rank takes turns between two."""
    count = 3000
    arrays = [bold.empty(count) for _ in range(2)]
    for turn in range(8):
        mine = arrays[(turn >> bold.rank % 3) % 2]
        mine[...] = numbers(turn + bold.rank, count, "float32")
        expected = [numbers(turn + rank, count, "float32") for rank in range(bold.size)]
        assert bits(bold.all_gather(mine, algorithm="window")) == bits(np.concatenate(expected))


def test_arrays_that_move_change_places(bold: Communicator) -> None:
    """The same in place: nothing is written where an array lay before."""
    count = 3000
    arrays = [bold.empty(count * bold.size) for _ in range(2)]
    for turn in range(8):
        mine, other = arrays[:: 1 if (turn >> bold.rank % 3) % 2 else -1]
        rows = [numbers(turn + rank, count * bold.size, "float32") for rank in range(bold.size)]
        mine[...], other[...] = rows[bold.rank], turn
        bold.all_to_all(mine, out=mine, algorithm="window")
        assert bits(mine) == bits(np.stack(rows).reshape(bold.size, bold.size, count)[:, bold.rank].reshape(-1))
        assert (other == turn).all()


def test_works_under_way_are_finished_before(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says REDUCED says it of all that was started before, also when it met the others without a look aside."""
    monkeypatch.setattr(node, "CHECKED", 0)
    monkeypatch.setattr(flags, "TRIES", (10**7, 0))  # a fifth of a second
    monkeypatch.setattr(flags, "CROWDED_TRIES", (0, 10**5))
    bold = comm.split(0)
    assert bold is not None
    count = 20_000
    first, second = bold.empty(count), bold.empty(count)
    for turn in range(6):
        early = turn % bold.size == bold.rank
        first[...] = turn + bold.rank
        second[...] = 1
        bold.barrier()
        time.sleep(0 if early else 0.01)
        work = bold.all_reduce_async(first, out=first)
        bold.all_reduce(second, out=second)
        time.sleep(0.02 if early else 0)
        work.wait()
        assert (second == bold.size).all()
        assert (first == turn * bold.size + bold.size * (bold.size - 1) / 2).all()
    del first, second
    bold.close()


def test_a_work_that_the_thread_computes_is_waited_for(
    bold: Communicator, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no longer among those still to be computed, and not finished: REDUCED must not be raised beyond it."""
    reduce = window.reduce_in_place

    def slowly(*arguments: Any) -> None:
        if comm.rank == 0:
            time.sleep(0.1)
        reduce(*arguments)

    count = 20_000
    first, second = bold.empty(count), bold.empty(count)
    second[...] = 1
    for _ in range(2):
        bold.all_reduce(second, out=second)
    monkeypatch.setattr(window, "reduce_in_place", slowly)
    comm.use_progress_thread(True)
    try:
        for turn in range(3):
            first[...] = turn + bold.rank
            second[...] = 1
            bold.barrier()
            time.sleep(0 if bold.rank == 0 else 0.01)  # so rank 0 cannot compute its slice when it starts the work
            work = bold.all_reduce_async(first, out=first)
            time.sleep(0.03)  # the thread of rank 0 is at it
            bold.all_reduce(second, out=second)
            work.wait()
            assert (second == bold.size).all()
            assert (first == turn * bold.size + bold.size * (bold.size - 1) / 2).all()
    finally:
        comm.use_progress_thread(False)


def test_a_late_rank_is_waited_for(bold: Communicator) -> None:
    mine = bold.empty(10_000)
    for turn in range(4):
        mine[...] = 1
        if turn % bold.size == bold.rank:
            time.sleep(0.05)
        bold.all_reduce(mine, out=mine)
        assert (mine == bold.size).all()


def test_in_place_on_some_ranks_is_told(bold: Communicator) -> None:
    """Who swaps writes into the arrays of the others."""
    if bold.size == 1:
        pytest.skip("nobody to differ from")
    mine = bold.empty(100_000 * bold.size)
    mine[...] = 1
    out = np.empty_like(mine)
    for _ in range(3):
        bold.all_to_all(mine, out=mine)
        bold.all_to_all(mine, out=out)
    with pytest.raises(CollectiveMismatch, match=r"all_to_all.*algorithm window.*all_to_all.*algorithm window") as told:
        bold.all_to_all(mine, out=mine if bold.rank == 0 else out)
        bold.barrier()
    assert "window, in place" in str(told.value)


def test_another_collective_is_told(bold: Communicator) -> None:
    """Also when nothing is compared in advance: whoever meets sees that the other one does something else."""
    if bold.size == 1:
        pytest.skip("nobody to differ from")
    mine = bold.empty(10_000)
    for _ in range(3):
        mine[...] = 1
        bold.all_reduce(mine, out=mine)
        bold.reduce_scatter(mine)
    with pytest.raises(CollectiveMismatch, match=r"reduce_scatter.*all_reduce|all_reduce.*reduce_scatter"):
        if bold.rank == 0:
            bold.all_reduce(mine, out=mine)
        else:
            bold.reduce_scatter(mine)
        bold.barrier()
