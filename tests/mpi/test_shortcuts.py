"""Short collectives that come again go a way of their own; it meets the general way, and gives the same bits."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator, flags, node, small
from dtrain.collectives.counters import Volume
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.staging import LONG, SHORT
from dtrain.collectives.waiting import CollectiveMismatch

DTYPES = ["float32", "float64", "int8", "bool", "complex64", "float16", ml_dtypes.bfloat16]


@pytest.fixture(params=["at once", "both"])
def part(comm: Communicator, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """All ranks, with counters of its own; no first collectives are compared, so that the second call has a form.

    In machine code, or on every second rank step by step in Python.
    """
    monkeypatch.setattr(node, "CHECKED", 0)
    if request.param == "both" and comm.rank % 2:
        monkeypatch.setattr(small, "machine_code", lambda: None)
    found = comm.split(0)
    assert found is not None
    yield found
    found.close()


def data(comm: Communicator, rank: int, turn: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([turn, rank]).integers(0, 4, shape)
    return noise.astype(dtype)


def calls(comm: Communicator) -> dict[str, Callable[[Any], Any]]:
    last = comm.size - 1
    return {
        "all_reduce": lambda array: comm.all_reduce(array),
        "reduce": lambda array: comm.reduce(array, root=last),
        "reduce_scatter": lambda array: comm.reduce_scatter(array),
        "all_gather": lambda array: comm.all_gather(array),
        "gather": lambda array: comm.gather(array, root=last),
        "all_to_all": lambda array: comm.all_to_all(array),
        "broadcast": lambda array: comm.broadcast(array, root=last),
    }


def expected(comm: Communicator, name: str, arrays: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any] | None:
    rank, size = comm.rank, comm.size
    if name in ("reduce", "gather") and rank != size - 1:
        return None
    if name in ("all_gather", "gather"):
        return np.concatenate(arrays)
    if name == "all_to_all":
        return np.concatenate([np.array_split(each, size)[rank] for each in arrays])
    if name == "broadcast":
        return arrays[-1]
    total = arrays[0] if len(arrays) == 1 else np.sum([each.astype(np.complex128) for each in arrays], 0)
    if arrays[0].dtype == bool:
        total = np.any(arrays, axis=0)
    if arrays[0].dtype.kind != "c":
        total = np.real(total)
    total = total.astype(arrays[0].dtype)
    return np.array_split(total, size)[rank] if name == "reduce_scatter" else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_again_and_again_with_new_data(part: Communicator, dtype: Any) -> None:
    """The ranks forget at different times, so those with a form meet those without."""
    for shape in ((part.size,), (2 * part.size, 3), (500 * part.size,)):
        for turn in range(6):
            if (turn + part.rank) % 3 == 0:
                part._forms.clear()
            arrays = [data(part, rank, turn, shape, dtype) for rank in range(part.size)]
            for name, call in calls(part).items():
                want = expected(part, name, arrays)
                result = call(arrays[part.rank])
                assert (result is None) == (want is None), name
                if want is not None:
                    np.testing.assert_array_equal(result, want, name)
                    assert result.dtype == arrays[0].dtype
            part.barrier()


def test_all_have_forms(part: Communicator) -> None:
    if part.node is None or not small.able(part.node):
        pytest.skip("no shared memory, or no machine code")
    array = np.ones(part.size, np.float32)
    for call in calls(part).values():
        call(array)
    part.barrier()
    assert len(part._forms) == len(calls(part)) + 1


def test_the_first_are_compared(comm: Communicator) -> None:
    """They go the general way; then all ranks have forms from the same call on, or those without meet those with."""
    part = comm.split(0)
    assert part is not None
    array = np.ones(part.size, np.float32)
    for turn in range(2 * node.CHECKED):
        array[...] = turn + part.rank
        assert part.all_reduce(array)[0] == part.size * turn + sum(range(part.size))
        if part.node is not None and part.size > 1:
            assert not part._forms or part.node.number >= node.CHECKED
    part.close()


@pytest.mark.parametrize("nbytes", [8, SHORT.nbytes, SHORT.nbytes + 8, 60_000])
def test_who_waits_for_nobody_runs_ahead(part: Communicator, nbytes: int) -> None:
    """As far as there are slots: what the others have not read yet is not written over."""
    last = part.size - 1
    for late in (0, last):
        many = 3 * SHORT.depth
        for turn in range(many):
            if part.rank == late and turn in (1, LONG.depth, SHORT.depth + 1):
                time.sleep(0.02)
            array = np.full(nbytes // 8, turn + part.rank, np.float64)
            assert (part.broadcast(array, root=last) == turn + last).all()
            whole = part.gather(array[: nbytes // 8 // part.size], root=0)
            if part.rank == 0:
                assert whole is not None
                assert (whole.reshape(part.size, -1) == turn + np.arange(part.size)[:, None]).all()
        part.barrier()


def test_scatters_of_one_letter(part: Communicator) -> None:
    """Root, form and length change; what is too long for a letter goes between; nobody waits for the others."""
    for turn in range(60):
        root = turn // 7 % part.size
        rows, width = [(part.size, 1), (3 * part.size - 1, 2), (1000 // part.size * part.size, 1), (2000, 1)][turn % 4]
        dtype = np.float32 if turn % 5 else np.int32
        whole = np.arange(rows * width, dtype=dtype).reshape(rows, width) + dtype(turn)
        expected = np.array_split(whole, part.size)[part.rank]
        out = [None, np.empty_like(expected), np.empty((len(expected), 2 * width), dtype)[:, ::2]][turn % 3]
        mine = part.scatter(whole if part.rank == root else None, root, out)
        assert out is None or mine is out
        np.testing.assert_array_equal(mine, expected)
        if turn % 10 == part.rank:
            time.sleep(0.002)
        if part.node is not None and small.able(part.node) and part.rank != root and turn % 4 < 3:
            before = part._forms.get(("scatter", root))
            part.scatter(None, root, np.empty_like(expected))
            assert before is not None and part._forms["scatter", root] is before, "the form that came last"
        elif part.rank == root and part.node is not None and small.able(part.node) and turn % 4 < 3:
            part.scatter(whole, root)


def test_a_dtype_that_is_made_anew(part: Communicator) -> None:
    """Equal, not the same object; and sources that are read-only."""
    for turn in range(4):
        fields = np.dtype([("name", "S3"), ("number", "<i4")])
        array = np.zeros(2, fields)
        array["number"] = part.rank, turn
        array.flags.writeable = False
        result = part.all_gather(array, out=np.empty(2 * part.size, np.dtype(fields.descr)))
        assert result["number"].tolist() == [number for rank in range(part.size) for number in (rank, turn)]


def test_short_calls_while_works_are_under_way(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are records, which tell where the data of a work lies; and none waits for so long that
    Python sees to the works.
    """
    monkeypatch.setattr(node, "CHECKED", 0)
    monkeypatch.setattr(flags, "SHORT_TRIES", (10**7, 0))  # a fifth of a second
    monkeypatch.setattr(flags, "CROWDED_TRIES", (0, 10**5))
    part = comm.split(0)
    assert part is not None
    array, mine = np.ones(3), part.empty(20_000)
    for _ in range(2):
        part.all_reduce(array)
    for turn in range(2 * part.size):
        mine[...] = turn + part.rank
        time.sleep(0.005 * (turn % part.size == part.rank))
        work = part.all_gather_async(mine)
        for _ in range(300):
            assert part.all_reduce(array)[0] == part.size
        whole = work.wait().reshape(part.size, -1)
        assert (whole == turn + np.arange(part.size)[:, None]).all()
    del mine
    part.close()


