"""What every rank did when, over a few steps: `dtrain run CONFIG log.trace=3`.

    trace of steps 3 to 5: runs/gpt-ddp/trace.json; open it in https://ui.perfetto.dev or chrome://tracing
                      mean of ranks       largest
      backward          31.26 ms  51.0%      37.36 ms  rank 3
      forward           14.39 ms  23.5%      15.05 ms  rank 3
      dp all_reduce     11.69 ms  19.1%      14.70 ms  rank 0
      ...
      computing 78.9% of 61.3 ms a step; rank 3 longest, 1.13 times the mean

A rank has two lines in the picture: what it computes, and above it the calls of communicators, by group and collective.
A call lasts as long as the rank is in it: its own work, and the wait for the others. What was started (`…_async`) and
moves on while the rank computes shows as a short start and as a wait, whose length is what was not hidden.

Stand-ins lie before the methods of this rank's trainer and communicators while the steps are recorded, and are taken
away afterwards: no other step pays anything. The first two steps of a start, which warm everything up, are left out.
Processes of one host share a clock; those of other hosts are set by barriers, to as much as a message takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives import Communicator, Work
from dtrain.mesh import Mesh
from dtrain.trainer import StepRecord, Trainer

WARM = 2  # steps of a start that are not recorded
TRIES = 15  # barriers that set the clocks
BLOCKING = (
    "all_reduce", "all_reduce_shared", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather",
    "scatter", "scan", "exscan", "barrier", "send", "recv", "sendrecv", "all_gather_object", "broadcast_object",
)  # fmt: skip
STARTING = tuple(
    f"{name}_async" for name in BLOCKING if hasattr(Communicator, f"{name}_async")
)  # they return a Work, whose wait is recorded too
PEERS = ("send", "recv", "sendrecv")


class Span(NamedTuple):
    """One thing that a rank did, in seconds of its `time.perf_counter`."""

    kind: str  # "step", "phase", "call"
    name: str
    start: float
    stop: float
    details: dict[str, Any]


class Trace:
    """Watches the steps of a trainer and tells about them. `watch` goes around `trainer.run()`, `told` comes last."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        """steps: how many are recorded; 0: none, and nothing is done."""
        self.trainer, self.steps = trainer, steps
        self.spans: list[Span] = []
        self.recorded: list[int] = []
        """Numbers of the steps."""
        self._put: list[tuple[Any, str]] = []
        self._inside = False

    def watch(self, records: Iterator[StepRecord]) -> Iterator[StepRecord]:
        """The records, as they come; those of the steps to record are made under the eyes of this object."""
        for number in count():
            if number == WARM and self.steps:
                self._begin()
            start = time.perf_counter()
            record = next(records, None)
            if record is None:
                break
            if self._put:
                self.spans.append(Span("step", f"step {record.step}", start, start + record.step_seconds, {}))
                self.recorded.append(record.step)
            if len(self.recorded) == self.steps:
                self._end()
            yield record
        self._end()

    # Recording

    def _begin(self) -> None:
        trainer = self.trainer
        for comm in trainer.mesh.communicators():
            for name in BLOCKING:
                self._before(comm, name, partial(self._call, comm, name))
            for name in STARTING:
                self._before(comm, name, partial(self._started, comm, name))
        self._phase(trainer, "total", "sum of the losses")
        self._phase(trainer, "validation", "validation")
        self._phase(trainer.optimizer, "step", "update")
        self._phase(trainer.model, "loss", "forward")
        self._before(trainer, "microbatches", self._data)
        self._before(trainer, "execute", self._execute)
        for strategy in trainer.strategies:
            self._phase(strategy, "reduce_gradients", f"gradients over {strategy.axis}")
            self._phase(strategy, "after_update", f"parameters over {strategy.axis}")
            if strategy.execute is not None:
                self._before(strategy, "execute", self._pipeline)

    def _end(self) -> None:
        for owner, name in self._put:
            delattr(owner, name)
        self._put.clear()

    def _before(self, owner: Any, name: str, stand_in: Callable[[Any], Any]) -> None:
        """Let `stand_in(method)` be called in place of the method."""
        if name not in vars(owner):  # what lies there already is another's stand-in
            setattr(owner, name, stand_in(getattr(owner, name)))
            self._put.append((owner, name))

    def _call(self, comm: Communicator, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            if self._inside:  # a part of a call that is recorded
                return method(*args, **keywords)
            self._inside, start = True, time.perf_counter()
            try:
                return method(*args, **keywords)
            finally:
                self._inside = False
                self._add(comm, name, start, args)

        return timed

    def _started(self, comm: Communicator, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            work = self._call(comm, name, method)(*args, **keywords)
            if not self._inside and isinstance(work, Work):
                what = f"wait for {name.removesuffix('_async')}"
                setattr(work, "wait", self._call(comm, what, work.wait))  # noqa: B010 - mypy knows it as a method
            return work

        return timed

    def _add(self, comm: Communicator, name: str, start: float, args: tuple[Any, ...]) -> None:
        stop, details = time.perf_counter(), dict[str, Any]()
        if name.removesuffix("_async") in PEERS:
            details = {"bytes": int(args[0].nbytes), "with": f"rank {args[1]} of {comm.name}"}
        elif comm.last is not None and not name.startswith("wait"):
            details = {"algorithm": comm.last.algorithm, "bytes": comm.last.nbytes}
        self.spans.append(Span("call", f"{comm.name} {name}", start, stop, details))

    def _phase(self, owner: Any, name: str, what: str) -> None:
        def stand_in(method: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **keywords: Any) -> Any:
                start = time.perf_counter()
                try:
                    return method(*args, **keywords)
                finally:
                    self.spans.append(Span("phase", what, start, time.perf_counter(), {}))

            return timed

        self._before(owner, name, stand_in)

    def _data(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def fetched() -> Iterator[Any]:
            start = time.perf_counter()
            found = list(method())
            self.spans.append(Span("phase", "data", start, time.perf_counter(), {}))
            yield from found

        return fetched

    def _execute(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """What follows the forward of a microbatch is its backward."""

        def timed(*args: Any) -> Any:
            before = len(self.spans)
            result = method(*args)
            forwards = [span for span in self.spans[before:] if span.name == "forward"]
            ends = [*(span.start for span in forwards[1:]), time.perf_counter()]
            for span, end in zip(forwards, ends, strict=True):
                self.spans.append(Span("phase", "backward", span.stop, end, {}))
            return result

        return timed

    def _pipeline(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The engine of a pipeline has its own record of what it did."""
        names = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}

        def timed(*args: Any) -> Any:
            result = method(*args)
            for span in getattr(getattr(method, "__self__", None), "engine").spans:  # noqa: B009 - any strategy's
                where = {"stage": span.action.stage, "microbatch": span.action.microbatch}
                self.spans.append(Span("phase", names[span.action.kind], span.start, span.stop, where))
            return result

        return timed

    # Telling

    def told(self) -> tuple[str, dict[str, Any], list[str]] | None:
        """(text of trace.json, what summary.json tells, lines for the log); None without a recorded step. Collective;
        complete on rank 0."""
        if not self.recorded:
            return None
        mesh = self.trainer.mesh
        offset = clock_offset(mesh.comm)
        rows = [[span.kind, span.name, span.start - offset, span.stop - offset, span.details] for span in self.spans]
        everyone = [[Span(*row) for row in rank] for rank in mesh.comm.all_gather_object(rows)]
        text = json.dumps({"traceEvents": list(events(everyone, mesh)), "displayTimeUnit": "ms"})
        tables = [seconds_of(spans) for spans in everyone]
        found = {
            "steps": self.recorded,
            "seconds": {name: [table.get(name, 0.0) for table in tables] for name in names_of(tables)},
            "computing": [sum(table[name] for name in table if name not in calls(spans))
                          for table, spans in zip(tables, everyone, strict=True)],
        }  # fmt: skip
        return text, found, list(lines(found))


