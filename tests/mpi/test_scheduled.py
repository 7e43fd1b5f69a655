"""Schedules between processes, beside the collectives of the MPI library: `mpirun -n P python -m pytest`, any P."""

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.schedules import ALGORITHMS, schedule
from dtrain.collectives.schedules.interpreter import interpret
from dtrain.collectives.waiting import CollectiveMismatch

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows if collective != "barrier"]
COUNTS = (0, 1, 7, 1000, 100_003)


def native(comm: Communicator, collective: str, x: np.ndarray, root: int) -> np.ndarray | None:
    """The MPI library's own answer."""
    if collective == "reduce_scatter":
        total = comm.all_reduce(x, algorithm="native" if comm.size > 1 else "auto")
        return np.array_split(total, comm.size)[comm.rank]
    method = getattr(comm, collective)
    rooted = {"root": root} if collective in ("broadcast", "reduce", "gather", "scatter") else {}
    return method(x, algorithm="native" if comm.size > 1 else "auto", **rooted)


def ours(comm: Communicator, collective: str, x: np.ndarray, root: int, algorithm: str) -> np.ndarray | None:
    rooted = {"root": root} if collective in ("broadcast", "reduce", "gather", "scatter") else {}
    return getattr(comm, collective)(x, algorithm=algorithm, **rooted)


@pytest.mark.parametrize("collective, name", ROWS)
def test_beside_the_mpi_library(comm: Communicator, collective: str, name: str) -> None:
    """Integers, so that sums are equal in any order."""
    if not ALGORITHMS[collective][name].sizes(comm.size):
        with pytest.raises(ValueError, match="not possible between so many ranks"):
            ours(comm, collective, np.zeros(3), 0, name)
        return
    for count in COUNTS:
        x = np.arange(count, dtype=np.int64) * (comm.rank + 1)
        for root in {0, comm.size - 1}:
            for _ in range(2):  # the second time by the plan of the first
                found, expected = ours(comm, collective, x, root, name), native(comm, collective, x, root)
                if expected is None:
                    assert found is None
                else:
                    assert found is not None and np.array_equal(found, expected), (count, root)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS["all_reduce"]])
