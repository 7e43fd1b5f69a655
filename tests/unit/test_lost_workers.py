"""Parameter servers that lose a worker, by a failure, a kill, or silence: the rest go on, or end with a report."""

from typing import Any

import pytest

from dtrain.collectives import run_threads
from dtrain.strategies.parameter_server import WorkersLost
from dtrain.strategies.parameter_server.messages import Kind
from tests import served
from tests.served import BASE, Gate


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_the_rest_go_on_when_a_worker_dies(mode):
    """Worker 1 fails in its second step; its samples are computed by others, and it waits for the end."""
    calls = []

    def prepare(worker):
        if worker.comm.rank == 1:
            execute = worker.execute

            def fail(microbatches: Any) -> Any:
                calls.append(worker.step)
                if len(calls) > 1:
                    raise MemoryError(
                        "no more " + "…" * 1000 + "\udcff"
                    )  # longer than what is sent of it, and no Unicode
                return execute(microbatches)

            worker.execute = fail

    sections = {**BASE, "parameter_server": {"servers": 2, "mode": mode, "staleness": 1}}
    results = run_threads(5, lambda comm: served.serve(comm, prepare, tells=True, **sections))
    book = results[3].lead.ledger
    assert book.version == 9 and book.workers[1].applied <= 1
    assert "MemoryError: no more" in book.workers[1].dead
    assert any("worker 1" in note and "lost" in note for note in results[3].notes)
    assert results[3].records[-1].validation_loss is not None


def killed_in(part: str) -> Any:
    """Worker 1 is gone: in its second forward, or in the middle of its first push, when one of two servers has it."""

    def prepare(worker):
        if worker.comm.rank != 1:
            return
        if part == "forward":
            execute, calls = worker.execute, []

            def fail(microbatches: Any) -> Any:
                calls.append(worker.step)
                if len(calls) > 1:
                    raise served.Killed
                return execute(microbatches)

            worker.execute = fail
        else:
            start, wait, pushing = worker.start_request, worker.wait, []

            def push(server: int, header: Any, body: Any) -> Any:
                pushing.extend([server] if header.kind == Kind.PUSH else [])
                return start(server, header, body)

            def end(works: Any, server: int, limit: float | None = None) -> None:
                if pushing and server == worker.lead:
                    raise served.Killed
                wait(works, server, limit)

            worker.start_request, worker.wait = push, end

    return prepare


@pytest.mark.parametrize("part", ["forward", "push"])
@pytest.mark.parametrize("options", [{"mode": "async"}, {"mode": "ssp"}, {"mode": "sync", "quorum": 0.6}], ids=str)
def test_the_rest_go_on_when_a_worker_is_gone(options, part):
    """No time limit has to pass (it is 60 s), and all updates are made."""
    section = {"servers": 2, "staleness": 1, "transport": "sockets", **options}
    prepare = killed_in(part)
    results = run_threads(5, lambda comm: served.serve(comm, prepare, **{**BASE, "parameter_server": section}))
    book = results[3].lead.ledger
    assert book.version == (3 if options["mode"] == "sync" else 9)
    assert len(results[3].records) == 3 and results[3].records[-1].validation_loss is not None
    assert any("worker 1 (rank 1 on " in note and "is lost: " in note for note in results[3].notes)
    assert "1" in results[3].lead.summary()["lost"]


@pytest.mark.parametrize("part", ["forward", "push"])
def test_synchronous_ends_with_a_report_when_a_worker_is_gone(part):
    section = {"servers": 2, "mode": "sync", "transport": "sockets"}
    prepare = killed_in(part)
    with pytest.raises(WorkersLost, match=r"worker 1 of 3: .*sync needs 3 of 3 workers, 2 are left"):
        run_threads(5, lambda comm: served.serve(comm, prepare, **{**BASE, "parameter_server": section}))


def test_the_rest_go_on_when_a_worker_falls_silent():
    """It hangs for longer than the time limit; when it comes back, it works on."""
    gate = Gate()

    def prepare(worker):
        if worker.comm.rank == 1:
            gate.hold(worker)

    def watch(lead):
        note = lead.note

        def heard(text: str) -> None:
            note(text)
            if "lost" in text:
                gate.open.set()

        lead.note = heard

    sections = {**BASE, "parameter_server": {"servers": 1, "mode": "async", "timeout": 0.3}}
    results = run_threads(3, lambda comm: served.serve(comm, prepare, watch=watch, **sections))
    assert any("no sign of life for 0.3 s" in note for note in results[2].notes)
    assert results[2].lead.ledger.version >= 6 and len(results[2].records) == 3


def test_synchronous_ends_with_a_report_when_a_worker_falls_silent():
    gate = Gate()

    def prepare(worker):
        if worker.comm.rank == 1:
            gate.hold(worker)

    def watch(lead):
        lose = lead.ledger.lose

        def lost(*arguments: Any) -> None:
            gate.open.set()  # so that the thread ends, too
            lose(*arguments)

        lead.ledger.lose = lost

    sections = {**BASE, "parameter_server": {"servers": 1, "mode": "sync", "timeout": 0.3}}
    with pytest.raises(WorkersLost, match=r"worker 1 of 2: no sign of life.*sync needs 2 of 2 workers, 1 are left"):
        run_threads(3, lambda comm: served.serve(comm, prepare, watch=watch, **sections))