def clock_offset(comm: Communicator) -> float:
    """What to take from this rank's perf_counter to have that of rank 0. Collective."""
    if len(set(comm.hosts)) == 1:
        return 0.0
    seen = np.empty(TRIES)
    for i in range(TRIES):
        comm.barrier()
        seen[i] = time.perf_counter()
    first = comm.broadcast(seen)
    here = comm.hosts.index(comm.hosts[comm.rank])  # the first of a host speaks for it
    offsets = comm.all_gather(np.array([np.median(seen - first)]))
    return 0.0 if comm.hosts[0] == comm.hosts[comm.rank] else float(offsets[here])


def events(everyone: list[list[Span]], mesh: Mesh) -> Iterator[dict[str, Any]]:
    """The spans of all ranks in the trace event format: a process per rank, a line for phases and one for calls."""
    begin = min(span.start for spans in everyone for span in spans)
    for rank, spans in enumerate(everyone):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank} {mesh.comm.hosts[rank]}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        for thread, name in enumerate(("communication", "computing")):
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}
        for span in spans:
            yield {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": rank,
                "tid": int(span.kind != "call"),
                "ts": round(1e6 * (span.start - begin), 3),
                "dur": round(1e6 * (span.stop - span.start), 3),
                "args": span.details,
            }


def calls(spans: list[Span]) -> set[str]:
    """The names of what waits for other ranks."""
    return {span.name for span in spans if span.kind == "call"}


def seconds_of(spans: list[Span]) -> dict[str, float]:
    """Seconds per step of one rank by name: phases without the calls in them, calls, and what is left, "other".

    The step, as its record tells, ends before the validation.
    """
    steps = [span for span in spans if span.kind == "step"]
    inside = [span for span in spans if span.kind != "step" and any(s.start <= span.start < s.stop for s in steps)]
    found: dict[str, float] = {}
    for span in inside:
        length = span.stop - span.start
        if span.kind == "phase":
            length -= sum(s.stop - s.start for s in inside if s.kind == "call" and span.start <= s.start < span.stop)
        found[span.name] = found.get(span.name, 0.0) + length / len(steps)
    rest = sum(span.stop - span.start for span in steps) / len(steps) - sum(found.values())
    return {**found, "other": max(0.0, rest)}


def names_of(tables: list[dict[str, float]]) -> list[str]:
    """All names, those that take longest first, "other" last."""
    sums: dict[str, float] = {}
    for table in tables:
        for name, seconds in table.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sorted(sums, key=lambda name: (name == "other", -sums[name]))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table of the docstring."""
    seconds = {name: np.array(values) for name, values in found["seconds"].items()}
    step = float(sum(values.mean() for values in seconds.values())) or 1.0
    width = max(map(len, seconds)) + 2
    yield f"  {'':<{width}}mean of ranks       largest"
    for name, values in seconds.items():
        mean, most = float(values.mean()), int(values.argmax())
        yield (
            f"  {name:<{width}}{1e3 * mean:>8.2f} ms {mean / step:>6.1%}   {1e3 * values[most]:>8.2f} ms  rank {most}"
        )
    computing = np.array(found["computing"])
    most = int(computing.argmax())
    yield f"  computing {computing.mean() / step:.1%} of {1e3 * step:.1f} ms a step" + (
        f"; rank {most} longest, {computing[most] / computing.mean():.2f} times the mean" if len(computing) > 1 else ""
    )
