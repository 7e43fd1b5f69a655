"""CuPy arrays in the collectives, on a CuPy and NCCL made of NumPy and threads (`tests/fake_cupy.py`).

The real ones are tried by `tests/gpu/test_device_collectives.py`, where there are GPUs.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.schedules import catalogue
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.schedule import Receive, Send, Step, custom
from tests.fake_cupy import on_gpus
from tests.oracle import bits, close, inputs, total

SIZES = [1, 2, 3, 4, 5, 8, 16]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(w) for w in ("f4", "f8", "f2", "i1", "u2", "i2", "i4", "u8", "?", "c8", "c16")] + [BFLOAT16]


def lengths(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1, 1025}) if size < 8 else [0, size - 1, 1025]


def near(actual: Any, expected: Any, size: int) -> None:
    """Small floats are rounded after every addition by NCCL."""
    if expected.dtype in (np.float16, BFLOAT16):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        step = 2.0**-8 if expected.dtype == BFLOAT16 else 2.0**-11
        np.testing.assert_allclose(actual.astype("f4"), expected.astype("f4"), atol=4 * size * step, rtol=size * step)
    else:
        close(actual, expected)


@pytest.mark.parametrize("size", SIZES)
def test_reductions(size: int, layout: str, cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        for dtype in DTYPES if size < 4 else (np.dtype("f4"), np.dtype("i2")):
            for count in lengths(size):
                arrays = inputs(size, count, dtype)
                mine = cupy.asarray(arrays[comm.rank])
                for op in ("sum", "max") if count > size else ("sum",):
                    expected = total(arrays, op)
                    result = comm.all_reduce(mine, op)
                    assert isinstance(result, cupy.ndarray)
                    near(cupy.asnumpy(result), expected, size)
                    assert bits(cupy.asnumpy(mine)) == bits(arrays[comm.rank]), "the input was changed"
                    blocks = np.array_split(expected, size)
                    near(cupy.asnumpy(comm.reduce_scatter(mine, op)), blocks[comm.rank], size)
                    at_root = comm.reduce(mine, op, root=size - 1)
                    assert (at_root is None) == (comm.rank != size - 1)
                    if at_root is not None:
                        near(cupy.asnumpy(at_root), expected, size)
                first, mine_too = comm.scan_async(mine), comm.exscan(mine, "max")
                near(cupy.asnumpy(first.wait()), total(arrays[: comm.rank + 1]), size)
                if comm.rank:
                    near(cupy.asnumpy(mine_too), total(arrays[: comm.rank], "max"), size)
                copy = mine.copy()
                assert comm.scan(copy, "min", out=copy) is copy
                near(cupy.asnumpy(copy), total(arrays[: comm.rank + 1], "min"), size)
                copy = mine.copy()
                assert comm.all_reduce(copy, out=copy) is copy
                near(cupy.asnumpy(copy), total(arrays), size)

    on_gpus(size, run, layout=layout)


@pytest.mark.parametrize("size", SIZES)
def test_movement(size: int, layout: str, cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        for dtype in (np.dtype("f4"), np.dtype("c16"), BFLOAT16)[: 3 if size < 5 else 1]:
            for count in lengths(size):
                arrays = inputs(size, count, dtype)
                mine, whole = cupy.asarray(arrays[comm.rank]), np.concatenate(arrays)
                assert bits(cupy.asnumpy(comm.all_gather(mine))) == bits(whole)
                for root in {0, size - 1}:
                    assert bits(cupy.asnumpy(comm.broadcast(mine, root))) == bits(arrays[root])
                    gathered = comm.gather(mine, root)
                    assert (gathered is None) == (comm.rank != root)
                    if gathered is not None:
                        assert bits(cupy.asnumpy(gathered)) == bits(whole)
                    part = comm.scatter(mine if comm.rank == root else None, root)
                    assert isinstance(part, cupy.ndarray)
                    assert bits(cupy.asnumpy(part)) == bits(np.array_split(arrays[root], size)[comm.rank])
                came = np.concatenate([np.array_split(array, size)[comm.rank] for array in arrays])
                assert bits(cupy.asnumpy(comm.all_to_all(mine))) == bits(came)

    on_gpus(size, run, layout=layout)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_uneven_and_layouts(size: int, layout: str, cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        rank, shift = comm.rank, sum(range(size))
        counts = [r % 3 * 2 for r in range(size)]
        rows = [np.full((count, 3), r, np.int16) for r, count in enumerate(counts)]
        whole = np.concatenate(rows)
        assert np.array_equal(cupy.asnumpy(comm.all_gather(cupy.asarray(rows[rank]), counts=counts)), whole)
        gathered = comm.gather(cupy.asarray(rows[rank]), counts=counts)
        assert gathered is None or np.array_equal(cupy.asnumpy(gathered), whole)
        part = comm.scatter(cupy.asarray(whole) if rank == 0 else None, counts=counts)
        assert np.array_equal(cupy.asnumpy(part), rows[rank])
        grid = cupy.asarray(whole + np.int16(rank))
        start = sum(counts[:rank])
        expected = (whole * size + shift)[start : start + counts[rank]]
        assert np.array_equal(cupy.asnumpy(comm.reduce_scatter(grid, counts=counts)), expected)
        # In place: my block of the input takes the result; my block of the result is the input.
        block = grid[start : start + counts[rank]]
        assert comm.reduce_scatter(grid, counts=counts, out=block) is block
        assert np.array_equal(cupy.asnumpy(block), expected)
        out = cupy.empty(whole.shape, np.int16)
        out[start : start + counts[rank]] = cupy.asarray(rows[rank])
        comm.all_gather(out[start : start + counts[rank]], out=out, counts=counts)
        assert np.array_equal(cupy.asnumpy(out), whole)
        sent = [(rank + 2 * other) % 4 for other in range(size)]
        message = np.concatenate([np.full((count, 2), 10 * rank + other) for other, count in enumerate(sent)])
        came = np.concatenate([np.full(((s + 2 * rank) % 4, 2), 10 * s + rank) for s in range(size)])
        assert np.array_equal(cupy.asnumpy(comm.all_to_all(cupy.asarray(message), counts=sent)), came)
        square = cupy.asarray(np.arange(2 * size) + 100 * rank)
        comm.all_to_all(square, out=square)
        mine = np.arange(2 * rank, 2 * rank + 2)
        assert np.array_equal(cupy.asnumpy(square), np.concatenate([mine + 100 * r for r in range(size)]))
        # Transposed, strided, 0-d, empty; results too; overlap that is not "the same memory".
        base = np.arange(24.0).reshape(4, 6)
        device = cupy.asarray(base + rank)
        for take in (lambda a: a[:, ::2], lambda a: a[::-1], lambda a: a[1, 1:2].reshape(()), lambda a: a[:0]):
            expected = take(base) * size + shift
            np.testing.assert_array_equal(cupy.asnumpy(comm.all_reduce(take(device))), expected)
            out = cupy.empty((*expected.shape, 2), float)[..., 0]
            assert comm.all_reduce(take(device), out=out) is out
            np.testing.assert_array_equal(cupy.asnumpy(out), expected)
            np.testing.assert_array_equal(cupy.asnumpy(comm.broadcast(take(device), size - 1)), take(base) + size - 1)
        turned = cupy.asarray((base + rank).T)
        assert not turned.flags.c_contiguous
        np.testing.assert_array_equal(cupy.asnumpy(comm.all_reduce(turned)), (base * size + shift).T)
        line = cupy.asarray(np.arange(100.0) + rank)
        comm.all_reduce(line[:90], out=line[10:])
        np.testing.assert_array_equal(cupy.asnumpy(line[10:]), np.arange(90.0) * size + shift)
        line = cupy.asarray(np.arange(100.0) + rank)
        comm.broadcast(line[:90], size - 1, out=line[10:])
        np.testing.assert_array_equal(cupy.asnumpy(line[10:]), np.arange(90.0) + size - 1)

    on_gpus(size, run, layout=layout)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_every_algorithm_of_the_catalogue(size: int, cupy: Any) -> None:
    """Over NCCL's messages; bfloat16 and float16 are added in float32 there, rounded once where few ranks add."""

    def run(comm: Communicator) -> None:
        for count in (1, size + 1, 1000):
            arrays = inputs(size, count, np.dtype("f8"))
            mine, whole = cupy.asarray(arrays[comm.rank]), np.concatenate(arrays)
            calls: dict[str, tuple[Callable[[str], Any], Any]] = {
                "all_reduce": (lambda name: comm.all_reduce(mine, algorithm=name), total(arrays)),  # noqa: B023
                "reduce_scatter": (
                    lambda name: comm.reduce_scatter(mine, algorithm=name),  # noqa: B023
                    np.array_split(total(arrays), size)[comm.rank],
                ),
                "all_gather": (lambda name: comm.all_gather(mine, algorithm=name), whole),  # noqa: B023
                "broadcast": (lambda name: comm.broadcast(mine, 1, algorithm=name), arrays[1]),  # noqa: B023
                "reduce": (
                    lambda name: comm.reduce(mine, root=1, algorithm=name),  # noqa: B023
                    total(arrays) if comm.rank == 1 else None,
                ),
                "gather": (
                    lambda name: comm.gather(mine, 1, algorithm=name),  # noqa: B023
                    whole if comm.rank == 1 else None,
                ),
                "all_to_all": (
                    lambda name: comm.all_to_all(mine, algorithm=name),  # noqa: B023
                    np.concatenate([np.array_split(array, size)[comm.rank] for array in arrays]),
                ),
            }
            for collective, (call, expected) in calls.items():
                for name, row in catalogue.ALGORITHMS[collective].items():
                    if not row.sizes(size):
                        continue
                    result = call(name)
                    assert comm.last is not None and comm.last[:2] == (collective, name)
                    if expected is None:
                        assert result is None
                    else:
                        close(cupy.asnumpy(result), expected)
        random = [array * 10.0**rank for rank, array in enumerate(inputs(size, 1000, np.dtype("f8")))]
        result = comm.all_reduce(cupy.asarray(random[comm.rank]), algorithm="direct")
        assert bits(cupy.asnumpy(result)) == bits(total(random)), "not the order of the ranks"
        comm.all_reduce(mine, algorithm="segmented_ring:segments=3")
        assert comm.last is not None and comm.last.algorithm == "segmented_ring:segments=3"
        halves = inputs(size, 1000, np.dtype("f2"))
        result = cupy.asnumpy(comm.all_reduce(cupy.asarray(halves[comm.rank]), algorithm="direct"))
        assert bits(result) == bits(total(halves))

    on_gpus(size, run)


