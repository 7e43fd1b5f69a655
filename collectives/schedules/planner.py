"""A schedule made ready for one rank and one vector: which bytes travel when, and what waits for what.

    step t      receive seg 0 ─► add ─► send seg 0 of step t + 1     a segment goes on as soon as it is added,
                  receive seg 1 ─► add ─► send seg 1                 while the next ones are still arriving

Events are what the rank does in order: take a segment that has arrived, add it, or fold. Everything else hangs on them:
- a send leaves after the last event that wrote what it reads;
- a receive is posted when its room is free: after the last event there, and the sends that read it have left;
- a sum waits for the sends that read the place it writes.
A place lies in the source until it is written first, so nothing is copied before the first step; chunks side by side
travel as one. A message is cut into segments by its own length and chunks alone, so both ends cut alike; both post
those of a pair in one order.

No deadlock, with messages that leave only when they are awaited: assume that all events before step t are over, on all
ranks. Then every send of the step is posted; sends of earlier steps have been received. A receive waits only for these,
and for room, which an earlier event of the step frees; a sum waits for a send of its own step only where all receives
of that step have been posted before (`reserve`). So every event of step t comes.
"""

from collections.abc import Sequence

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.plan import (
    ARRIVING,
    SCRATCH,
    SOURCE,
    TARGET,
    WINDOW,
    Arriving,
    Event,
    Leaving,
    Part,
    Plan,
    Room,
    Span,
    Sum,
    Touch,
    count_of,
    latest,
    merged,
    spans_of,
    within,
)
from dtrain.collectives.schedules.schedule import Receive, Schedule, Step
from dtrain.collectives.schedules.segments import SEGMENT_BYTES, Segments


def make_plan(
    schedule: Schedule,
    rank: int,
    lengths: Array,
    itemsize: int,
    in_place: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
) -> Plan:
    """The plan of one rank for chunks of these lengths (`Specification.lengths`).

    in_place: the result goes where the given chunks are; only where the wanted chunks are the given ones.
    """
    return _Planner(schedule, rank, lengths, itemsize, in_place, segment_bytes).run()


