"""What is counted equals the formulas, for every algorithm: bytes of this rank, or added up over the ranks."""

from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.counters import Counters, Volume

COUNT = 64 * 48 * 40  # divides by any tested number of ranks into slices of whole lines


@pytest.fixture
def part(comm: Communicator) -> Communicator:
    part = comm.split(0)
    assert part is not None
    return part


def even(comm: Communicator) -> None:
    if COUNT % (64 * comm.size):
        pytest.skip(f"{COUNT} elements do not divide over {comm.size} ranks")


def test_reductions_in_the_window(part: Communicator) -> None:
    even(part)
    if part.node is None:
        return
    p, n = part.size, COUNT * 4
    array = part.empty(COUNT)
    array[...] = 1
    part.all_reduce(array, out=array)
    assert part.last == ("all_reduce", "window", n)
    assert part.counters.volume("all_reduce", "window") == (2, n * (p - 1) // p, n * (p - 1) // p)
    part.all_reduce_async(array, out=array).wait()
    assert part.counters.volume("all_reduce", "window") == (4, 2 * n * (p - 1) // p, 2 * n * (p - 1) // p)
    part.reduce_scatter(array)
    assert part.counters.volume("reduce_scatter") == (2, 0, n * (p - 1) // p)
    part.all_reduce_shared(array)
    assert part.counters.volume("all_reduce_shared") == (2, 0, n * (p - 1) // p)
    root = p - 1
    part.reduce(array, root=root)
    assert part.counters.volume("reduce") == (2, 0, n * (p - 1) if part.rank == root else 0)
    part.counters.reset()
    part.reduce(array, root=root, out=array if part.rank == root else None)
    assert part.counters.volume("reduce") == (2, 0 if part.rank == root else n // p, n * (p - 1) // p)
    assert part.counters.calls("reduce") == part.counters.calls("reduce", "window") == 1


def test_movement_in_the_window(part: Communicator) -> None:
    even(part)
    if part.node is None:
        return
    p, n, root = part.size, COUNT * 4, 0
    array, whole = part.empty(COUNT), part.empty(COUNT * p)
    array[...], whole[...] = 1, 1
    away = part.rank != root
    calls: list[tuple[str, Any, Volume]] = [
        ("all_gather", lambda: part.all_gather(array), Volume(2, 0, (p - 1) * n)),
        ("all_gather", lambda: part.all_gather_async(array, out=whole).wait(), Volume(2, 0, (p - 1) * n)),
        ("all_to_all", lambda: part.all_to_all(array), Volume(2, 0, n * (p - 1) // p)),
        (
            "all_to_all",
            lambda: part.all_to_all(array, out=array),
            Volume(2, n * (p - 1) // p // 2, n * (p - 1) // p // 2),
        ),
        ("broadcast", lambda: part.broadcast(array, root, out=array), Volume(2, 0, n * away)),
        ("broadcast", lambda: part.broadcast_async(array, root, out=array).wait(), Volume(2, 0, n * away)),
        ("gather", lambda: part.gather(array, root), Volume(2, 0, 0 if away else (p - 1) * n)),
        ("gather", lambda: part.gather(array, root, out=None if away else whole), Volume(2, n * away, 0)),
        ("scatter", lambda: part.scatter(None if away else array, root), Volume(2, 0, n // p * away)),
    ]
    for name, call, volume in calls:
        part.counters.reset()
        call()
        assert part.counters.volume(name, "window") == volume, name
        assert part.counters.calls(name) == 1


@pytest.mark.parametrize("algorithm", ["staged", "native", "exchange"])
def test_elsewhere(part: Communicator, algorithm: str) -> None:
    """Sent and received by all ranks together; staging counts what each rank puts there once."""
    even(part)
    if part.node is None:
        return
    p = part.size
    array = np.ones(960 * 16, np.float32)  # one chunk of the staging
    n = array.nbytes
    count = part.counters

    def totals() -> list[int]:
        """Sent and received by all ranks since the last time; counted calls of the asking included in neither."""
        found = count.volume()[1:]
        result: list[int] = part.all_reduce(np.array(found)).tolist()
        count.reset()
        return result

    count.reset()
    part.all_reduce(array, algorithm=algorithm)
    assert part.last is not None and part.last == ("all_reduce", algorithm, n)
    ring = 2 * (p - 1) * n
    sent = {"staged": p * n, "native": ring, "exchange": ring}[algorithm]
    assert totals() == [sent, ring]
    part.reduce_scatter(array, algorithm=algorithm)
    sent = {"staged": p * n, "native": (p - 1) * n, "exchange": (p - 1) * n}[algorithm]
    assert totals() == [sent, (p - 1) * n]
    root = p - 1
    part.reduce(array, root=root, algorithm=algorithm)
    found = totals()
    if algorithm == "native":
        assert found == [
            (p - 1) * n,
            n,
        ]  # a chain: each but the last passes it on; only root counts the sum as received
    if algorithm == "exchange":
        assert found == [(p - 1) * n + (p - 1) * n // p] * 2
    if algorithm == "exchange":
        return
    block = array[: len(array) // p]
    part.all_gather(block, algorithm=algorithm)
    assert totals() == [n if algorithm == "staged" else (p - 1) * n, (p - 1) * n]
    part.broadcast(array, root, algorithm=algorithm)
    assert totals() == [n, (p - 1) * n]
    part.gather(block, root, algorithm=algorithm)
    assert totals() == [n if algorithm == "staged" else n - n // p, n - n // p]
    part.all_to_all(array, algorithm=algorithm)
    assert totals() == [p * n if algorithm == "staged" else (p - 1) * n, (p - 1) * n]


def test_messages_and_small_ones(part: Communicator) -> None:
    if part.size == 1:
        part.all_reduce(np.ones(3))
        assert part.counters.volume() == (0, 0, 0) and part.counters.calls("all_reduce", "copy") == 1
        return
    right, left = (part.rank + 1) % part.size, (part.rank - 1) % part.size
    part.sendrecv(np.ones(7), right, np.empty(7), left)
    assert part.counters.volume("send") == (1, 56, 0) and part.counters.volume("recv") == (1, 0, 56)
    for _ in range(3):
        part.all_reduce(np.ones(10))
    assert part.counters.calls("all_reduce") == 3
    if part.node is not None:
        assert part.counters.volume("all_reduce", "staged") == (3, 240, 240 * (part.size - 1))
    rows = part.counters.rows()
    assert [row["collective"] for row in rows] == sorted(str(row["collective"]) for row in rows)
    line = f"{'send':<17}{'message':<22}{1:>9}{1:>9}{56:>16}{0:>16}"
    assert line in part.counters.table()
    part.counters.reset()
    assert part.counters.rows() == [] and part.last is not None


def test_groups_count_for_themselves(comm: Communicator) -> None:
    part = comm.split(comm.rank % 2)
    assert part is not None
    before = comm.counters.rows()
    part.all_reduce(np.ones(3))
    assert comm.counters.rows() == before and part.counters.calls("all_reduce") == 1


def test_calls_one_by_one_and_prepared_add_up() -> None:
    counters, volume = Counters(), Volume(1, 2, 3)
    tally = counters.tally("all_reduce", "window", 4, volume)
    for _ in range(20):
        counters.add("all_reduce", "window", 4, volume)
        tally.calls += 1
    assert counters.volume() == (40, 80, 120) and counters.calls("all_reduce") == 40
    tally.calls += 1
    assert counters.volume() == (41, 82, 123)
    counters.forget()
    assert counters.volume() == (41, 82, 123)


def test_a_purpose_is_counted_apart(part: Communicator) -> None:
    """Also by communicators split before and within, and gone with an error as without."""
    early = part.split(0)
    assert early is not None
    with pytest.raises(KeyError), part.counters.purpose("loss"):
        late = part.split(0)
        assert late is not None
        for each in (part, early, late):
            each.all_reduce(np.ones(3))
        with part.counters.purpose("other"):
            late.barrier()
        raise KeyError
    for each in (part, early, late):
        each.all_reduce(np.ones(3))
        assert each.counters.calls("all_reduce", purpose="loss") == each.counters.calls("all_reduce", purpose="") == 1
        assert each.counters.volume("all_reduce", purpose="loss") == each.counters.volume("all_reduce", purpose="")
        assert "other" not in {key.purpose for key in each.counters.totals()}
    assert [row["purpose"] for row in part.counters.rows() if row["collective"] == "all_reduce"] == ["", "loss"]
    assert early.name == f"{part.name}/0"