@pytest.mark.parametrize("how", ["form", "general"])
def test_another_collective_is_told(part: Communicator, how: str) -> None:
    if part.node is None or part.size == 1:
        pytest.skip("nobody to differ from")
    array = np.ones(part.size, np.float32)
    for _ in range(3):
        part.all_reduce(array)
        part.all_gather(array)
    if how == "general" and part.rank == 0:
        part._forms.clear()
    with pytest.raises(CollectiveMismatch, match=r"all_reduce.*all_gather|all_gather.*all_reduce"):
        part.all_reduce(array) if part.rank == 0 else part.all_gather(array)
        part.barrier()


def test_uneven_blocks(part: Communicator) -> None:
    count = 3 * part.size - 1
    for turn in range(4):
        arrays = [data(part, rank, turn, (count,), "float32") for rank in range(part.size)]
        result = part.reduce_scatter(arrays[part.rank])
        np.testing.assert_array_equal(result, np.array_split(np.sum(arrays, 0), part.size)[part.rank])


def test_strides_overlaps_and_in_place(part: Communicator) -> None:
    size = part.size
    for turn in range(4):
        wide = [data(part, rank, turn, (2 * size, 2), "int64") for rank in range(size)]
        mine, total = wide[part.rank], np.sum(wide, 0)
        np.testing.assert_array_equal(part.all_reduce(mine[:, 1]), total[:, 1])
        shifted = np.concatenate([mine[:, 0], np.zeros(1, np.int64)])
        part.all_reduce(shifted[:-1], out=shifted[1:])
        np.testing.assert_array_equal(shifted[1:], total[:, 0])
        into = np.zeros((2 * size, 2), np.int64)
        part.all_reduce(mine[:, 0], out=into[:, 1])
        np.testing.assert_array_equal(into[:, 1], total[:, 0])
        assert not into[:, 0].any()
        inside = np.zeros(2 * size, np.int64)
        block = inside[2 * part.rank : 2 * part.rank + 2]
        block[...] = part.rank
        part.all_gather(block, out=inside)
        np.testing.assert_array_equal(inside, np.repeat(np.arange(size), 2))
        exchanged = np.arange(size) + size * part.rank
        part.all_to_all(exchanged, out=exchanged)
        np.testing.assert_array_equal(exchanged, np.arange(size) * size + part.rank)


