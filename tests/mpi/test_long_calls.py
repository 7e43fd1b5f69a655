"""Long calls in the window that come again are one function of machine code, which knows arrays by their addresses."""

import gc
import time
from collections.abc import Callable

import numpy as np
import pytest

from dtrain.collectives import Communicator, node, places
from dtrain.collectives.waiting import CollectiveMismatch

COUNT = 40_000


def in_one(bold: Communicator) -> bool:
    """Whether there is such a function here."""
    code = node.machine_code()
    return bold.node is not None and bold.size > 1 and code is not None and code.window is not None


def rows(bold: Communicator, turn: int, count: int) -> np.ndarray:
    """What each rank brings: (size, count)."""
    draws = [np.random.default_rng([turn, rank]).standard_normal(count) for rank in range(bold.size)]
    return np.stack(draws).astype(np.float32)


def total(array: np.ndarray) -> np.ndarray:
    """The sum in rank order: (count,)."""
    found: np.ndarray = array[0].copy()
    for row in array[1:]:
        found += row
    return found


def test_every_collective(bold: Communicator) -> None:
    """Against NumPy, in turns, with the plans of Python taken away once they are known."""
    size, rank = bold.size, bold.rank
    mine, out, block = bold.empty(size * COUNT), bold.empty(size * COUNT), bold.empty(COUNT)
    own = slice(rank * COUNT, (rank + 1) * COUNT)
    for turn in range(6):
        brought = rows(bold, turn, size * COUNT)
        blocks = brought.reshape(size, size, COUNT)
        expected: list[tuple[Callable[[], np.ndarray], np.ndarray]] = [
            (lambda: bold.all_reduce_shared(mine), total(brought)),
            (lambda: bold.all_reduce(mine, out=mine), total(brought)),
            (lambda: bold.reduce_scatter(mine, out=block), total(brought)[own]),
            (lambda: bold.all_to_all(mine, out=out), blocks[:, rank].reshape(-1)),
            (lambda: bold.all_to_all(mine, out=mine), blocks[:, rank].reshape(-1)),
            (lambda: bold.all_gather(mine[own], out=out), np.concatenate([blocks[r, r] for r in range(size)])),
            (lambda: bold.broadcast(mine, root=size - 1, out=mine), brought[-1]),
        ]
        for call, result in expected:
            mine[...] = brought[rank]
            bold.barrier()
            assert call().tobytes() == result.tobytes()
        if turn == 4:
            bold._plans.clear()
    if in_one(bold):
        assert not bold._plans, "the last turn went by the plans of Python"
        assert bold.counters.calls("all_to_all", "window") == 12


def test_a_late_rank_is_waited_for(bold: Communicator) -> None:
    mine = bold.empty(COUNT)
    for turn in range(3 + bold.size):
        mine[...] = turn
        if turn >= 3 and turn - 3 == bold.rank:
            time.sleep(0.05)
        assert (bold.all_reduce_shared(mine) == turn * bold.size).all()
        bold.all_reduce(mine, out=mine)
        assert (mine == turn * bold.size).all()


def test_another_collective_is_told(bold: Communicator) -> None:
    if bold.size == 1:
        pytest.skip("nobody to differ from")
    mine = bold.empty(COUNT)
    for _ in range(4):
        mine[...] = 1
        bold.all_reduce(mine, out=mine)
        bold.all_reduce(mine, "max", out=mine)
    with pytest.raises(CollectiveMismatch, match=r"all_reduce.* sum,.*all_reduce.* max,|max,.*sum,"):
        bold.all_reduce(mine, "sum" if bold.rank == 0 else "max", out=mine)
        bold.barrier()


def test_a_work_under_way_is_finished_before(bold: Communicator) -> None:
    """A call with works before it goes step by step; it meets ranks that have none any more."""
    first, second = bold.empty(COUNT), bold.empty(COUNT)
    for turn in range(8):
        first[...], second[...] = turn + bold.rank, 1
        work = bold.all_reduce_async(first, out=first)
        if turn % bold.size == bold.rank:
            work.wait()
        bold.all_reduce(second, out=second)
        work.wait()
        assert (second == bold.size).all()
        assert (first == turn * bold.size + sum(range(bold.size))).all()
        bold.barrier()
    assert len(bold._places) <= 1


def test_more_places_than_there_is_room_for(bold: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FEW", 2)
    arrays = [bold.empty(COUNT) for _ in range(5)]
    for turn in range(4):
        for number, array in enumerate(arrays):
            array[...] = number + turn * bold.rank
            bold.all_reduce(array, out=array)
            assert (array == number * bold.size + turn * sum(range(bold.size))).all()
    if in_one(bold):
        (known,) = bold._places.values()
        assert len(known) == 5
        assert len(bold.counters._tallies) == 1, "calls that are counted alike have one tally"
        assert bold.counters.calls("all_reduce", "window") == 20


def test_a_shared_result_goes_with_its_array(bold: Communicator) -> None:
    """What comes to lie where an array lay that had one gets a result of its own; who holds the old one keeps it."""
    held, where = [], set()
    for turn in range(4):
        mine = bold.empty(COUNT)
        for _ in range(3):
            mine[...] = turn + 1
            result = bold.all_reduce_shared(mine)
            assert not result.flags.writeable and (result == (turn + 1) * bold.size).all()
        held.append(result)
        where.add(mine.ctypes.data)
        del mine, result
        gc.collect()
        if bold.node is not None:
            bold.node.arena._reuse()
    assert len(where) == 1 or bold.node is None, "no array came to lie where another one was"
    if in_one(bold):
        (known,) = bold._places.values()
        assert len(known) == 1, "the row of a dead array is taken by the next"
    assert [array[0] for array in held] == [bold.size * (turn + 1) for turn in range(4)]
    held.clear()


def test_a_result_is_not_the_source(bold: Communicator) -> None:
    """A call without `out` leaves the source as it was, also where the same array is known as its own target."""
    mine = bold.empty(COUNT)
    for _ in range(4):
        mine[...] = 1
        bold.all_reduce(mine, out=mine)
    mine[...] = 2
    for _ in range(3):
        assert (bold.all_reduce(mine) == 2 * bold.size).all()
        assert (mine == 2).all()
        bold.barrier()
