"""A message in segments: so that the first is added, and goes on, while the next ones still arrive.

    a message      | 3 |   4   | 5 |     | 9 |      chunks, of which 3, 4 and 5 lie side by side
    in segments    | 3  4a | 4b  5 |     | 9 |      SEGMENT_BYTES each; what lies elsewhere travels on its own,
                                                    or packed with its neighbours where all are short
The cut depends on the numbers and lengths of the chunks alone: both ends know these, and cut alike.
"""

from collections.abc import Iterator, Sequence

from dtrain.collectives.schedules.plan import Part
from dtrain.collectives.schedules.schedule import Schedule

# Measured with `ring` between 2 ranks on 2 cores, 16 MiB: 1.4 times as fast as MPICH's own from 1 MiB on, 0.6 times
# with 128 KiB, 1.1 times with 256 KiB. A message costs a look at it, and a change of ranks where cores are scarce.
SEGMENT_BYTES = 1 << 20
MOST_SEGMENTS = 64  # of a message; longer ones have longer segments
ALONE_BYTES = 16 * 1024  # chunks from here on are not packed into a common segment with what lies elsewhere


class Segments:
    """How the messages of a schedule are cut; `length` is that of a segment, in elements."""

    def __init__(self, schedule: Schedule, lengths: Sequence[int], itemsize: int, segment_bytes: int) -> None:
        """lengths: of the chunks, in elements of `itemsize` bytes."""
        self.length = max(1, segment_bytes // max(1, itemsize))
        self._alone = max(1, ALONE_BYTES // max(1, itemsize))
        self._lengths, self._parts = lengths, schedule.parts
        self._signals = schedule.collective == "barrier"  # its messages have no content and travel all the same

    def of(self, chunks: Sequence[int]) -> Iterator[list[Part]]:
        """The segments of a message with these chunks, each as parts of places."""
        total = sum(map(self._length, chunks))
        if not total and self._signals:
            yield []
        segment = max(self.length, -(-total // MOST_SEGMENTS))
        parts: list[Part] = []
        held = 0
        for group in self._neighbours(chunks):
            size = sum(map(self._length, group))
            if held and max(held, size) >= self._alone:
                yield parts
                parts, held = [], 0
            for place in group:
                first, length = 0, self._length(place)
                while first < length:
                    last = min(length, first + segment - held)
                    parts.append((place, first, last))
                    held += last - first
                    first = last
                    if held == segment:
                        yield parts
                        parts, held = [], 0
        if parts:
            yield parts

    def _neighbours(self, chunks: Sequence[int]) -> Iterator[list[int]]:
        """Runs of chunks with consecutive numbers, without those of no elements."""
        group: list[int] = []
        for chunk in chunks:
            if not self._length(chunk):
                continue
            if group and chunk % self._parts != group[-1] % self._parts + 1:
                yield group
                group = []
            group.append(chunk)
        if group:
            yield group

    def _length(self, place: int) -> int:
        return self._lengths[place % self._parts]
