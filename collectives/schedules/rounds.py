"""A schedule seen from above: per step one table of all messages of all ranks, as arrays.

    step 0      rank  peer  reduce  chunks            (one table of sends, one of receives)
                 0     1      -     [0]
                 1     2      -     [1]

The prover, the simulator and the drawing work on these; a regular algorithm is called once for all ranks, the others
rank by rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.schedule import NONE, Fold, Receive, Schedule, Send, Step

_SHORT = 1 << 15  # chunks in steps that are handled together, about


@dataclass(frozen=True, slots=True)
class Messages:
    """The sends or the receives of a step: row m is of `rank[m]` with `peer[m]`, chunks[start[m]:start[m + 1]]."""

    rank: Array
    peer: Array
    reduce: Array
    start: Array
    chunks: Array
    single: bool  # one chunk in each message
    once: bool  # no rank has two of them in a step
    step: Array  # of the table, that row m belongs to

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def counts(self) -> Array:
        """Chunks per message."""
        counts: Array = np.ones(len(self.rank), np.int64) if self.single else self.start[1:] - self.start[:-1]
        return counts

    def each(self, values: Array) -> Array:
        """One value per message, repeated for each of its chunks."""
        repeated: Array = values if self.single else np.repeat(values, self.counts)
        return repeated

    def entries(self, order: Array) -> Array:
        """The indices into `chunks` of the messages in this order."""
        if self.single:
            return order
        counts = self.counts[order]
        begin = np.cumsum(counts) - counts
        return np.asarray(np.arange(int(counts.sum())) + np.repeat(self.start[order] - begin, counts))

    def chunks_of(self, message: int) -> Array:
        """The chunks of one message."""
        return self.chunks[self.start[message] : self.start[message + 1]]


@dataclass(frozen=True, slots=True)
class Folds:
    """The local folds of a step, grouped by their number of chunks: rank, into (F,), chunks (F, number)."""

    rank: Array
    into: Array
    chunks: Array


@dataclass(frozen=True, slots=True)
class Round:
    """One step of all ranks; or several, one after the other, with the folds of the last."""

    sends: Messages
    receives: Messages
    folds: tuple[Folds, ...] = ()
    steps: int = 1


def rounds(schedule: Schedule, together: int = 1) -> Iterator[Round]:
    """The steps of all ranks, one table each; of a regular algorithm up to so many `together`, if they are short."""
    if not schedule.algorithm.regular:
        idle = Step()
        for each in zip_longest(*(schedule.generate(rank) for rank in range(schedule.size)), fillvalue=idle):
            yield table(each)
        return
    everyone, steps, rows = np.arange(schedule.size), list[Step](), 0
    for step in schedule.generate(everyone):
        steps.append(step)
        rows += schedule.size * sum(len(message.chunks) for message in step.sends)
        if len(steps) == together or rows >= _SHORT or step.folds:
            yield _from_above(steps, everyone)
            steps, rows = [], 0
    if steps:
        yield _from_above(steps, everyone)


def _from_above(steps: Sequence[Step], everyone: Array) -> Round:
    folds = [Folds(everyone, _row(f.into, everyone), _columns(f.chunks, everyone)) for f in steps[-1].folds]
    sends, receives = [step.sends for step in steps], [step.receives for step in steps]
    return Round(_stack(sends, everyone), _stack(receives, everyone), tuple(folds), len(steps))


def table(steps: Sequence[Step]) -> Round:
    """The table of one step, from the steps of rank 0, 1, ..."""
    sends = [(rank, s, _numbers(s)) for rank, step in enumerate(steps) for s in step.sends if s.when]
    receives = [(rank, r, _numbers(r)) for rank, step in enumerate(steps) for r in step.receives if r.when]
    folds = [(rank, f) for rank, step in enumerate(steps) for f in step.folds]
    return Round(_flatten(sends), _flatten(receives), tuple(_single(rank, fold) for rank, fold in folds))


def _numbers(message: Send | Receive) -> Sequence[int]:
    return [chunk for chunk in message.chunks if chunk != NONE] if NONE in message.chunks else message.chunks


def _flatten(messages: Sequence[tuple[int, Any, Sequence[int]]]) -> Messages:
    ranks = [rank for rank, _, _ in messages]
    lists = [chunks for _, _, chunks in messages]
    lengths = list(map(len, lists))
    return Messages(
        np.array(ranks, np.int64),
        np.array([message.peer for _, message, _ in messages], np.int64),
        np.array([getattr(message, "reduce", False) for _, message, _ in messages], bool),
        _offsets(lengths),
        _joined(lists, lengths),
        single=lengths.count(1) == len(lengths),
        once=len(set(ranks)) == len(ranks),
        step=np.zeros(len(ranks), np.int64),
    )


def _joined(lists: list[Sequence[int]], lengths: list[int]) -> Array:
    """All numbers of the lists; of ranges without a look at each number."""
    ranges = [numbers for numbers in lists if isinstance(numbers, range) and numbers.step == 1]
    if len(ranges) < len(lists):
        return np.fromiter(chain.from_iterable(lists), np.int64, sum(lengths))
    counts = np.array(lengths, np.int64)
    shift = np.array([numbers.start for numbers in ranges], np.int64) - (np.cumsum(counts) - counts)
    return np.asarray(np.arange(int(counts.sum())) + np.repeat(shift, counts))


def _offsets(counts: Any) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _single(rank: int, fold: Fold) -> Folds:
    return Folds(np.array([rank]), np.array([fold.into]), np.array([fold.chunks], np.int64))


def _stack(steps: Sequence[Sequence[Any]], everyone: Array) -> Messages:
    """From the messages of each step, whose fields are arrays over the ranks (or numbers, equal for all)."""
    messages = [message for step in steps for message in step]
    number, size, width = len(messages), len(everyone), max((len(m.chunks) for m in messages), default=1)
    peer, when = np.empty((number, size), np.int64), np.empty((number, size), bool)
    chunks = np.full((number, width, size), NONE)
    for m, message in enumerate(messages):
        peer[m], when[m] = message.peer, message.when
        if isinstance(message.chunks, np.ndarray) and message.chunks.ndim == 2:
            chunks[m, : len(message.chunks)] = message.chunks
            continue
        for column, chunk in enumerate(message.chunks):
            chunks[m, column] = chunk
    chosen: Any = slice(None) if all(m.when is True for m in messages) else np.flatnonzero(when)
    rows = chunks.transpose(0, 2, 1).reshape(number * size, width)[chosen]
    reduce = np.repeat([getattr(message, "reduce", False) for message in messages], size).astype(bool)
    start, single = np.arange(len(rows) + 1) * width, width == 1
    if width > 1 and np.count_nonzero(there := rows != NONE) < rows.size:
        start, rows = _offsets(there.sum(axis=1)), rows[there]
    once = max(map(len, steps)) <= 1
    step = np.repeat(np.arange(len(steps)), [size * len(step) for step in steps])
    return Messages(
        rank=np.tile(everyone, number)[chosen],
        peer=peer.reshape(-1)[chosen],
        reduce=reduce[chosen],
        start=start,
        chunks=rows.reshape(-1),
        single=single,
        once=once,
        step=step[chosen],
    )


def _row(value: Any, everyone: Array) -> Array:
    """One number for each rank."""
    return np.full(len(everyone), value, np.int64)


def _columns(values: Sequence[Any], everyone: Array) -> Array:
    """Shape (size, len(values))."""
    return np.stack([_row(value, everyone) for value in values], axis=1)