def test_truth_values(cupy: Any) -> None:
    """NCCL knows bytes: a sum and a maximum are "or", a product and a minimum "and"."""
    ufuncs = {"sum": np.logical_or, "max": np.logical_or, "prod": np.logical_and, "min": np.logical_and}
    truths = np.array([[False, True, False, True], [False, False, True, True], [False, True, True, True]])

    def run(comm: Communicator) -> None:
        mine = cupy.asarray(truths[comm.rank])
        for op, ufunc in ufuncs.items():
            assert np.array_equal(cupy.asnumpy(comm.all_reduce(mine, op, algorithm="nccl")), ufunc.reduce(truths)), op

    on_gpus(3, run)


def test_which_way_is_taken(cupy: Any) -> None:
    """NCCL's own where it has type and operation; a schedule for the rest; never one when the other was asked for."""

    def run(comm: Communicator) -> list[str]:
        taken = []
        cases = [("f4", "sum"), ("f2", "sum"), (BFLOAT16, "prod"), ("f4", "max"), ("c8", "sum"), ("c8", "prod")]
        for dtype, op in [*cases, ("i2", "sum"), ("u4", "min"), ("?", "sum")]:
            comm.all_reduce(cupy.asarray(np.ones(5, dtype)), op)
            assert comm.last is not None
            taken.append(comm.last.algorithm)
        nan = cupy.asarray(np.array([np.nan if comm.rank == 0 else 1.0, 2.0], "f4"))
        assert np.isnan(cupy.asnumpy(comm.all_reduce(nan, "max"))[0])
        with pytest.raises(ValueError, match=r"algorithm='nccl': not possible for max of float32 on 3 GPUs.*ring"):
            comm.all_reduce(nan, "max", algorithm="nccl")
        with pytest.raises(ValueError, match=r"algorithm='staged'.*auto, nccl, ring"):
            comm.all_reduce(nan, algorithm="staged")
        return taken

    ways = ["nccl", "nccl", "nccl", "ring", "nccl", "ring", "ring", "nccl", "nccl"]
    assert on_gpus(3, run) == [ways] * 3


