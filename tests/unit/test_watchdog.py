"""A rank that waits for long says for whom and in what: one of those who wait, once, and again after twice as long."""

import threading

import numpy as np
import pytest

from dtrain.collectives import Communicator, run_threads, threads, watchdog
from dtrain.collectives.watchdog import Warnings, Watchdog

X = np.ones(100, np.float32)


def ticks(warnings: Warnings, *waits: list[int]) -> list[int]:
    """The seconds of each wait after which it warned; it is asked every second."""
    return [second for wait in waits for second in [*wait, 0] if warnings.due(float(second))]


def test_once_per_wait_then_after_twice_as_long() -> None:
    assert ticks(Warnings(15.0, 0.0), [*range(1, 130)]) == [15, 30, 60, 120]
    assert ticks(Warnings(15.0, 4.0), [*range(1, 15)], [*range(1, 25)]) == [19]


def test_a_wait_that_came_to_an_end_makes_patient() -> None:
    warnings = Warnings(15.0, 0.0)
    assert ticks(warnings, [*range(1, 21)], [*range(1, 39)], [*range(1, 50)], [*range(1, 70)]) == [15, 40]
    assert ticks(Warnings(15.0, 0.0), [*range(1, 14)], [*range(1, 17)]) == [15]  # that was no warning: nothing changes


def test_who_has_heard_of_it_is_silent() -> None:
    first, second = Warnings(15.0, 0.0), Warnings(15.0, 2.0)
    told: list[tuple[int, int]] = []
    for second_of in range(1, 130):
        if first.due(float(second_of)):
            told.append((0, second_of))
            second.heard(float(second_of))
        if second.due(float(second_of)):
            told.append((1, second_of))
    assert told == [(0, 15), (0, 30), (0, 60), (0, 120)]


def test_it_is_told_who_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(threads._Post, "heard", True)
    monkeypatch.setattr(watchdog, "EVERY", 0.1)
    monkeypatch.setattr(watchdog, "PATIENCE", 0.5)
    monkeypatch.setattr(watchdog, "STAGGER", (5.0, 30.0))
    monkeypatch.setattr(watchdog, "ANSWER", 5.0)
    told = threading.Event()
    warn = Watchdog._warn
    monkeypatch.setattr(Watchdog, "_warn", lambda self, waited: (warn(self, waited), told.set()))

    def rank(comm: Communicator) -> None:
        part = comm.split(0, name="dp")
        assert part is not None and comm._progress.letters is not None
        dog = Watchdog(comm.transport, comm._progress.letters, 100.0, comm._progress.groups)
        dog.start()
        try:
            if comm.rank == 1:
                assert told.wait(30.0)
            part.all_reduce(X)
            comm.barrier()
        finally:
            dog.stop()

    run_threads(3, rank)
    lines = [line.removeprefix("dtrain: waiting: ") for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 3, lines
    assert lines[0].startswith("rank 0 of 3 has waited ") and lines[0].endswith("; 1 others too")
    assert "in all_reduce(float32 (100,), op=sum) on dp at tests/unit/test_watchdog.py:" in lines[0]
    assert lines[1].startswith("rank 1 now: in no collective, at ")
    assert "DTRAIN_TIMEOUT" in lines[2]


def test_communicators_come_and_go_while_they_are_looked_through() -> None:
    """The thread looks through them while the rank splits; those that are gone are left out."""

    def rank(comm: Communicator) -> None:
        progress = comm._progress
        before = len(progress.groups())
        for _ in progress.groups():
            part = comm.split(0)
        assert part is not None and part in progress.groups()
        assert len(progress.groups()) == before + 1, "those whose name was taken by the next are gone"
        part.close()

    run_threads(2, rank)
