"""Ranks that do different things are told so, both calls with their lines, before anything blocks; others go on.

Threads see at once what all of them say; without that they write letters, as ranks of several nodes do.
"""

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, desync, run_threads, threads
from dtrain.collectives.waiting import CHECKED, CollectiveMismatch, CollectiveTimeout

X = np.ones(100, np.float32)
Do = Callable[[Communicator], Any]


@pytest.fixture(autouse=True, params=["said", "letters"])
def letters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the ranks write letters."""
    if request.param == "letters":
        monkeypatch.setattr(threads.Transport, "say", None)
    return request.param == "letters"


def all_reduce(comm: Communicator) -> None:
    comm.all_reduce(X)


def all_but(rank: int, usual: Do, other: Do) -> Do:
    """One rank does another thing."""
    return lambda comm: (other if comm.rank == rank else usual)(comm)


def told(size: int, function: Do, *words: str) -> None:
    """The job ends with a report of these words, long before any limit, with two lines of this file."""
    began = time.monotonic()
    with pytest.raises(CollectiveMismatch) as caught:
        run_threads(size, function)
    assert time.monotonic() - began < 30
    text = str(caught.value)
    assert re.search(r"rank \d came to .*, rank \d to ", text)
    assert len(re.findall(r"test_desync\.py:\d+", text)) == 2, text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("usual", "other", "words"),
    [
        (all_reduce, lambda comm: comm.all_reduce(X[:99]), ["float32 (100,)", "float32 (99,)"]),
        (all_reduce, lambda comm: comm.all_reduce(X.astype("f8")), ["float32", "float64"]),
        (all_reduce, lambda comm: comm.all_reduce(X, op="max"), ["op=sum", "op=max"]),
        (all_reduce, lambda comm: comm.all_reduce(X, algorithm="exchange"), ["native", "exchange"]),
        (all_reduce, lambda comm: comm.all_gather(X), ["all_reduce #1", "all_gather #1"]),
        (all_reduce, lambda comm: comm.barrier(), ["all_reduce #1", "barrier #1"]),
        (lambda comm: comm.broadcast(X, 0), lambda comm: comm.broadcast(X, 1), ["root=0", "root=1"]),
        (lambda comm: comm.reduce(X, root=0), lambda comm: comm.reduce(X, root=1), ["root=0", "root=1"]),
        (lambda comm: comm.gather(X, 0), lambda comm: comm.gather(X, 1), ["root=0", "root=1"]),
        (
            all_reduce,
            lambda comm: comm.all_reduce_async(X[1:]).wait(),
            ["(native, started, float32 (99,)"],
        ),
        (all_reduce, lambda comm: comm.split(0), ["all_reduce #1", "split #1"]),
    ],
    ids=["count", "dtype", "op", "algorithm", "collective", "barrier", "root", "reduce", "gather", "started", "split"],
)
@pytest.mark.parametrize("size", [2, 3])
def test_another_call_on_one_rank(size: int, usual: Do, other: Do, words: list[str]) -> None:
    told(size, all_but(1, usual, other), *words)


def test_the_communicator_is_named() -> None:
    def function(comm: Communicator) -> None:
        part = comm.split(0, name="dp")
        assert part is not None
        all_but(1, all_reduce, lambda comm: comm.broadcast(X))(part)

    told(2, function, "op=sum, on dp) at", "broadcast #1 (native, float32 (100,), root=0, on dp) at")


def test_a_skipped_call() -> None:
    def function(comm: Communicator) -> None:
        if comm.rank != 2:
            comm.all_reduce(X)
        comm.broadcast(X)

    told(3, function, "all_reduce #1", "broadcast #1")


def test_swapped_order() -> None:
    def function(comm: Communicator) -> None:
        comm.all_reduce(X)
        for call in (comm.all_gather, comm.all_reduce)[:: 1 if comm.rank else -1]:
            call(X)

    told(4, function, "all_gather #2", "all_reduce #2")


def test_in_a_part_of_a_part() -> None:
    """Groups of the same ranks are told apart, and the ranks have their numbers in the group."""

    def function(comm: Communicator) -> None:
        first, second = comm.split(0), comm.split(comm.rank % 2)
        assert first is not None and second is not None
        third = second.split(0, key=-second.rank)
        assert third is not None
        for part in (first, second, third):
            part.all_reduce(X)
        third.all_reduce(X[comm.rank == 0 :])

    told(6, function, "all_reduce #2", "float32 (99,)")


def test_many_ranks_write_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desync, "FULL", 4)
    run_threads(9, lambda comm: [comm.all_reduce(X) for _ in range(3)])
    told(9, all_but(5, all_reduce, lambda comm: comm.barrier()), "all_reduce #1", "barrier #1")


@pytest.mark.parametrize("letters", ["letters"], indirect=True)  # else it is run_threads that has a time limit
def test_one_that_never_comes_is_named() -> None:
    def function(comm: Communicator) -> None:
        part = Communicator(comm.transport, 0.3, comm._progress)
        if comm.rank != 1:
            part.all_reduce(X)

    with pytest.raises(CollectiveTimeout, match=r"rank [02] of 3 waited 0 s for rank 1 in all_reduce #1 .*test_desync"):
        run_threads(3, function)


@pytest.mark.parametrize("letters", ["letters"], indirect=True)
def test_one_that_leaves_without_its_line_is_told_by_its_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desync, "ANSWER", 0.2)

    def function(comm: Communicator) -> None:
        if comm.rank == 1:
            assert comm._progress.letters is not None
            comm._progress.letters.send([0], "world#1", "broadcast native float32 0 100")
        else:
            comm.all_reduce(X)

    with pytest.raises(
        CollectiveMismatch, match=r"rank 0 came to all_reduce #1 .*, rank 1 to broadcast native float32 0 100"
    ):
        run_threads(2, function)


def test_one_that_is_slow_is_let_be() -> None:
    def function(comm: Communicator) -> None:
        part = Communicator(comm.transport, 20.0, comm._progress)
        time.sleep(0.3 * comm.rank)
        part.all_reduce(X)

    run_threads(3, function)


@pytest.mark.parametrize("debug", [False, True])
def test_only_the_first_are_compared_unless_asked(debug: bool, letters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_DEBUG", "1" if debug else "0")

    def function(comm: Communicator) -> int:
        for _ in range(CHECKED + 10):
            comm.barrier()
        sent = 0

        def count(*words: Any) -> None:
            nonlocal sent
            sent += 1

        assert comm._progress.letters is not None and comm._desync is not None
        if letters:
            comm._progress.letters.post.send = count
        else:
            comm._desync._say = count
        if not debug:
            comm.barrier()
        return sent

    assert run_threads(2, function) == [0, 0]
    if debug:

        def late(comm: Communicator) -> None:
            for _ in range(CHECKED + 1):
                comm.barrier()
            all_but(1, all_reduce, lambda comm: comm.barrier())(comm)

        told(2, late, f"barrier #{CHECKED + 2}")


def test_a_wrong_switch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_DEBUG", "yes")
    with pytest.raises(ValueError, match="DTRAIN_DEBUG='yes': allowed: 0, 1"):
        run_threads(2, all_reduce)