def test_an_algorithm_of_the_user(cupy: Any) -> None:
    """Proven first: one that overwrites what it is sending is refused, and would be wrong on a GPU as well."""

    def swap(rank: int, size: int) -> Iterator[Step]:
        yield Step(sends=[Send(1 - rank, [0])], receives=[Receive(1 - rank, [0], reduce=True)])

    def overwrite(rank: int, size: int) -> Iterator[Step]:
        yield Step(sends=[Send(1 - rank, [0])], receives=[Receive(1 - rank, [0])])

    def run(comm: Communicator) -> Any:
        mine = cupy.asarray(np.arange(5.0) + comm.rank)
        with pytest.raises(ScheduleError, match="overwritten"):
            comm.all_reduce(mine, algorithm=custom(overwrite, parts=1))
        result = comm.all_reduce(mine, algorithm=custom(swap, parts=1))
        assert comm.last is not None and comm.last.algorithm == "swap"
        return cupy.asnumpy(result)

    for result in on_gpus(2, run):
        np.testing.assert_array_equal(result, 2 * np.arange(5.0) + 1)


def test_bfloat16_needs_a_recent_nccl(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.nccl, "get_version", lambda: 2804)

    def run(comm: Communicator) -> Any:
        comm.all_reduce(cupy.asarray(np.ones(5, BFLOAT16)))
        return comm.counters.calls("all_reduce", "ring")

    assert on_gpus(2, run) == [1, 1]