def test_a_wrong_result_array_is_told(part: Communicator) -> None:
    array = np.ones(part.size, np.float32)
    for _ in range(3):
        part.all_reduce(array)
    for wrong in (np.ones(part.size + 1, np.float32), np.ones(part.size, np.float64), [1.0] * part.size):
        with pytest.raises(ValueError, match="allowed"):
            part.all_reduce(array, out=wrong)  # type: ignore[arg-type]


def test_infinity_without_a_warning(part: Communicator) -> None:
    """Warnings are errors in these tests."""
    huge = np.full(3, np.finfo(np.float32).max, np.float32)
    for _ in range(3):
        assert part.size == 1 or np.isinf(part.all_reduce(huge)).all()
        part.barrier()


def test_prepared_calls_are_counted(part: Communicator) -> None:
    array = np.ones(8, np.float64)
    part.all_reduce(array)
    part.counters.reset()
    for _ in range(5):
        part.all_reduce(array)
    with part.counters.purpose("loss"):
        part.all_reduce(array)
        part.all_reduce(array)
    part.all_reduce(array)
    assert part.last is not None and part.last.collective == "all_reduce" and part.last.nbytes == 64
    assert part.counters.calls("all_reduce", purpose="") == 6
    assert part.counters.calls("all_reduce", purpose="loss") == 2
    if part.node is not None and part.size > 1:
        assert part.counters.volume("all_reduce", "staged", "loss") == Volume(2, 128, 128 * (part.size - 1))
    part.counters.reset()
    assert part.counters.rows() == []


def test_a_table_makes_them_forget(part: Communicator) -> None:
    array = np.ones(8, np.float64)
    part.all_reduce(array)
    part.all_reduce(array)
    part.forget()
    assert not part._forms and part.counters.calls("all_reduce") == 2
    np.testing.assert_array_equal(part.all_reduce(array), array * part.size)


def test_addresses_in_the_window_are_not_enough(part: Communicator) -> None:
    """What lies where a known array lay may be strided, of another shape or read-only; its peers may lie elsewhere."""
    size, count = part.size, 30_000
    home, whole = part.empty((2 * count, 2)), part.empty((size * count, 2))
    own, strided = home[:count], home[::2]

    def gathered(array: Any, out: Any) -> None:
        home[...] = np.random.default_rng(part.rank).standard_normal(home.shape)
        whole[...] = -1
        want = part.all_gather(np.ascontiguousarray(array))
        assert part.all_gather(array, out=out) is out
        np.testing.assert_array_equal(out, want)

    for _ in range(4):
        gathered(own, whole)
    assert strided.shape == own.shape
    gathered(strided, whole)
    gathered(own, whole)
    with pytest.raises(ValueError, match="out has shape"):
        part.all_gather(own, out=whole[:-1])
    read_only = whole[:]
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        part.all_gather(own, out=read_only)
    gathered(own, whole)
    turned = whole.reshape(-1)[: 2 * count * size].reshape(2, -1).T
    assert turned.shape == whole.shape
    gathered(own, turned)
    gathered(own, whole)
    if part.node is not None and size > 1:
        assert len(part._places) == (machine_code() is not None)
        assert part.counters.calls("all_gather", "window") >= 6


def test_places_are_dropped_with_the_plans(part: Communicator) -> None:
    array = part.empty(part.size * 50_000)
    for turn in range(4):
        array[...] = part.rank + turn
        part.all_reduce(array, out=array)
        assert (array == part.size * turn + sum(range(part.size))).all()
    part.forget()
    assert not part._places and not part._forms
    array[...] = 1
    part.all_reduce(array, out=array)
    assert (array == part.size).all()
