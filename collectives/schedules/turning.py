"""A schedule that looks alike from every rank is proven from the view of rank 0.

    ring, step 0:    0 ──c0──► 1 ──c1──► 2 ──c2──► (0)        turned by one rank, it is the same picture:
                     rank r becomes r + 1, chunk c becomes c + 1

So chunk c at rank r is chunk 0 at rank r - c, turned: all that ever happens to chunk 0, between all ranks, can be read
off what rank 0 does with all its chunks. That is the p-th part of the whole proof. Nothing is taken for granted: the
algorithm runs with a letter for its rank (`letter.py`), so each peer and chunk is seen as a function of the rank, and
must be that of rank 0, turned. Where it is not, or anything else is not as it should be, the answer is None, and
`prover.py` looks at all ranks and chunks, and says what is wrong.

A chunk is written (orbit, turns): the chunk `orbit` of those that rank 0 would have first, turned so many times. With k
chunks per block, chunk c is (c mod k, c // k); with one per pair of ranks, chunk (i, j) is (j - i mod p, i). Chunk
(o, t) of rank 0 holds what chunk (o, 0) of rank -t holds, and sets are written as those of the latter.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.collectives.schedules.letter import Letter
from dtrain.collectives.schedules.proof import Proof
from dtrain.collectives.schedules.schedule import Receive, Schedule, Send, Step
from dtrain.collectives.schedules.specification import Specification

_Message = tuple[int, list[int], bool]  # peer, places (orbit * size + turns), whether it is added
_Content = tuple[int, int]  # the set of contributions, a bit per rank; a number for the brackets


def prove_turning(schedule: Schedule) -> Proof | None:
    """The proof; None where the schedule does not look alike from all ranks, or is wrong."""
    spec, size = schedule.specification, schedule.size
    if not spec.turns or schedule.places != schedule.parts or size < 3:
        return None
    circle = _Circle(spec)
    memory = _Memory(spec, circle)
    steps = messages = sent = 0
    for step in _steps(schedule):
        if step is None or step.folds:
            return None
        sends, receives = circle.seen_by_rank_0(step.sends), circle.seen_by_rank_0(step.receives)
        if sends is None or receives is None or not memory.exchange(sends, receives):
            return None
        steps += bool(sends)
        messages += len(sends)
        sent += sum(len(places) for _, places, _ in sends)
    equal_bits = memory.finish()
    if equal_bits is None:
        return None
    sent_share, added_share = (np.full(size, count * spec.weight) for count in (sent, memory.added))
    return Proof(steps, messages * size, sent_share, sent_share, added_share, equal_bits, memory.ordered)


def _steps(schedule: Schedule) -> Iterator[Step | None]:
    """Of all ranks at once; None where the algorithm needs its rank as a number."""
    try:
        yield from schedule.generate(Letter(schedule.size))
    except (TypeError, AttributeError, IndexError):
        yield None


class _Circle:
    """Ranks and chunks, turned."""

    def __init__(self, spec: Specification) -> None:
        self.spec, self.size, self.per_block = spec, spec.size, spec.parts // spec.size
        self.factors = (spec.size, 1) if spec.promise.pairs else (self.per_block,)  # of a chunk: see `place`

    def place(self, chunk: int) -> int:
        """Of a chunk: orbit * size + turns."""
        turns, rest = divmod(chunk, self.per_block)
        return ((rest - turns) % self.size if self.spec.promise.pairs else rest) * self.size + turns

    def seen_by_rank_0(self, messages: Sequence[Send] | Sequence[Receive]) -> list[_Message] | None:
        """Its messages, where those of rank r are the same turned r times; else None."""
        seen: list[_Message] = []
        for message in messages:
            reduce = getattr(message, "reduce", False)
            peer = self.turned(message.peer, (1,), 1)
            if message.when is not True or not isinstance(reduce, bool) or peer is None:
                return None
            places = []
            for number in message.chunks:
                chunk = self.turned(number, self.factors, 1 if self.spec.promise.pairs else self.per_block)
                if chunk is None:
                    return None
                places.append(self.place(chunk))
            seen.append((peer, places, reduce))
        return seen

    def turned(self, number: Any, factors: tuple[int, ...], below: int) -> int | None:
        """What rank 0 has, where rank r has the same turned r times: with these factors and a rest below this."""
        if not isinstance(number, Letter) or number.factors != factors or not 0 <= number.rest < below:
            return None
        return number.first


class _Memory:
    """The places of rank 0."""

    def __init__(self, spec: Specification, circle: _Circle) -> None:
        self.spec, self.circle, self.size = spec, circle, spec.size
        self.contents: dict[int, _Content] = {}
        self.forms: dict[tuple[Any, ...], int] = {}  # what is added -> the number of its sum
        self.added = 0
        self.ordered = True
        self.several = False  # arrivals at once: the same brackets may look different then
        for place in map(circle.place, spec.given(0)):
            rank = self.rank(place)
            self.contents[place] = 1 << rank, rank

    def rank(self, place: int, peer: int = 0) -> int:
        """Whose chunk (o, 0) stands for this place of a peer of rank 0."""
        return (peer - place) % self.size

    def exchange(self, sends: list[_Message], receives: list[_Message]) -> bool:
        """One step; False where anything is not as it should be."""
        waiting: dict[int, list[list[int]]] = {}
        for peer, places, _ in sends:
            waiting.setdefault(-peer % self.size, []).append(places)
        read: set[int] = set()
        replaced: dict[int, _Content] = {}
        added: dict[int, list[tuple[int, _Content]]] = {}
        for peer, places, reduce in receives:
            # From `peer` comes what rank 0 sends as far ahead, turned.
            sent = waiting[peer].pop(0) if waiting.get(peer) else None
            if sent is None or peer == 0 or places != [p - p % self.size + (p + peer) % self.size for p in sent]:
                return False
            for source, place in zip(sent, places, strict=True):
                if source not in self.contents or place in replaced or (place in added and not reduce):
                    return False  # not there, or written twice
                if reduce:
                    added.setdefault(place, []).append((self.rank(place, peer), self.contents[source]))
                else:
                    replaced[place] = self.contents[source]
            read.update(sent)
        if len(receives) != len(sends) or not read.isdisjoint(replaced):
            return False  # a send without a receive, or overwritten while it is sent
        sums = {place: self.sum(place, arrivals) for place, arrivals in added.items()}
        self.contents.update(replaced)
        self.contents.update({place: total for place, total in sums.items() if total is not None})
        return None not in sums.values()

    def sum(self, place: int, arrivals: list[tuple[int, _Content]]) -> _Content | None:
        """Of the arrivals, each with the rank it comes from, and of what is there; None where that is wrong."""
        if not self.spec.reduces or place not in self.contents:
            return None
        addends = sorted([*arrivals, (self.rank(place), self.contents[place])])
        total = 0
        for rank, (members, _) in addends:
            if total & members:
                return None
            total |= members
            # Whatever else is added to whatever else is out of order for some turn: one of the one part then lies
            # between two of the other, or the first rank has not the first contribution.
            self.ordered = self.ordered and members == 1 << rank
        self.added += len(arrivals)
        self.several = self.several or len(arrivals) > 1
        forms = [(form,) if len(addends) == 2 else (rank, form) for rank, (_, form) in addends]  # x+y = y+x
        return total, self.forms.setdefault(tuple(sorted(forms)), self.size + len(self.forms))

    def finish(self) -> bool | None:
        """Whether all who want a chunk have the same bits of it; None where one has not what it should, or is not sure.

        (o, t) of rank 0 stands for (o, 0) of another rank, so all of an orbit must be equal.
        """
        wanted = [self.circle.place(chunk) for chunk in self.spec.wanted(0)]
        everyone = (1 << self.size) - 1
        for place in wanted:
            if place not in self.contents or (self.spec.reduces and self.contents[place][0] != everyone):
                return None
        forms = {(place // self.size, self.contents[place][1]) for place in wanted}
        equal = len(forms) == len({orbit for orbit, _ in forms})
        return None if self.several and not equal else equal
