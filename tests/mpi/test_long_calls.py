"""Long calls in the window that come again are one function of machine code, which knows arrays by their addresses."""

import gc
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dtrain.collectives import Communicator, node, places
from dtrain.collectives.waiting import CollectiveMismatch

COUNT = 40_000


@pytest.fixture
def part(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """All ranks; no first collectives are compared, so that the third call of a form is one of machine code."""
    monkeypatch.setattr(node, "CHECKED", 0)
    found = comm.split(0)
    assert found is not None
    yield found
    found.close()


def in_one(part: Communicator) -> bool:
    """Whether there is such a function here."""
    code = node.machine_code()
    return part.node is not None and part.size > 1 and code is not None and code.window is not None


def rows(part: Communicator, turn: int, count: int) -> np.ndarray:
    """What each rank brings: (size, count)."""
    draws = [np.random.default_rng([turn, rank]).standard_normal(count) for rank in range(part.size)]
    return np.stack(draws).astype(np.float32)


def total(array: np.ndarray) -> np.ndarray:
    """The sum in rank order: (count,)."""
    found: np.ndarray = array[0].copy()
    for row in array[1:]:
        found += row
    return found


def test_every_collective(part: Communicator) -> None:
    """Against NumPy, in turns, with the plans of Python taken away once they are known."""
    size, rank = part.size, part.rank
    mine, out, block = part.empty(size * COUNT), part.empty(size * COUNT), part.empty(COUNT)
    own = slice(rank * COUNT, (rank + 1) * COUNT)
    for turn in range(6):
        brought = rows(part, turn, size * COUNT)
        blocks = brought.reshape(size, size, COUNT)
        expected: list[tuple[Callable[[], np.ndarray], np.ndarray]] = [
            (lambda: part.all_reduce_shared(mine), total(brought)),
            (lambda: part.all_reduce(mine, out=mine), total(brought)),
            (lambda: part.reduce_scatter(mine, out=block), total(brought)[own]),
            (lambda: part.all_to_all(mine, out=out), blocks[:, rank].reshape(-1)),
            (lambda: part.all_to_all(mine, out=mine), blocks[:, rank].reshape(-1)),
            (lambda: part.all_gather(mine[own], out=out), np.concatenate([blocks[r, r] for r in range(size)])),
            (lambda: part.broadcast(mine, root=size - 1, out=mine), brought[-1]),
        ]
        for call, result in expected:
            mine[...] = brought[rank]
            part.barrier()
            assert call().tobytes() == result.tobytes()
        if turn == 4:
            part._plans.clear()
    if in_one(part):
        assert not part._plans, "the last turn went by the plans of Python"
        assert part.counters.calls("all_to_all", "window") == 12


def test_a_late_rank_is_waited_for(part: Communicator) -> None:
    mine = part.empty(COUNT)
    for turn in range(3 + part.size):
        mine[...] = turn
        if turn >= 3 and turn - 3 == part.rank:
            time.sleep(0.05)
        assert (part.all_reduce_shared(mine) == turn * part.size).all()
        part.all_reduce(mine, out=mine)
        assert (mine == turn * part.size).all()


def test_another_collective_is_told(part: Communicator) -> None:
    if part.size == 1:
        pytest.skip("nobody to differ from")
    mine = part.empty(COUNT)
    for _ in range(4):
        mine[...] = 1
        part.all_reduce(mine, out=mine)
        part.all_reduce(mine, "max", out=mine)
    with pytest.raises(CollectiveMismatch, match=r"all_reduce.* sum,.*all_reduce.* max,|max,.*sum,"):
        part.all_reduce(mine, "sum" if part.rank == 0 else "max", out=mine)
        part.barrier()


def test_a_work_under_way_is_finished_before(part: Communicator) -> None:
    """A call with works before it goes step by step; it meets ranks that have none any more."""
    first, second = part.empty(COUNT), part.empty(COUNT)
    for turn in range(8):
        first[...], second[...] = turn + part.rank, 1
        work = part.all_reduce_async(first, out=first)
        if turn % part.size == part.rank:
            work.wait()
        part.all_reduce(second, out=second)
        work.wait()
        assert (second == part.size).all()
        assert (first == turn * part.size + sum(range(part.size))).all()
        part.barrier()
    assert len(part._places) <= 1


def test_more_places_than_there_is_room_for(part: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FEW", 2)
    arrays = [part.empty(COUNT) for _ in range(5)]
    for turn in range(4):
        for number, array in enumerate(arrays):
            array[...] = number + turn * part.rank
            part.all_reduce(array, out=array)
            assert (array == number * part.size + turn * sum(range(part.size))).all()
    if in_one(part):
        (known,) = part._places.values()
        assert len(known) == 5
        assert len(part.counters._tallies) == 1, "calls that are counted alike have one tally"
        assert part.counters.calls("all_reduce", "window") == 20


def test_a_shared_result_goes_with_its_array(part: Communicator) -> None:
    """What comes to lie where an array lay that had one gets a result of its own; who holds the old one keeps it."""
    held, where = [], set()
    for turn in range(4):
        mine = part.empty(COUNT)
        for _ in range(3):
            mine[...] = turn + 1
            result = part.all_reduce_shared(mine)
            assert not result.flags.writeable and (result == (turn + 1) * part.size).all()
        held.append(result)
        where.add(mine.ctypes.data)
        del mine, result
        gc.collect()
        if part.node is not None:
            part.node.arena._reuse()
    assert len(where) == 1 or part.node is None, "no array came to lie where another one was"
    if in_one(part):
        (known,) = part._places.values()
        assert len(known) == 1, "the row of a dead array is taken by the next"
    assert [array[0] for array in held] == [part.size * (turn + 1) for turn in range(4)]
    held.clear()


def test_a_result_is_not_the_source(part: Communicator) -> None:
    """A call without `out` leaves the source as it was, also where the same array is known as its own target."""
    mine = part.empty(COUNT)
    for _ in range(4):
        mine[...] = 1
        part.all_reduce(mine, out=mine)
    mine[...] = 2
    for _ in range(3):
        assert (part.all_reduce(mine) == 2 * part.size).all()
        assert (mine == 2).all()
        part.barrier()
