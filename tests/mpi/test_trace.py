"""`log.trace`: what every rank did when; the recorded steps are as they would be without it."""

import json
from typing import Any

import numpy as np

from dtrain.collectives import Communicator
from dtrain.launch.trace import Span, Trace, lines, seconds_of
from tests import training


def test_recorded_steps_are_the_same_and_nothing_is_left_behind(comm: Communicator) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 6, "global_batch": 2 * comm.size, "micro_batch": 1, "validate": {"every": 4, "batches": 1}}
    }
    plain = [record.loss for record in training.trainer(comm, **sections).run()]
    trainer = training.trainer(comm, **sections)
    objects = [comm, *trainer.mesh.communicators(), trainer, trainer.optimizer, trainer.model, *trainer.strategies]
    before = [set(vars(each)) for each in objects]
    trace = Trace(trainer, 2)
    records = list(trace.watch(trainer.run()))
    assert [record.loss for record in records] == plain
    assert trace.recorded == [3, 4]
    for each, names in zip(objects, before, strict=True):
        assert "all_reduce" not in vars(each) and set(vars(each)) - names <= {"_deferred"}, each

    told = trace.told()
    assert told is not None
    text, found, table = told
    if comm.rank:
        return
    shown = json.loads(text)["traceEvents"]
    assert {event["pid"] for event in shown} == set(range(comm.size))
    for rank in range(comm.size):
        names = [event["name"] for event in shown if event["pid"] == rank and event["ph"] == "X"]
        assert names.count("backward") == 4 and names.count("forward") == 6  # two microbatches a step, two to validate
        assert names.count("update") == names.count("data") == 2 and names.count("validation") == 2
        assert [name for name in names if name.startswith("step")] == ["step 3", "step 4"]
        seconds = sum(values[rank] for values in found["seconds"].values())
        if rank == 0:
            np.testing.assert_allclose(seconds, np.mean([r.step_seconds for r in records[2:4]]), rtol=0.01)
    if comm.size > 1:
        assert any(name.endswith("all_reduce") for name in found["seconds"])
    assert "validation" not in found["seconds"]
    assert len(table) == 2 + len(found["seconds"]) and max(map(len, table)) <= 120


def test_no_steps_left_to_record(comm: Communicator) -> None:
    trainer = training.trainer(comm, train={"steps": 2, "global_batch": 24 * comm.size})
    trace = Trace(trainer, 3)
    assert len(list(trace.watch(trainer.run()))) == 2
    assert trace.told() is None


def test_a_call_within_a_phase_is_no_part_of_its_computing(comm: Communicator) -> None:
    """By hand: one step of 10 s; 2 s of its backward's 5 s are a call, which waits outside of it for 1 s more."""
    spans = [
        Span("step", "step 3", 100.0, 110.0, {}),
        Span("phase", "forward", 100.0, 103.0, {}),
        Span("phase", "backward", 103.0, 108.0, {}),
        Span("call", "dp all_reduce", 104.0, 106.0, {}),
        Span("call", "dp all_reduce", 108.0, 109.0, {}),
        Span("phase", "validation", 110.5, 111.0, {}),
        Span("call", "dp all_reduce", 110.6, 110.7, {}),
    ]
    assert seconds_of(spans) == {"forward": 3.0, "backward": 3.0, "dp all_reduce": 3.0, "other": 1.0}
    slow = {"seconds": {"forward": [1.0, 4.0], "dp all_reduce": [3.0, 0.0]}, "computing": [1.0, 4.0]}
    assert list(lines(slow))[-1] == "  computing 62.5% of 4000.0 ms a step; rank 1 longest, 1.60 times the mean"
