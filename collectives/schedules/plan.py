"""What a rank does in a schedule, as data: messages, sums, what they wait for. Made by `planner.py`, for `executor.py`.

Plan    copies, then events in order; each: wait for one Arriving and some Leaving, do the Sums, let more leave
Span    elements of one of four buffers: what was given, the result, scratch, what has arrived and is not yet added
Room    where segments arrive: used around and around
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SOURCE, TARGET, SCRATCH, ARRIVING = range(4)
WINDOW = 4  # segments that may arrive before the first of them is added


class Span(NamedTuple):
    """Elements start to stop of a buffer."""

    buffer: int
    start: int
    stop: int


class Leaving(NamedTuple):
    """A message to `peer`: the spans, one after the other."""

    peer: int
    spans: tuple[Span, ...]


class Arriving(NamedTuple):
    """A message from `peer`, posted after so many events, when these sends have left."""

    peer: int
    span: Span
    after: int
    sends: tuple[int, ...]


class Sum(NamedTuple):
    """into = sources[0] + sources[1] + ...; with one source, a copy."""

    into: Span
    sources: tuple[Span, ...]


class Event(NamedTuple):
    """Wait for a receive (-1: none) and for sends, do the sums; then more sends may leave."""

    receive: int
    sends: tuple[int, ...]
    sums: tuple[Sum, ...]
    step: int
    leaving: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the executor does for one rank. Lengths in elements."""

    copies: tuple[Sum, ...]  # before the first step: wanted as given
    at_once: tuple[int, ...]  # sends that wait for nothing
    leaving: tuple[Leaving, ...]
    arriving: tuple[Arriving, ...]
    events: tuple[Event, ...]
    lengths: tuple[int, int, int, int]  # of the four buffers
    volume: tuple[int, int, int]  # steps in which the rank sends or receives, elements sent, received
    steps: int


Part = tuple[int, int, int]  # elements first to last of a place
Touch = tuple[int, int, int]  # elements first to last, and the event or send that touches them


class Room:
    """Where segments arrive that are not yet added: used around and around."""

    def __init__(self, length: int) -> None:
        self.capacity, self.next, self.length = length, 0, 0
        self.used: list[Touch] = []  # first, last, the event after which it is free

    def reserve(self, count: int) -> None:
        """The next `count` elements will be free of one another."""
        if self.next + count > self.capacity:
            self.next, self.capacity = 0, max(count, self.capacity)

    def take(self, count: int, event: int) -> tuple[int, int]:
        """Where `count` elements begin, free until `event` is over; and the number of events after which they are."""
        self.capacity = max(self.capacity, WINDOW * count)
        if self.next + count > self.capacity:
            self.next = 0
        start, stop = self.next, self.next + count
        self.next, self.length = stop, max(stop, self.length)
        after = latest(self.used, start, stop) + 1
        self.used = [other for other in self.used if other[1] <= start or stop <= other[0]]
        self.used.append((start, stop, event))
        return start, after


def count_of(parts: Sequence[Part]) -> int:
    """Elements of the parts."""
    return sum(last - first for _, first, last in parts)


def latest(touches: Sequence[Touch], first: int, last: int) -> int:
    """The latest event that touches these elements; -1: none."""
    return max((event for start, stop, event in touches if start < last and first < stop), default=-1)


def within(span: Span, first: int, last: int) -> Span:
    """Elements first to last of what the span has."""
    return Span(span.buffer, span.start + first, span.start + last)


def spans_of(where: dict[int, Span], parts: Sequence[Part]) -> tuple[Span, ...]:
    """Where the parts of a segment lie; side by side in one span."""
    return tuple(s.into for s in merged((within(where[place], first, last), ()) for place, first, last in parts))


def merged(sums: Iterable[tuple[Span, tuple[Span, ...]]]) -> tuple[Sum, ...]:
    """The sums, joined where all their spans go on; without those of no elements."""
    found: list[Sum] = []
    for into, sources in sums:
        if into.start == into.stop:
            continue
        spans = (into, *sources)
        before = (found[-1].into, *found[-1].sources) if found else ()
        if len(before) == len(spans) and all(
            a.buffer == b.buffer and a.stop == b.start for a, b in zip(before, spans, strict=True)
        ):
            spans = tuple(Span(a.buffer, a.start, b.stop) for a, b in zip(before, spans, strict=True))
            found.pop()
        found.append(Sum(spans[0], spans[1:]))
    return tuple(found)