def test_why_not_nccl_is_said_once(
    cupy: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.collectives import device

    monkeypatch.setattr(device, "_said", set())
    array = np.ones(3)

    def run(comm: Communicator) -> None:
        for _ in range(2):
            comm.all_reduce(cupy.asarray(array))
        part = comm.split(0)
        assert part is not None
        part.all_reduce(cupy.asarray(array))

    on_gpus(2, run, layout="staged")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "host memory: ranks 0 and 1 share GPU 0000:00:00.0 of " in lines[0]
    monkeypatch.setattr(device, "_said", set())
    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    on_gpus(2, run)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "rank 0 has no NCCL (CuPy 13.0-fake)" in lines[0]


def test_refusals(layout: str, cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        array = cupy.asarray(np.zeros(6, np.float32))
        cases: list[tuple[Callable[[], Any], str]] = [
            (lambda: comm.all_reduce(array, "mean"), "op='mean'.*sum, prod, max, min"),
            (lambda: comm.all_reduce(array, out=cupy.empty(5, "f4")), r"out has shape \(5,\).*\(6,\)"),
            (lambda: comm.all_reduce(array, out=cupy.empty(6, "f8")), "out has dtype float64.*float32"),
            (lambda: comm.all_reduce(array, out=np.zeros(6, "f4")), "out is a numpy.ndarray; allowed: a CuPy array"),
            (lambda: comm.all_reduce(np.zeros(6, "f4"), out=array), "out is a .*allowed: a NumPy array"),
            (lambda: comm.all_reduce(array, algorithm="magic"), "algorithm='magic'.*auto"),
            (lambda: comm.broadcast(array, root=2), "root=2.*0 to 1"),
            (lambda: comm.reduce(array, root=-1), "root=-1"),
            (lambda: comm.reduce_scatter(array, counts=[6] * 3), "counts="),
            (lambda: comm.send(array, comm.rank), "this rank itself"),
        ]
        for call, pattern in cases:
            with pytest.raises(ValueError, match=pattern):
                call()
        like = comm.empty((2, 3), np.float16, like=array)
        assert isinstance(like, cupy.ndarray) and like.shape == (2, 3) and like.dtype == np.float16
        assert type(comm.empty(3, like=np.zeros(1))) is np.ndarray

    on_gpus(2, run, layout=layout)


def test_counters(cupy: Any) -> None:
    """NCCL's own count as an algorithm of least volume; a schedule counts its messages."""

    def run(comm: Communicator) -> list[dict[str, Any]]:
        array = cupy.asarray(np.ones(12, np.float32))
        comm.counters.reset()
        comm.all_reduce(array)
        comm.all_reduce(array, algorithm="ring")
        return comm.counters.rows()

    same = {"collective": "all_reduce", "calls": 1, "sent": 2 * 48 * 2 // 3, "received": 2 * 48 * 2 // 3}
    for rows in on_gpus(3, run):
        got = {row["algorithm"]: row for row in rows}
        assert got["nccl"].items() >= {**same, "steps": 1}.items()
        assert got["ring"].items() >= {**same, "steps": 4}.items()


def test_the_doctor_says_what_is_there(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses
    import importlib.util

    from dtrain.launch import doctor

    cupy.__spec__ = importlib.util.spec_from_loader("cupy", None)
    job = doctor.environment.job()
    monkeypatch.setattr(doctor.environment, "job", lambda: dataclasses.replace(job, local_size=2))
    assert [finding[0] for finding in doctor._gpus()] == ["ok", "ok"]
    assert [finding.text for finding in doctor._gpus()] == [
        "2 of Fake GPU, 80 GiB each, 2 ranks on this host",
        "2.19.3",
    ]
    monkeypatch.setattr(doctor.environment, "job", lambda: dataclasses.replace(job, local_size=4))
    gpus, library = doctor._gpus()
    assert gpus.level == library.level == "note" and "4 ranks of this host share them" in gpus.text
    assert "2.19.3, not used" in library.text
    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    assert "through host memory; pip install" in list(doctor._gpus())[1].text
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: False)
    assert "sees none" in next(doctor._gpus()).text


def test_numpy_alone_never_loads_it() -> None:
    program = (
        "import sys, numpy as np\nfrom dtrain.collectives import run_threads\n"
        "run_threads(2, lambda comm: comm.all_reduce(np.ones(3)))\n"
        "print([name for name in sys.modules if 'cupy' in name or name.endswith(('.nccl', '.device_schedules'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
