"""Run a schedule between GPUs: each step is one group of NCCL's messages, then the sums of what came.

    step   ┌ group: send c0 ─►, c1 ─►   recv ◄─ c2, c3 ┐   add in rank order   fold        (all on one stream)

What `schedules/executor.py` is for host memory, without segments: NCCL cuts messages itself. Needed where NCCL has no
reduction of its own, and to run any algorithm of the catalogue, or the user's, on GPUs. What is to be added arrives in
memory of its own; what replaces a place lands there, for the prover refuses schedules that still read it in this step.
Invariant: the order of every sum is that of the schedule; small floats are added in float32.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import accumulator, starts
from dtrain.collectives.schedules.schedule import Schedule, Step

Places = dict[int, Any]  # place -> its memory, a flat array


class Messenger(Protocol):
    """What is needed of a connection."""

    rank: int

    def exchange(self, sends: Sequence[tuple[int, Any]], receives: Sequence[tuple[int, Any]]) -> None: ...


def execute(
    messenger: Messenger,
    schedule: Schedule,
    source: Any,
    target: Any,
    counts: int | Sequence[int],
    ufunc: Any,
    empty: Callable[[Sequence[int], np.dtype[Any]], Any],
) -> Volume:
    """Target = this rank's wanted chunks, from source, its given ones; both flat, the same memory or disjoint.

    counts: see `Specification.lengths`. `empty(shape, dtype)` makes memory. Returns what it cost this rank.
    """
    spec, parts, rank = schedule.specification, schedule.parts, messenger.rank
    lengths = [int(length) for length in spec.lengths(counts)]
    steps = schedule.of(rank)
    wanted, given = list(spec.wanted(rank)), list(spec.given(rank))

    def lay(memory: Any, chunks: Sequence[int]) -> Places:
        sizes = [lengths[chunk % parts] for chunk in chunks]
        return {c: memory[s : s + n] for c, s, n in zip(chunks, starts(sizes), sizes, strict=True)}

    places = lay(target, wanted)
    rest = sorted({*given, *_touched(steps)} - set(places))
    places |= lay(empty((sum(lengths[chunk % parts] for chunk in rest),), source.dtype), rest)
    if source is not target or wanted != given:
        for chunk, content in lay(source, given).items():
            places[chunk][...] = content
    sent = received = 0
    for step in steps:
        out, into = _step(messenger, step, places, ufunc, empty)
        sent, received = sent + out, received + into
    return Volume(len(steps), sent, received)


def _touched(steps: Iterable[Step]) -> set[int]:
    """The places that the steps name."""
    named: set[int] = set()
    for step in steps:
        for send in step.sends:
            named.update(send.chunks)
        for receive in step.receives:
            named.update(receive.chunks)
        for fold in step.folds:
            named.update((fold.into, *fold.chunks))
    return named


def _step(messenger: Messenger, step: Step, places: Places, ufunc: Any, empty: Any) -> tuple[int, int]:
    """One step; the bytes sent and received."""
    sends = [(send.peer, places[chunk]) for send in step.sends for chunk in send.chunks]
    receives: list[tuple[int, Any]] = []
    adding: dict[int, list[tuple[int, Any]]] = {}  # place -> from whom, what is added
    for receive in step.receives:
        for chunk in receive.chunks:
            home = places[chunk]
            memory = empty(home.shape, home.dtype) if receive.reduce else home
            receives.append((receive.peer, memory))
            if receive.reduce:
                adding.setdefault(chunk, []).append((receive.peer, memory))
    messenger.exchange(sends, receives)
    for chunk, arrivals in adding.items():
        values = sorted([*arrivals, (messenger.rank, places[chunk])], key=lambda pair: pair[0])
        _add(ufunc, [value for _, value in values], places[chunk])
    for fold in step.folds:
        _add(ufunc, [places[chunk] for chunk in fold.chunks], places[fold.into])
    return sum(int(array.nbytes) for _, array in sends), sum(int(array.nbytes) for _, array in receives)


def _add(ufunc: Any, values: Sequence[Any], target: Any) -> None:
    """Target = values[0] + values[1] + ... in this order."""
    dtype = np.dtype(target.dtype)
    wide = accumulator(dtype)
    if wide == dtype and len(values) > 1:  # no memory of its own: the last sum goes where it belongs
        total = values[0]
        for value in values[1:-1]:
            total = ufunc(total, value)
        ufunc(total, values[-1], out=target)
        return
    total = values[0].astype(wide)
    for value in values[1:]:
        total = ufunc(total, value.astype(wide))
    target[...] = total
