"""Collectives of arrays from elsewhere that come again: one meeting (`meeting.py`) for each chunk, all in one call.

    Meetings   the plan of such a collective: its record, and what is done with each chunk
    Long       the same for arrays of one shape, from Python straight into machine code (`machine_long.py`)

What is moved pushes Python's own data out of the caches: between 2 ranks, of the 52 us of an all_gather of 256 KiB 20
were Python on the way to its meeting and back, which takes 5 where it is warm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives import cross_memory, records
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.machine_long import NOT_FREE, UNLIKE, WORD, WORDS
from dtrain.collectives.meeting import Job
from dtrain.collectives.node import Node
from dtrain.collectives.records import NO_PLACE, WHERE, Record
from dtrain.collectives.small import READ, WRITE, Like


class Chunk(NamedTuple):
    """A part of the arrays."""

    begin: int  # element of both
    jobs: Sequence[Job]  # one; or for each slot of the staging


class Meetings:
    """A `Run`: one after another."""

    def __init__(
        self, node: Node, record: Record, dtype: np.dtype[Any], chunks: Sequence[Chunk], home: bool = False
    ) -> None:
        """Dtype: in which the chunks are counted. home: the place of the source is put aside for the peers."""
        self.node, self.record, self.dtype, self.chunks, self.home = node, record, dtype, chunks, home

    @property
    def placed(self) -> bool:
        """Whether all ranks' sources lie at one place in the window, which stands in the record."""
        return self.record[WHERE] >= 0

    def __call__(self, source: Array, target: Array) -> None:
        self.go_on(0, source.view(self.dtype), target.view(self.dtype))

    def go_on(self, first: int, source: Array, target: Array) -> None:
        """From this chunk to the end."""
        node, aside = self.node, NO_PLACE
        for begin, jobs in self.chunks[first:]:
            if self.home:
                aside = node.arena.place(source) or cross_memory.private(source)
            number = node.begin_record(self.record, aside)
            job = jobs[node.free_slot(number)] if len(jobs) > 1 else jobs[0]
            job.meet(number, source[begin:], target[begin:])

    def finish(self, first: int, found: int, source: Array, target: Array) -> None:
        """What is left when machine code came back from this chunk with `found`."""
        if found != NOT_FREE:
            begin, jobs = self.chunks[first]
            number = self.node.number
            jobs[number % len(jobs)].go_on(number, found, source[begin:], target[begin:])
            first += 1
        self.go_on(first, source, target)


class Long:
    """These meetings for arrays that are like two given ones, and lie to each other as they do: apart, or with one
    distance between their beginnings. Neither lies in the window; or the first does there where the record says.
    """

    def __init__(self, meetings: Meetings, source: Array, target: Array) -> None:
        self._meetings = meetings
        node, code = meetings.node, machine_code()
        assert code is not None and code.long is not None
        self._kept: list[Any] = []  # to which the words point
        self._words = np.zeros(WORDS, np.int64)
        begin, goal = address(source), address(target)
        words = {
            "crew": node.flags.all,
            "mine": node.flags.at,
            "turn": address(node.turn),
            "source": self._like(source, READ),
            "target": self._like(target, WRITE),
            "arena": address(node.arena.ranges),
            "place": begin if meetings.placed else 0,
            "apart": goal >= begin + source.nbytes or begin >= goal + target.nbytes,
            "shift": goal - begin,
            "x.bytes": source.nbytes,
            "y.bytes": target.nbytes,
            "chunks": self._table(
                [[each.begin * meetings.dtype.itemsize, *(job.at for job in each.jobs)] for each in meetings.chunks]
            ),
            "number.of": len(meetings.chunks),
            "slots": len(meetings.chunks[0].jobs),
            "home": meetings.home,
        }
        for name, word in words.items():
            self._words[WORD[name]] = word
        self._words[WORD["record"] :] = *meetings.record, records.packed(NO_PLACE)
        self.run = code.long(self._words)
        """(source, target) -> 0, or what `finish` must be told."""

    def finish(self, found: int, source: Array, target: Array) -> bool:
        """Do the rest of what `run` did not do. False: the arrays are others, and nothing was done."""
        if found == UNLIKE:
            return False
        dtype = self._meetings.dtype
        flat = source.reshape(-1).view(dtype), target.reshape(-1).view(dtype)
        self._meetings.finish(int(self._words[WORD["reached"]]), found, *flat)
        return True

    def _like(self, array: Array, flags: int) -> int:
        like = Like(array.shape, array.dtype)
        self._kept.append(like)
        return self._table(like.words(flags))

    def _table(self, words: Any) -> int:
        table = np.array(words, np.int64)
        self._kept.append(table)
        return address(table)


def able(meetings: Meetings) -> bool:
    """Whether machine code knows all of it."""
    code = machine_code()
    if code is None or code.long is None or meetings.node.flags.meet is None or not meetings.chunks:
        return False
    return all(job.fused for each in meetings.chunks for job in each.jobs)
