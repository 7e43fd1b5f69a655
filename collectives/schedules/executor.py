"""Run a schedule between real ranks, over the point-to-point messages of a communicator.

    rank 0   send c0 │ c0' │ c0''    ─►      messages longer than `segment_bytes` are cut; all of a step are under way
             recv c3 │ c3' │ c3''    ◄─      at once, and a segment is added while the next ones arrive

The result has the bits of `interpreter.interpret`: the order of every sum is that of the schedule, whatever the timing.
Chunks lie in the input (if nothing is written there), in the result, or in one scratch buffer; chunks that lie side by
side travel as one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dtrain.collectives.dtypes import Array, operation, reduce_rows, starts
from dtrain.collectives.schedules.schedule import Receive, Schedule, Step

SEGMENT_BYTES = 1 << 20

Run = tuple[Array, int, int]  # elements start to stop of a buffer


class _Work(Protocol):
    def wait(self) -> Any: ...


class Messenger(Protocol):
    """What is needed of a communicator."""

    rank: int
    size: int

    def send_async(self, array: Any, destination: int, tag: int = 0) -> _Work: ...
    def recv_async(self, out: Array, source: int, tag: int = 0) -> _Work: ...


def execute(
    comm: Messenger,
    schedule: Schedule,
    array: Array,
    counts: int | Sequence[int] | Array | None = None,
    op: str = "sum",
    out: Array | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    tag: int = 0,
) -> Array:
    """This rank's wanted chunks, one after the other, as a 1-D array (`out`, if given; it may be `array` itself).

    Collective. array: its given chunks, 1-D and contiguous (length 0 where it has none; its dtype counts then too).
    counts: see `Specification.lengths`; default: the length of array, where that is the same on all ranks.
    """
    if comm.size != schedule.size:
        raise ValueError(f"{schedule.collective} {schedule.name}: for {schedule.size} ranks; here are {comm.size}")
    lengths = schedule.specification.lengths(len(array) if counts is None else counts)
    steps = schedule.of(comm.rank)
    places, result = _places(schedule, comm.rank, steps, array, lengths, out)
    segment = max(1, segment_bytes // array.dtype.itemsize)
    with np.errstate(all="ignore"):
        for step in steps:
            _run(comm, step, places, op, segment, tag)
    return result


def _places(
    schedule: Schedule, rank: int, steps: Sequence[Step], array: Array, lengths: Array, out: Array | None
) -> tuple[dict[int, Run], Array]:
    """Where each place lies, filled with the input; and the result."""
    spec, parts = schedule.specification, schedule.parts
    wanted, given = list(spec.wanted(rank)), list(spec.given(rank))
    written = {chunk for step in steps for receive in step.receives for chunk in receive.chunks}
    written |= {fold.into for step in steps for fold in step.folds}

    def lay(buffer: Array, chunks: Sequence[int]) -> dict[int, Run]:
        sizes = [int(lengths[chunk % parts]) for chunk in chunks]
        return {c: (buffer, s, s + n) for c, s, n in zip(chunks, starts(sizes), sizes, strict=True)}

    total = sum(int(lengths[chunk]) for chunk in wanted)
    result = np.empty(total, array.dtype) if out is None else out
    if result.shape != (total,) or result.dtype != array.dtype:
        raise ValueError(f"out has shape {result.shape} and dtype {result.dtype}; expected ({total},), {array.dtype}")
    source = lay(array, given)
    if len(array) != sum(stop - start for _, start, stop in source.values()):
        raise ValueError(
            f"{schedule.collective}: rank {rank}: array has {len(array)} elements, not those of its chunks"
        )
    if out is not None and wanted != given and np.may_share_memory(out, array):
        source = lay(array.copy(), given)
    places = lay(result, wanted)
    kept = {chunk: run for chunk, run in source.items() if chunk not in places and chunk not in written}
    extra = sorted((written | set(given)) - set(places) - set(kept))
    scratch = np.empty(sum(int(lengths[chunk % parts]) for chunk in extra), array.dtype)
    places |= kept | lay(scratch, extra)
    for chunk, (buffer, start, stop) in source.items():
        home, at, end = places[chunk]
        if home is not buffer:
            home[at:end] = buffer[start:stop]
    return places, result


def _run(comm: Messenger, step: Step, places: dict[int, Run], op: str, segment: int, tag: int) -> None:
    """One step: all messages are posted first, so that no order of the ranks can block another."""
    sent = {chunk for send in step.sends for chunk in send.chunks}
    landing = [chunk for receive in step.receives if receive.reduce for chunk in receive.chunks]
    alone = len(set(landing)) == len(landing)
    arriving: list[tuple[_Work, Receive, list[Array], Array]] = []
    together: dict[int, list[tuple[int, Array]]] = {}  # place -> what arrives from whom, where it is more than one
    for receive in step.receives:
        whole = np.empty(0)
        if receive.reduce and not alone:
            whole, parts = _whole(places, receive.chunks)
            for chunk, part in zip(receive.chunks, parts, strict=True):
                together.setdefault(chunk, []).append((receive.peer, part))
        start = 0
        for views in _segments(places, receive.chunks, segment):
            length = sum(map(len, views))
            if len(whole):
                buffer = whole[start : start + length]
            elif len(views) == 1 and not receive.reduce:
                buffer = views[0]
            else:
                buffer = np.empty(length, views[0].dtype)
            start += length
            arriving.append((comm.recv_async(buffer, receive.peer, tag), receive, views, buffer))
    leaving = [
        comm.send_async(views[0] if len(views) == 1 else np.concatenate(views), send.peer, tag)
        for send in step.sends
        for views in _segments(places, send.chunks, segment)
    ]
    if sent & set(landing):  # the sums go where messages are still read
        for work in leaving:
            work.wait()
    for work, receive, views, buffer in arriving:
        work.wait()
        if receive.reduce and alone:
            for view, part in zip(views, _split(buffer, views), strict=True):
                _add(op, comm.rank, [(receive.peer, part)], view)
        elif not receive.reduce and len(views) > 1:
            for view, part in zip(views, _split(buffer, views), strict=True):
                view[...] = part
    for chunk, arrivals in together.items():
        _add(op, comm.rank, arrivals, _view(places[chunk]))
    for work in leaving:
        work.wait()
    for fold in step.folds:
        sources = [_view(places[chunk]) for chunk in fold.chunks]
        reduce_rows(operation(op, sources[0].dtype), sources, _view(places[fold.into]))


def _add(op: str, rank: int, arrivals: Sequence[tuple[int, Array]], own: Array) -> None:
    """Own = the arrivals and own, folded in the order of the ranks."""
    values = sorted([*arrivals, (rank, own)], key=lambda pair: pair[0])
    reduce_rows(operation(op, own.dtype), [value for _, value in values], own)


def _whole(places: dict[int, Run], chunks: Sequence[int]) -> tuple[Array, list[Array]]:
    """Memory for the content of these chunks, and its parts."""
    views = [_view(places[chunk]) for chunk in chunks]
    whole = np.empty(sum(map(len, views)), views[0].dtype)
    return whole, _split(whole, views)


def _segments(places: dict[int, Run], chunks: Sequence[int], segment: int) -> Iterator[list[Array]]:
    """The content of the chunks, cut after every `segment` elements; each piece as views of memory without gaps.

    Both ends cut alike, as they agree on the lengths, though their chunks may lie differently.
    """
    runs: list[Run] = []
    for buffer, start, stop in (places[chunk] for chunk in chunks):
        if runs and runs[-1][0] is buffer and runs[-1][2] == start:
            runs[-1] = (buffer, runs[-1][1], stop)
        elif stop > start:
            runs.append((buffer, start, stop))
    piece: list[Array] = []
    room = segment
    for buffer, start, stop in runs:
        while start < stop:
            end = min(stop, start + room)
            piece.append(buffer[start:end])
            room -= end - start
            start = end
            if room == 0:
                yield piece
                piece, room = [], segment
    if piece:
        yield piece


def _split(buffer: Array, views: Sequence[Array]) -> list[Array]:
    return [buffer[s : s + len(view)] for s, view in zip(starts([len(v) for v in views]), views, strict=True)]


def _view(run: Run) -> Array:
    buffer, start, stop = run
    return buffer[start:stop]
