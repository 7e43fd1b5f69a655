"""Short collectives that come again go a way of their own; it meets the general way, and gives the same bits."""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.counters import Volume

DTYPES = ["float32", "float64", "int8", "bool", "complex64", "float16", ml_dtypes.bfloat16]


@pytest.fixture
def part(comm: Communicator) -> Iterator[Communicator]:
    """All ranks, with counters of its own."""
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
    total = arrays[0] if len(arrays) == 1 else np.sum([each.astype(np.complex128) for each in arrays], 0)
    if arrays[0].dtype == bool:
        total = np.any(arrays, axis=0)
    if arrays[0].dtype.kind != "c":
        total = np.real(total)
    total = total.astype(arrays[0].dtype)
    if name in ("reduce", "gather") and rank != size - 1:
        return None
    if name in ("all_reduce", "reduce"):
        return total
    if name == "reduce_scatter":
        return np.array_split(total, size)[rank]
    if name in ("all_gather", "gather"):
        return np.concatenate(arrays)
    if name == "all_to_all":
        return np.concatenate([np.array_split(each, size)[rank] for each in arrays])
    return arrays[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_again_and_again_with_new_data(part: Communicator, dtype: Any) -> None:
    """The ranks forget at different times, so those with a form meet those without."""
    for shape in ((part.size,), (2 * part.size, 3)):
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
        assert len(part._places) == 1
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
