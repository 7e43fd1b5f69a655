"""Movement straight out of the memory of the other processes: arrays from anywhere, of all kinds and lengths."""

import time
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, cross_memory
from dtrain.collectives.waiting import CHECKED, CollectiveMismatch
from tests.oracle import DTYPES, bits, inputs, join, lengths

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def able(comm: Communicator) -> None:
    """Only where one process may read from another."""
    if comm.node is None or not comm.node.reads:
        pytest.skip("no process may read the memory of another here, or there is one alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_length(comm: Communicator, dtype: np.dtype[Any]) -> None:
    for count in lengths(comm.size, dtype):
        arrays = inputs(comm.size, count, dtype)
        mine, root = arrays[comm.rank], count % comm.size
        blocks = [np.array_split(array, comm.size) for array in arrays]
        gathered, received = join(arrays), join([row[comm.rank] for row in blocks])
        for turn in range(3):  # from the second on prepared, with a source elsewhere
            mine = mine.copy()
            mine.flags.writeable = turn != 1
            assert bits(comm.all_gather(mine, algorithm="cma")) == bits(gathered)
            assert bits(comm.all_to_all(mine, algorithm="cma")) == bits(received)
            result = comm.gather(mine, root, algorithm="cma")
            assert bits(gathered) == bits(result) if result is not None else comm.rank != root
            source = mine if comm.rank == root else None
            assert bits(comm.scatter(source, root, algorithm="cma")) == bits(blocks[root][comm.rank])
            copy = mine.copy()
            assert comm.broadcast(copy, root, out=copy, algorithm="cma") is copy
            assert bits(copy) == bits(arrays[root])
            assert bits(mine) == bits(arrays[comm.rank]), "the source was changed"
    assert comm.last is not None and comm.last.algorithm == "cma"


def test_strides_and_one_memory(comm: Communicator) -> None:
    """What is not contiguous, and what is written where it is read."""
    count = 3000
    wide = np.arange(2 * count * comm.size).reshape(-1, 2) + comm.rank
    column = np.concatenate([np.arange(0, 2 * count * comm.size, 2) + rank for rank in range(comm.size)])
    mixed = np.concatenate([np.array_split(block, comm.size)[comm.rank] for block in np.split(column, comm.size)])
    whole = np.empty((len(column), 2), np.int64)
    for _ in range(2):
        assert np.array_equal(comm.all_gather(wide[:, 0], algorithm="cma"), column)
        assert np.array_equal(comm.all_gather(wide[:, 0], out=whole[:, 1], algorithm="cma"), column)
        assert np.array_equal(comm.all_to_all(wide[:, 0], algorithm="cma"), mixed)
        copy = wide[:, 0].copy()
        assert comm.all_to_all(copy, out=copy, algorithm="cma") is copy
        assert np.array_equal(copy, mixed)
        own = np.full(len(column), -1)
        block = own[len(copy) * comm.rank :][: len(copy)]
        block[...] = wide[:, 0]
        assert comm.all_gather(block, out=own, algorithm="cma") is own
        assert np.array_equal(own, column)


def test_uneven(comm: Communicator) -> None:
    """Counts that differ, none at all among them; rank s sends (s + 2 d) % 4 rows of value 10 s + d to rank d."""
    width = 1500
    counts = [(rank * 5 + 2) % 4 for rank in range(comm.size)]
    rows = [np.full((n, width), rank, np.int16) for rank, n in enumerate(counts)]
    for root in range(comm.size):
        assert np.array_equal(comm.all_gather(rows[comm.rank], counts=counts, algorithm="cma"), np.concatenate(rows))
        gathered = comm.gather(rows[comm.rank], root, counts=counts, algorithm="cma")
        assert gathered is None or np.array_equal(gathered, np.concatenate(rows))


@pytest.mark.parametrize("widths", [(1, 1), (1500, 1500), (1, 60_000), (60_000, 60_000)], ids=str)
@pytest.mark.parametrize("home", ["elsewhere", "window"])
def test_uneven_exchanges(comm: Communicator, widths: tuple[int, int], home: str) -> None:
    """Rank s sends (s + 2 d) % 4 times w numbers 10 s + d to rank d; w: widths[1] from the last rank, else widths[0].

    What is short lies in the staging, what is long stays where it is; both at once, too.
    """
    width = [widths[rank == comm.size - 1] for rank in range(comm.size)]
    sent = [(comm.rank + 2 * other) % 4 * width[comm.rank] for other in range(comm.size)]
    received = [(other + 2 * comm.rank) % 4 * width[other] for other in range(comm.size)]
    values = np.concatenate([np.full(n, 10 * comm.rank + d, np.int16) for d, n in enumerate(sent)])
    came = np.concatenate([np.full(n, 10 * s + comm.rank, np.int16) for s, n in enumerate(received)])
    room = comm.empty(max(widths) * 3 * comm.size, np.int16)[: len(values)]
    for turn in range(4):
        message = values.copy() if home == "elsewhere" else room
        message[...] = values + turn
        assert np.array_equal(comm.all_to_all(message, counts=sent, algorithm="cma"), came + turn)
        message[...] = values - turn
        result = comm.all_to_all(message, counts=sent, out_counts=received, algorithm="cma")
        message[...] = -1
        assert np.array_equal(result, came - turn)
    if home == "elsewhere":
        comm.all_to_all(message, counts=sent, out_counts=received)
        assert comm.last is not None and comm.last.algorithm == "cma", "they take this way by themselves"


def test_wrong_counts_are_told(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    with pytest.raises(CollectiveMismatch, match=r"has 8 bytes for rank \d+, which expects 12 \(out_counts\)"):
        part.all_to_all(
            np.zeros(2 * part.size, np.float32),
            counts=[2] * part.size,
            out_counts=[2] * (part.size - 1) + [3],
            algorithm="cma",
        )
    comm.barrier()


def test_changing_and_dropping_the_source_after_the_return_is_safe(comm: Communicator) -> None:
    """Over and over with ranks that come late: a race shows as a wrong value."""
    random = np.random.default_rng(comm.rank)
    count = 3001
    ranks = np.repeat(np.arange(comm.size), count)
    for turn in range(200):
        root = turn % comm.size
        if random.random() < 0.1:
            time.sleep(random.random() * 1e-3)
        source = np.full(count, comm.rank + turn)
        assert np.array_equal(comm.all_gather(source, algorithm="cma"), ranks + turn)
        source[...] = -comm.rank - turn
        comm.broadcast(source, root, out=source, algorithm="cma")
        assert np.all(source == -root - turn)
        whole = ranks + 10 * comm.rank + turn
        received = comm.all_to_all(whole, algorithm="cma")
        whole[...] = -1
        assert np.array_equal(received, ranks * 10 + comm.rank + turn)
        gathered = comm.gather(source, root, algorithm="cma")
        source[...] = 7
        assert gathered is None or np.all(gathered == -root - turn)


def test_what_cannot_be_read_is_told(comm: Communicator) -> None:
    """The peer, how many bytes, why, and what to do instead."""
    node = comm.node
    assert node is not None
    peer = node.processes[(comm.rank + 1) % comm.size]
    target = np.zeros(8, np.uint8)
    with pytest.raises(OSError, match=rf"8 bytes at 0x10 of process {peer}; without it: DTRAIN_CMA=off"):
        cross_memory.read(peer, 16, target.ctypes.data, 8)
    assert not cross_memory.reaches(peer, target.ctypes.data, -1), "another number than expected"


@pytest.mark.parametrize("settled", [False, True])
def test_a_read_that_fails_within_a_collective(comm: Communicator, settled: bool) -> None:
    """Step by step, and where the whole collective is one call of machine code."""
    part = comm.split(0)
    assert part is not None and part.node is not None
    for _ in range(CHECKED if settled else 0):
        part.barrier()
    sources = np.full(
        (4, 1000), comm.rank
    )  # none where the one before lay: what is known of that is not looked up again
    for source in sources[:3]:
        assert np.array_equal(part.all_gather(source, algorithm="cma"), np.repeat(np.arange(part.size), 1000))
    part.node.processes = [1 << 30] * part.size
    with pytest.raises(OSError, match=rf"No such process.*8000 bytes at 0x.* of process {1 << 30}; without it"):
        part.all_gather(sources[3], algorithm="cma")
    comm.barrier()


def test_blocks_that_change_places_on_some_ranks_only(comm: Communicator) -> None:
    """Nobody may read where another has overwritten it."""
    part = comm.split(0)
    assert part is not None
    array = np.ones(1000 * part.size)
    for _ in range(CHECKED):  # then no way that is begun step by step is left behind
        part.all_to_all(array, out=array, algorithm="cma")
        part.all_to_all(array, algorithm="cma")
    with pytest.raises(CollectiveMismatch, match=r"all_to_all .*algorithm cma.*all_to_all .*algorithm cma"):
        part.all_to_all(array, out=array if part.rank else None, algorithm="cma")
    comm.barrier()


def test_forbidden(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank suffices: then nobody does it, and what is asked for says so."""
    monkeypatch.setenv("DTRAIN_CMA", "off" if comm.rank == 0 else "on")
    part = comm.split(0)
    assert part is not None and part.node is not None and not part.node.reads
    array = np.arange(100_000) + comm.rank
    part.all_to_all(array[: 4 * comm.size], counts=[4] * comm.size)
    assert part.last is not None and part.last.algorithm == "native"
    with pytest.raises(ValueError, match="algorithm='cma': not possible"):
        part.all_gather(array, algorithm="cma")
    comm.barrier()
    part.close()