class _Planner:
    def __init__(
        self, schedule: Schedule, rank: int, lengths: Array, itemsize: int, in_place: bool, segment_bytes: int
    ) -> None:
        self.schedule, self.rank, self.parts = schedule, rank, schedule.parts
        self.lengths: list[int] = lengths.tolist()
        self.segments = Segments(schedule, self.lengths, itemsize, segment_bytes)
        self.steps = schedule.of(rank)
        self.leaving: list[Leaving] = []
        self.ready: list[int] = []  # of each send: the number of events before it
        self.last_ready: dict[int, int] = {}  # of the last send to a peer
        self.arriving: list[Arriving] = []
        self.events: list[tuple[int, tuple[int, ...], tuple[Sum, ...], int]] = []
        self.written: dict[int, list[Touch]] = {}  # place -> events that wrote what is there now
        self.busy: dict[int, list[Touch]] = {}  # place -> those, and the folds that read it
        self.readers: dict[int, list[Touch]] = {}  # place -> sends that read what is there now
        self.fresh: dict[int, list[Touch]] = {}  # place -> events of the step under way that write it
        self.room = Room(WINDOW * self.segments.length)
        self.lay(in_place)

    def length(self, place: int) -> int:
        """Elements of a place."""
        return self.lengths[place % self.parts]

    def lay(self, in_place: bool) -> None:
        """Where every place lies at first (`at`), and where it is written (`home`)."""
        spec = self.schedule.specification
        given, wanted = list(spec.given(self.rank)), list(spec.wanted(self.rank))
        if in_place and given and wanted and wanted != given:
            raise ValueError(f"{self.schedule.collective}: the wanted chunks are not the given ones: not in place")
        written = {chunk for step in self.steps for receive in step.receives for chunk in receive.chunks}
        written |= {fold.into for step in self.steps for fold in step.folds}
        self.home, target = self.side_by_side(TARGET, wanted)
        scratch, scratch_length = self.side_by_side(SCRATCH, sorted(written - set(wanted)))
        self.home |= scratch
        self.at, source = self.side_by_side(SOURCE, given)
        copies = []
        for place in wanted:
            if place in self.at and in_place:
                self.at[place] = self.home[place]
            elif place in self.at and place not in written:
                copies.append((self.home[place], (self.at[place],)))
                self.at[place] = self.home[place]
        self.copies = merged(copies)
        self.sizes = source, target, scratch_length

    def side_by_side(self, buffer: int, places: Sequence[int]) -> tuple[dict[int, Span], int]:
        """These places one after the other, and their length together."""
        spans, start = {}, 0
        for place in places:
            stop = start + self.length(place)
            spans[place] = Span(buffer, start, stop)
            start = stop
        return spans, start

    def run(self) -> Plan:
        """The plan of all steps."""
        steps = sent = received = 0
        for number, step in enumerate(self.steps):
            steps += bool(step.sends or step.receives)
            sent += sum(self.length(chunk) for send in step.sends for chunk in send.chunks)
            received += sum(self.length(chunk) for receive in step.receives for chunk in receive.chunks)
            self.plan_step(step, number)
        released: list[list[int]] = [[] for _ in range(len(self.events) + 1)]
        for send, after in enumerate(self.ready):
            released[after].append(send)
        events = (Event(*event, tuple(then)) for event, then in zip(self.events, released[1:], strict=True))
        return Plan(
            self.copies,
            tuple(released[0]),
            tuple(self.leaving),
            tuple(self.arriving),
            tuple(events),
            (*self.sizes, self.room.length),
            (steps, sent, received),
            len(self.steps),
        )

    # One step

    def plan_step(self, step: Step, number: int) -> None:
        """Sends, receives with what is done about them, folds."""
        for send in step.sends:
            for parts in self.segments.of(send.chunks):
                self.plan_send(send.peer, parts)
        messages = [(receive, list(self.segments.of(receive.chunks))) for receive in step.receives]
        landing = [chunk for receive in step.receives if receive.reduce for chunk in receive.chunks]
        sent = {chunk for send in step.sends for chunk in send.chunks if self.at[chunk] == self.home.get(chunk)}
        several = len(set(landing)) < len(landing)
        if several or not sent.isdisjoint(landing):  # see the module's text: all receives are posted before
            self.room.reserve(sum(count_of(parts) for _, segments in messages for parts in segments))
        if several:
            self.plan_common_sums(messages, number)
        else:
            for receive, segments in messages:
                for parts in segments:
                    self.plan_receive(receive, parts, number)
        self.settle({chunk for receive in step.receives for chunk in receive.chunks})
        for fold in step.folds:
            whole = [(fold.into, 0, self.length(fold.into))]
            for chunk in fold.chunks:
                self.busy.setdefault(chunk, []).append((0, self.length(chunk), len(self.events)))
            sums = merged([(self.home[fold.into], tuple(self.at[chunk] for chunk in fold.chunks))])
            self.add_event(-1, whole, sums, number)
            self.settle({fold.into})

    def plan_send(self, peer: int, parts: Sequence[Part]) -> None:
        """One segment that leaves when what it reads is there, after those before it to the same peer."""
        after = max((latest(self.written.get(p, ()), first, last) + 1 for p, first, last in parts), default=0)
        after = self.last_ready[peer] = max(after, self.last_ready.get(peer, 0))
        for place, first, last in parts:
            if self.at[place] == self.home.get(place):
                self.readers.setdefault(place, []).append((first, last, len(self.leaving)))
        self.leaving.append(Leaving(peer, spans_of(self.at, parts)))
        self.ready.append(after)

    def plan_receive(self, receive: Receive, parts: Sequence[Part], number: int) -> None:
        """One segment, and the event in which it is added or put where it belongs."""
        index, arrived = self.post(receive, parts, len(self.events))
        if arrived is None:
            self.add_event(index, parts, (), number)
            return
        pieces = self.pieces(parts, arrived)
        if receive.reduce:
            sums = merged((home, self.in_order([(receive.peer, piece)], own)) for home, own, piece in pieces)
        else:
            sums = merged((home, (piece,)) for home, _, piece in pieces)
        self.add_event(index, parts, sums, number)

    def plan_common_sums(self, messages: Sequence[tuple[Receive, list[list[Part]]]], number: int) -> None:
        """What comes from several ranks for one place is added in one go, in the order of the ranks.

        Where all messages have the same chunks, a segment is added while the next one arrives; else all at the end.
        """
        alike = all(receive.reduce and receive.chunks == messages[0][0].chunks for receive, _ in messages)
        count = sum(len(segments) for _, segments in messages)
        entries = []
        for m, (receive, segments) in enumerate(messages):
            for s, parts in enumerate(segments):
                entries.append((s, m, receive, parts, *self.post(receive, parts, len(self.events) + count - 1)))
        if alike:
            entries.sort(key=lambda entry: entry[:2])
        arrivals: dict[Part, list[tuple[int, Span]]] = {}
        for e, (_, m, receive, parts, index, arrived) in enumerate(entries):
            sums: list[tuple[Span, tuple[Span, ...]]] = []
            written: list[Part] = []
            if not receive.reduce:
                sums = [] if arrived is None else [(home, (piece,)) for home, _, piece in self.pieces(parts, arrived)]
                written = parts
            else:
                assert arrived is not None
                for part, (_, _, piece) in zip(parts, self.pieces(parts, arrived), strict=True):
                    arrivals.setdefault(part, []).append((receive.peer, piece))
            due: list[Part] = []
            if alike and m == len(messages) - 1:
                due = parts
            elif not alike and e == count - 1:
                due = self.whole(arrivals)
            sums += [self.common(arrivals, part) for part in due]
            self.add_event(index, [*written, *due], merged(sums), number)

    def whole(self, arrivals: dict[Part, list[tuple[int, Span]]]) -> list[Part]:
        """The places instead of their parts: what comes in one message arrives side by side, so it can be joined."""
        joined: dict[int, dict[int, Span]] = {}
        for (place, _, _), pieces in sorted(arrivals.items()):
            for peer, piece in pieces:
                found = joined.setdefault(place, {}).get(peer)
                joined[place][peer] = Span(ARRIVING, found.start if found else piece.start, piece.stop)
        for place, by_peer in joined.items():
            arrivals[place, 0, self.length(place)] = list(by_peer.items())
        return [(place, 0, self.length(place)) for place in joined]

    def common(self, arrivals: dict[Part, list[tuple[int, Span]]], part: Part) -> tuple[Span, tuple[Span, ...]]:
        """What is added to one part of a place."""
        place, first, last = part
        own = within(self.at[place], first, last)
        return within(self.home[place], first, last), self.in_order(arrivals[part], own)

    def post(self, receive: Receive, parts: Sequence[Part], event: int) -> tuple[int, Span | None]:
        """A receive, straight to its place where that can be; else the room it gets until this event is over."""
        home = spans_of(self.home, parts)
        if not receive.reduce and len(home) <= 1:
            after = max((latest(self.busy.get(p, ()), first, last) + 1 for p, first, last in parts), default=0)
            span = home[0] if home else Span(ARRIVING, 0, 0)
            self.arriving.append(Arriving(receive.peer, span, after, self.reading(parts)))
            return len(self.arriving) - 1, None
        start, after = self.room.take(count_of(parts), event)
        span = Span(ARRIVING, start, start + count_of(parts))
        self.arriving.append(Arriving(receive.peer, span, after, ()))
        return len(self.arriving) - 1, span

    def pieces(self, parts: Sequence[Part], arrived: Span) -> list[tuple[Span, Span, Span]]:
        """For each part: where it is written, where it is now, and where it has arrived."""
        found, start = [], arrived.start
        for place, first, last in parts:
            piece = Span(ARRIVING, start, start + last - first)
            now = self.at.get(place, self.home[place])
            found.append((within(self.home[place], first, last), within(now, first, last), piece))
            start = piece.stop
        return found

    def in_order(self, arrivals: Sequence[tuple[int, Span]], own: Span) -> tuple[Span, ...]:
        """The arrivals and what the rank has, in the order of the ranks."""
        return tuple(span for _, span in sorted([*arrivals, (self.rank, own)]))

    def reading(self, parts: Sequence[Part]) -> tuple[int, ...]:
        """The sends that read any of these."""
        overlapping = (
            send
            for place, first, last in parts
            for start, stop, send in self.readers.get(place, ())
            if start < last and first < stop
        )
        return tuple(sorted(set(overlapping)))

    def add_event(self, receive: int, parts: Sequence[Part], sums: tuple[Sum, ...], number: int) -> None:
        """The next event, which writes these parts; by sums: then the sends that read there have left before."""
        for place, first, last in parts:
            self.fresh.setdefault(place, []).append((first, last, len(self.events)))
        self.events.append((receive, self.reading(parts) if sums else (), sums, number))

    def settle(self, places: set[int]) -> None:
        """These places have been written in whole: they are at home, and nobody reads what was there before."""
        for place in places:
            self.at[place] = self.home[place]
            self.readers.pop(place, None)
            if place in self.fresh:
                self.written[place] = self.fresh.pop(place)
                self.busy[place] = list(self.written[place])