def test_bits_of_the_interpreter_and_long_messages_in_pieces(
    comm: Communicator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = schedule("all_reduce", name, comm.size, **({"segments": 2} if "segments" in str(_keys(name)) else {}))
    text = name + (":segments=2" if "segments" in _keys(name) else "") + ":segment_bytes=4096"
    monkeypatch.setattr(type(comm.transport), "limit", 1000, raising=False)  # a segment is more than one MPI call
    for word in ("float32", "bfloat16", "float16", "complex128", "bool", "uint16"):
        dtype = np.dtype(getattr(ml_dtypes, word, word))
        rng = np.random.default_rng(5)
        inputs = [(rng.uniform(0, 3, 5003)).astype(dtype) for _ in range(comm.size)]
        for op in ("sum", "max") if dtype.kind != "c" else ("sum", "prod"):
            expected = interpret(plan, inputs, op)[comm.rank]
            found = comm.all_reduce(inputs[comm.rank], op, algorithm=text)
            assert found.tobytes() == expected.tobytes(), (word, op)


def _keys(name: str) -> dict[str, int]:
    return ALGORITHMS["all_reduce"][name].parameters


def test_uneven_blocks(comm: Communicator) -> None:
    counts = [(3 * rank) % 5 for rank in range(comm.size)]  # some have none
    x = np.full((counts[comm.rank], 2), comm.rank, np.float32)
    expected = np.repeat(np.arange(comm.size, dtype=np.float32), counts)
    for name, row in ALGORITHMS["all_gather"].items():
        if row.sizes(comm.size):
            assert comm.all_gather(x, counts=counts, algorithm=name)[:, 0].tolist() == expected.tolist(), name
    rows = [(comm.rank + 2 * other) % 4 for other in range(comm.size)]
    y = np.repeat(10 * comm.rank + np.arange(comm.size), rows)
    right = np.concatenate([np.full((r + 2 * comm.rank) % 4, 10 * r + comm.rank) for r in range(comm.size)])
    for name in ALGORITHMS["all_to_all"]:
        assert comm.all_to_all(y, counts=rows, algorithm=name).tolist() == right.tolist(), name
    whole = np.arange(sum(counts), dtype=np.int32)
    block = np.split(whole, np.cumsum(counts)[:-1])[comm.rank]
    for name in ALGORITHMS["reduce_scatter"]:
        assert comm.reduce_scatter(whole, counts=counts, algorithm=name).tolist() == (comm.size * block).tolist(), name


def test_messages_of_the_user_and_other_collectives_stay_apart(comm: Communicator) -> None:
    if comm.size == 1:
        return
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = np.arange(50_000.0) + comm.rank
    total = comm.size * np.arange(50_000.0) + sum(range(comm.size))
    received, buffer = np.empty(100_000), comm.empty(3000)
    for turn in range(5):
        sending = comm.send_async(np.full(100_000, float(turn + comm.rank)), right, tag=turn)
        receiving = comm.recv_async(received, left, tag=turn)
        buffer[...] = comm.rank
        work = comm.all_reduce_async(buffer, out=buffer)
        assert np.array_equal(comm.all_reduce(x, algorithm="ring"), total)
        assert np.array_equal(comm.all_reduce(x, algorithm="recursive_doubling"), total)
        comm.barrier("dissemination")
        assert np.all(receiving.wait() == turn + left)
        sending.wait()
        assert np.all(work.wait() == sum(range(comm.size)))


def test_a_root_may_run_ahead(comm: Communicator) -> None:
    """Nobody waits for anybody but root; 600 calls without a synchronisation, and no record is taken for another."""
    x = np.empty(4)
    for turn in range(600):
        x[...] = turn if comm.rank == 0 else -1
        assert comm.broadcast(x, algorithm="chain").tolist() == [turn] * 4
    assert comm.all_reduce(np.ones(1)).tolist() == [comm.size]


def test_what_differs_is_told(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    if part.node is None:
        return
    part.all_reduce(np.ones(4), algorithm="ring")
    with pytest.raises(CollectiveMismatch, match=r"the ranks do not do the same: rank \d+ came to"):
        part.all_reduce(np.ones(4), algorithm="ring" if part.rank == 0 else "tree")
        part.barrier()
    comm.barrier()


def test_splits_have_messages_of_their_own(comm: Communicator) -> None:
    for _ in range(20):
        part = comm.split(comm.rank % 2)
        assert part is not None
        assert part.all_reduce(np.ones(3), algorithm="ring").tolist() == [part.size] * 3
        part.close()


def test_several_started_at_once(comm: Communicator) -> None:
    """Schedules under way beside each other, waited for in another order, with blocking ones in between."""
    texts = [name for name in ALGORITHMS["all_reduce"] if name != "hierarchical"]
    arrays = [np.arange(3000.0) * (i + 1) + comm.rank for i in range(len(texts))]
    for _ in range(3):
        works = [comm.all_reduce_async(x, algorithm=text) for x, text in zip(arrays, texts, strict=True)]
        gathered = comm.all_gather_async(np.array([comm.rank]), algorithm="ring")
        to_root = comm.reduce_async(np.ones(5), root=comm.size - 1, algorithm="binomial")
        assert comm.all_reduce(np.ones(2), algorithm="ring").tolist() == [comm.size] * 2
        assert comm.all_reduce(np.ones(2)).tolist() == [comm.size] * 2
        for i in reversed(range(len(works))):
            expected = comm.size * np.arange(3000.0) * (i + 1) + sum(range(comm.size))
            assert np.array_equal(works[i].wait(), expected), texts[i]
        assert gathered.wait().tolist() == list(range(comm.size))
        assert to_root.wait().tolist() == ([comm.size] * 5 if comm.rank == comm.size - 1 else [])
    with pytest.raises(ValueError, match="not an algorithm"):
        (comm.all_reduce_async if comm.size > 1 else comm.all_reduce)(np.ones(3), algorithm="rings")
