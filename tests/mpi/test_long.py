"""Long collectives of arrays from elsewhere that come again: one call of machine code, which meets the general way."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, long, node
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.staging import LONG
from dtrain.collectives.waiting import CollectiveMismatch

Array = np.ndarray[Any, Any]
NAMES = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]
COUNTS = [60_000, LONG.nbytes // 2 + 40_000]  # elements of all ranks: one chunk in the staging, or several
_NOISE = np.random.default_rng(5).integers(0, 4, 1_000_000, np.int8)


@pytest.fixture(params=["at once", "both"])
def part(comm: Communicator, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """All ranks; no first collectives are compared. In machine code, or on every second rank the general way."""
    monkeypatch.setattr(node, "CHECKED", 0)
    if request.param == "both" and comm.rank % 2:
        monkeypatch.setattr(long, "able", lambda meetings: False)
    found = comm.split(0)
    assert found is not None
    yield found
    found.close()


def at_once(comm: Communicator, name: str) -> int:
    """Calls that were one of machine code, since the counters were last read."""
    return sum(tally.calls for key, longs in comm._longs.items() if key[0] == name for _, tally in longs)


def may_be_at_once(comm: Communicator, name: str, dtype: str) -> bool:
    """Whether such calls of this rank are: no sum that only NumPy knows."""
    code = machine_code()
    if comm.node is None or code is None or code.long is None or long.able.__module__ != long.__name__:
        return False
    return dtype.startswith("float") or name not in ("all_reduce", "reduce_scatter")


def data(rank: int, turn: int, shape: tuple[int, ...], dtype: Any) -> Array:
    begin = 977 * turn + 131 * rank
    return _NOISE[begin : begin + int(np.prod(shape))].astype(dtype).reshape(shape)


def expected(comm: Communicator, name: str, arrays: list[Array]) -> Array:
    if name in ("all_reduce", "reduce_scatter"):
        total = sum(arrays[1:], start=arrays[0]).astype(arrays[0].dtype)
        return total if name == "all_reduce" else np.array_split(total, comm.size)[comm.rank]
    if name == "all_gather":
        return np.concatenate(arrays)
    if name == "all_to_all":
        return np.concatenate([np.array_split(array, comm.size)[comm.rank] for array in arrays])
    return arrays[0]


@pytest.mark.parametrize(("count", "dtype"), [(COUNTS[0], "float32"), (COUNTS[0], "int32"), (COUNTS[1], "float32")])
@pytest.mark.parametrize("name", NAMES)
def test_new_data_elsewhere(part: Communicator, name: str, count: int, dtype: str) -> None:
    """Results new or given; the ranks forget at different times, and some come late."""
    shape = count // 3 // part.size * part.size, 3
    call, out, random = getattr(part, name), None, np.random.default_rng(part.rank)
    for turn in range(7):
        if turn == 2 + part.rank % 2:
            part._forms.clear()
            part._longs.clear()
        if random.random() < 0.3:
            time.sleep(random.random() * 2e-3)
        arrays = [data(rank, turn, shape, dtype) for rank in range(part.size)]
        right = expected(part, name, arrays)
        mine = arrays[part.rank] if turn % 2 else arrays[part.rank].copy()
        mine.flags.writeable = turn != 4 or name == "broadcast"
        result = call(mine, out=out if turn % 3 else None)
        assert turn % 3 == 0 or out is None or result is out
        assert result.dtype == mine.dtype and np.array_equal(result, right)
        assert name == "broadcast" or np.array_equal(mine, data(part.rank, turn, shape, dtype)), "changed"
        out = np.empty_like(result)
    assert at_once(part, name) >= 2 or not may_be_at_once(part, name, dtype)
    assert part.counters.calls(name) == 7


@pytest.mark.parametrize("count", COUNTS)
def test_in_place(part: Communicator, count: int) -> None:
    """Over the source, and around it or within it."""
    size, mine, rows = part.size, part.rank, count // part.size
    for turn in range(5):
        arrays = [data(rank, turn, (rows * size,), "float64") for rank in range(size)]
        blocks = [np.array_split(array, size) for array in arrays]
        whole = arrays[mine].copy()
        assert part.all_reduce(whole, out=whole) is whole
        assert np.array_equal(whole, sum(arrays))
        whole = arrays[mine].copy()
        assert part.all_to_all(whole, out=whole) is whole
        assert np.array_equal(whole, np.concatenate([row[mine] for row in blocks]))
        whole = arrays[mine].copy()
        assert part.broadcast(whole, root=size - 1, out=whole) is whole
        assert np.array_equal(whole, arrays[-1])
        whole = arrays[mine].copy()
        block = whole[mine * rows : (mine + 1) * rows]
        assert part.all_gather(block, out=whole) is whole
        assert np.array_equal(whole, np.concatenate([row[rank] for rank, row in enumerate(blocks)]))
        whole = arrays[mine].copy()
        block = whole[mine * rows : (mine + 1) * rows]
        assert part.reduce_scatter(whole, out=block) is block
        assert np.array_equal(block, sum(row[mine] for row in blocks))
    for name in NAMES:
        assert at_once(part, name) >= 3 or not may_be_at_once(part, name, "float64"), name


@pytest.mark.parametrize("shift", [1, 16, 63, 64, 4095])
def test_places_that_differ_by_some_bytes(part: Communicator, shift: int) -> None:
    """The target lies so many bytes after the source modulo a page, or before it: pieces go through a buffer."""
    size, count = part.size, 100_000
    rooms = [np.full(size * count + 3 * 4096, 9, np.int8) for _ in range(2)]
    skews = [-room.ctypes.data % 4096 for room in rooms]
    source = rooms[0][skews[0] :][: size * count]
    for begin in (skews[1] + shift, skews[1] + 4096 - shift):
        target = rooms[1][begin:][: size * count]
        for turn in range(3):
            arrays = [data(rank, turn, (size * count,), np.int8) for rank in range(size)]
            blocks = np.array([array.reshape(size, count) for array in arrays])
            source[...], target[...] = arrays[part.rank], 7
            assert part.all_to_all(source, out=target, algorithm="cma" if turn else "auto") is target
            assert np.array_equal(target.reshape(size, count), blocks[:, part.rank])
            array = (target if part.rank else source)[: count + turn]
            array[...] = part.rank + turn
            part.broadcast(array, out=array)
            assert np.all(array == turn)
        assert np.all(rooms[1][:begin] == 9) and np.all(rooms[1][begin + size * count :] == 9), "written beside it"
        rooms[1][...] = 9


@pytest.mark.parametrize("name", NAMES)
def test_other_arrays_of_the_same_shape(part: Communicator, name: str) -> None:
    """In the window, not contiguous, overlapping: they are told from those before, and go their own way."""
    count = 60_000 * part.size
    shape = (count // part.size if name == "all_gather" else count,)
    call = getattr(part, name)
    room = [part.empty((count,), np.float32) for _ in range(2)]
    wide, around = np.zeros((count, 2), np.float32), np.zeros(3 * count, np.float32)

    def check(turn: int, array: Array, out: Array | None = None) -> None:
        arrays = [data(rank, turn, shape, np.float32) for rank in range(part.size)]
        array[...] = arrays[part.rank]
        result = call(array, out=out)
        assert np.array_equal(result, expected(part, name, arrays)), turn
        assert out is None or result is out

    for turn in range(4):
        check(turn, np.empty(shape, np.float32))
    goal = expected(part, name, [np.zeros(shape, np.float32)] * part.size).shape
    for turn in range(3):
        check(10 + turn, room[0][: shape[0]], room[1][: goal[0]])
        assert part.node is None or (part.last is not None and part.last.algorithm.startswith("window"))
        check(20 + turn, wide[: shape[0], 0])
        check(30 + turn, np.empty(shape, np.float32), wide[: goal[0], 1])
        check(40 + turn, around[7 : 7 + shape[0]], around[5 : 5 + goal[0]])
        check(50 + turn, around[: shape[0]], around[shape[0] : shape[0] + goal[0]])
    with pytest.raises(ValueError, match="out has shape"):
        call(np.empty(shape, np.float32), out=np.empty((goal[0], 1), np.float32))


@pytest.mark.parametrize("count", [60_000, LONG.nbytes])
def test_sums_out_of_the_window(part: Communicator, count: int) -> None:
    """From one place there, of which others are told, to elsewhere: one chunk, or several."""
    rooms = [part.empty((count,), np.float32) for _ in range(3)]
    private, goal = np.empty(count, np.float32), np.empty(count, np.float32)

    def check(turn: int, array: Array, out: Array | None) -> None:
        arrays = [data(rank, turn, (count,), np.float32) for rank in range(part.size)]
        array[...] = arrays[part.rank]
        result = part.all_reduce(array, out=out)
        assert out is None or result is out
        assert np.array_equal(result, sum(arrays)), turn
        assert result is array or np.array_equal(array, arrays[part.rank]), "changed"

    for turn in range(5):
        check(turn, rooms[0], goal if turn % 2 else None)
        check(10 + turn, private, goal)
        assert part.node is None or (part.last is not None and part.last.algorithm == "staged")
        check(20 + turn, rooms[1], None)
        assert part.node is None or (part.last is not None and part.last.algorithm == "window_staged")
        check(30 + turn, rooms[1], rooms[2])
        check(40 + turn, rooms[1], rooms[1])
    assert at_once(part, "all_reduce") >= 12 or not may_be_at_once(part, "all_reduce", "float32")


def test_beside_started_works(part: Communicator) -> None:
    """What was started before and is not done: the next one does not speak for it."""
    if part.node is None:
        pytest.skip("no shared memory")
    first, second = (part.empty((100_000,), np.float32) for _ in range(2))
    for turn in range(6):
        first[...] = second[...] = part.rank + turn
        arrays = [data(rank, turn, (90_000,), np.float32) for rank in range(part.size)]
        with part.node.works._computing:  # nothing is computed in the background
            works = [part.all_reduce_async(array, out=array) for array in (first, second)]
            late = 0.01 * (turn % part.size == part.rank)  # then nothing is computed while it waits, either
            time.sleep(late)
            assert np.array_equal(part.all_reduce(arrays[part.rank]), sum(arrays))
            time.sleep(late)
            assert np.array_equal(part.all_gather(arrays[part.rank]), np.concatenate(arrays))
            time.sleep(late)
            total = part.size * (part.size - 1) // 2 + part.size * turn
            assert all(np.all(work.wait() == total) for work in works)


def test_a_slot_that_is_still_read(part: Communicator) -> None:
    """Root of broadcasts through the staging waits for nobody; what comes next must not overwrite them."""
    if part.node is None:
        pytest.skip("no shared memory")
    count = LONG.nbytes // 8
    for turn in range(8):
        arrays = [np.full(count, 10 * turn + rank, np.float64) for rank in range(part.size)]
        if part.rank:
            time.sleep(2e-3)
        for more in range(2):
            sent = arrays[0] + more if part.rank == 0 else np.empty(count)
            assert np.all(part.broadcast(sent, algorithm="staged") == 10 * turn + more)
        assert np.array_equal(part.all_reduce(-1 - arrays[part.rank]), -part.size - sum(arrays))


def test_ranks_that_differ_are_told(part: Communicator) -> None:
    if part.node is None:
        pytest.skip("no shared memory")
    for _ in range(3):
        part.all_reduce(np.ones(50_000, np.float32))
        part.all_reduce(np.ones(50_001, np.float32))
    with pytest.raises(CollectiveMismatch, match="all_reduce"):
        part.all_reduce(np.ones(50_000 + (part.rank == 0), np.float32))


def test_memory_that_cannot_be_read(part: Communicator) -> None:
    """The peer and why, where the way there was machine code."""
    if part.node is None or not part.node.reads:
        pytest.skip("no process may read the memory of another here")
    sources = np.full((7, 100_000 * part.size), part.rank, np.float64)
    for source in sources[:4]:
        assert np.array_equal(np.unique(part.all_to_all(source)), np.arange(part.size))
        swapped = source.copy()
        assert np.array_equal(np.unique(part.all_to_all(swapped, out=swapped)), np.arange(part.size))
    assert part.last is not None and part.last.algorithm == "cma"
    part.node.processes = [1 << 30] * part.size
    for out in (None, sources[5]):
        with pytest.raises(OSError, match=rf"No such process.*of process {1 << 30}; without it"):
            part.all_to_all(sources[4] if out is None else out, out=out)
    part.barrier()
