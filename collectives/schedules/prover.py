"""The prover: runs a schedule symbolically, for all ranks in one process, and refuses a wrong one.

    rank 2, chunk 5:   {0, 1}  +  {2}  ->  {0, 1, 2}       a set of contributions instead of numbers

What `prove` shows of a schedule, for its size:
- every message that is received is sent in the same step, by and to the same rank, with the same chunks, and the other
  way round: so no rank waits for ever (see `schedule.py`);
- nobody sends a chunk that it does not have, or reads one in the step in which it is overwritten;
- no contribution is added twice, and every wanted chunk ends with all that it should have.
And it finds out, of the schedules that are right: steps, chunks sent and added per rank; whether all ranks get the same
bits (x+y = y+x holds for floating-point numbers, brackets matter: equal up to the order of each pair); whether every
sum keeps the order of the ranks.

Sets are rows of bits in NumPy arrays, all ranks of a step are handled at once.
"""

from dataclasses import dataclass

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.contents import Contents, Moved, Summed, Values
from dtrain.collectives.schedules.deadlock import waiting_cycle
from dtrain.collectives.schedules.refusal import ScheduleError, ranks_text
from dtrain.collectives.schedules.rounds import Messages, Round, rounds
from dtrain.collectives.schedules.schedule import Schedule, chunk_list


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about a schedule that is right. Shares are of the vector that `Cost` calls n."""

    steps: int  # in which any message travels
    messages: int
    sent: Array  # per rank, the share of n sent
    received: Array
    added: Array  # per rank, the share of n that was added to something
    equal_bits: bool  # all ranks that want a chunk get the same bits
    ordered: bool  # every sum is in the order of the ranks


def prove(schedule: Schedule) -> Proof:
    """Prove one schedule; ScheduleError names rank, step and chunk, what was expected and what was found."""
    return _Prover(schedule).run()


class _Prover:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.spec = schedule.specification
        self.size, self.parts, self.places = schedule.size, schedule.parts, schedule.places
        self.step = 0
        self.contents: Contents = (Summed if self.spec.reduces else Moved)(schedule)
        for rank in range(self.size):
            self.contents.give(rank, np.asarray(self.spec.given(rank), np.int64))
        self.sent, self.received, self.added = (np.zeros(self.size, np.int64) for _ in range(3))
        self.messages = 0

    def run(self) -> Proof:
        steps = 0
        for self.step, round_ in enumerate(rounds(self.schedule)):
            steps += len(round_.receives) + len(round_.sends) > 0
            self.check(round_.sends, "sends")
            self.check(round_.receives, "receives")
            self.exchange(round_)
            for folds in round_.folds:
                self.fold(folds.rank, folds.into, folds.chunks)
        self.step += 1
        self.finish()
        return Proof(
            steps,
            self.messages,
            *(count * self.spec.weight for count in (self.sent, self.received, self.added)),
            equal_bits=self.contents.equal_bits(),
            ordered=self.contents.ordered,
        )

    def check(self, messages: Messages, verb: str) -> None:
        """Peers and chunks exist."""
        wrong = (messages.peer < 0) | (messages.peer >= self.size) | (messages.peer == messages.rank)
        if wrong.any():
            m = int(wrong.argmax())
            peer = int(messages.peer[m])
            what = "itself" if peer == messages.rank[m] else f"rank {peer}, which does not exist"
            self.refuse(int(messages.rank[m]), f"{verb} {'to' if verb == 'sends' else 'from'} {what}", messages, m)
        wrong = (messages.chunks < 0) | (messages.chunks >= self.places)
        if wrong.any():
            chunk = int(messages.chunks[wrong.argmax()])
            rank = int(messages.each(messages.rank)[wrong.argmax()])
            raise self.error(rank, chunk, f"{verb} it, but there are only chunks 0 to {self.places - 1}")

    def exchange(self, round_: Round) -> None:
        """Match, read what is sent, then write what arrives."""
        sends, receives = round_.sends, round_.receives
        by_pair, arrivals = (
            np.argsort(low * self.size + high, kind="stable")
            for low, high in ((sends.rank, sends.peer), (receives.peer, receives.rank))
        )
        if not self.matched(sends, by_pair, receives, arrivals):
            self.explain(round_)
        if not len(receives):
            return
        self.messages += len(sends)
        source = sends.each(sends.rank)
        read = self.contents.read(source, sends.chunks)
        if (absent := self.contents.absent(read)).any():
            e = int(absent.argmax())
            owner = f"sends it to rank {sends.each(sends.peer)[e]}, but does not have it"
            raise self.error(int(source[e]), int(sends.chunks[e]), owner)
        np.add.at(self.sent, sends.rank, sends.counts)
        np.add.at(self.received, receives.rank, receives.counts)
        # The values, from the order of the sends to that of the receives.
        sent_entries, entries = _entries(sends, by_pair), _entries(receives, arrivals)
        values = self.contents.take(read, sent_entries)
        target, place = receives.each(receives.rank)[entries], receives.chunks[entries]
        origin, reduce = receives.each(receives.peer)[entries], receives.each(receives.reduce)[entries]
        self.check_hazards(sends, target, place, reduce)
        plain = ~reduce
        if plain.all():
            self.contents.write(target, place, values)
            return
        self.contents.write(target[plain], place[plain], self.contents.take(values, plain))
        self.reduce(target[reduce], place[reduce], origin[reduce], self.contents.take(values, reduce))

    def matched(self, sends: Messages, by_pair: Array, receives: Messages, arrivals: Array) -> bool:
        """Whether the sends are the receives."""
        return (
            len(sends) == len(receives)
            and np.array_equal(sends.rank[by_pair], receives.peer[arrivals])
            and np.array_equal(sends.peer[by_pair], receives.rank[arrivals])
            and np.array_equal(sends.counts[by_pair], receives.counts[arrivals])
            and np.array_equal(
                sends.chunks[_entries(sends, by_pair)] % self.parts,
                receives.chunks[_entries(receives, arrivals)] % self.parts,
            )
        )

    def check_hazards(self, sends: Messages, target: Array, place: Array, reduce: Array) -> None:
        """What arrives without being added lands in place: nobody may send from there, or write there, meanwhile."""
        landing = target * self.places + place
        plain = landing[~reduce]
        if not len(plain):
            return
        read = sends.each(sends.rank) * self.places + sends.chunks
        overwritten = np.isin(plain, read)
        if overwritten.any():
            rank, chunk = divmod(int(plain[overwritten.argmax()]), self.places)
            raise self.error(rank, chunk, "is overwritten by what arrives, in the step in which it is sent")
        unique, counts = np.unique(landing, return_counts=True)
        twice = np.isin(unique[counts > 1], plain)
        if twice.any():
            rank, chunk = divmod(int(unique[counts > 1][twice.argmax()]), self.places)
            raise self.error(rank, chunk, "is written twice in one step")

    def reduce(self, target: Array, place: Array, origin: Array, values: Values) -> None:
        """Fold the arrivals and what the target has, from the left in the order of the ranks."""
        if not self.spec.reduces:
            text = f"what rank {origin[0]} sends is added to it, but {self.spec.collective} only moves chunks"
            raise self.error(int(target[0]), int(place[0]), text)
        np.add.at(self.added, target, 1)
        own = self.contents.read(target, place)
        if (absent := self.contents.absent(own)).any():
            e = int(absent.argmax())
            raise self.error(
                int(target[e]), int(place[e]), f"what rank {origin[e]} sends is added to it, but it is empty"
            )
        key = target * self.places + place
        if len(np.unique(key)) == len(key):  # one arrival for each place
            before = origin < target
            left, right = self.contents.choose(before, values, own), self.contents.choose(before, own, values)
            self.contents.write(target, place, self.add(target, place, left, right))
            return
        order = np.lexsort((origin, key))
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        lengths = np.diff(first, append=len(order))
        rank, chunk = target[order][first], place[order][first]
        mine, has_mine = self.contents.take(own, order[first]), np.zeros(len(first), bool)
        position, total = np.zeros(len(first), np.int64), mine
        for turn in range(int(lengths.max()) + 1):
            # Each place that still misses something adds its next arrival, or its own content when that is due.
            arrival = order[np.minimum(first + position, len(order) - 1)]
            due = ~has_mine & ((position == lengths) | (origin[arrival] > rank))
            value = self.contents.choose(due, mine, self.contents.take(values, arrival))
            position, has_mine = position + ~due, has_mine | due
            if turn == 0:
                total = value
                continue
            left_over = np.flatnonzero(turn <= lengths)
            part = self.contents.take(total, left_over), self.contents.take(value, left_over)
            total = self.contents.put(total, left_over, self.add(rank[left_over], chunk[left_over], *part))
        self.contents.write(rank, chunk, total)

    def add(self, rank: Array, chunk: Array, left: Values, right: Values) -> Values:
        """The sum of two contents; refused where they have a contribution in common."""
        twice = self.contents.overlap(left, right)
        if not self.spec.promise.idempotent and twice.any():
            e = int(twice.argmax())
            common = self.contents.common(left, right, e)
            text = f"adds the contribution of {ranks_text(common)} a second time"
            raise self.error(int(rank[e]), int(chunk[e]), text)
        return self.contents.add(left, right)

    def fold(self, rank: Array, into: Array, chunks: Array) -> None:
        """Local folds."""
        total: Values | None = None
        for column in chunks.T:
            if (other := (column - into) % self.parts != 0).any():
                e = int(other.argmax())
                raise self.error(int(rank[e]), int(column[e]), f"is folded into place {into[e]}, another chunk's")
            value = self.contents.read(rank, column)
            if (absent := self.contents.absent(value)).any():
                e = int(absent.argmax())
                raise self.error(int(rank[e]), int(column[e]), f"is folded into chunk {into[e]}, but it is empty")
            total = value if total is None else self.add(rank, into, total, value)
        assert total is not None
        self.added[rank] += chunks.shape[1] - 1
        self.contents.write(rank, into, total)

    def finish(self) -> None:
        """The post-condition."""
        for rank in range(self.size):
            chunks = np.asarray(self.spec.wanted(rank), np.int64)
            contributors = self.spec.contributors(rank)
            wrong = self.contents.wrong(rank, chunks, contributors)
            if wrong.any():
                chunk = int(chunks[wrong.argmax()])
                found = self.contents.describe(rank, chunk)
                expected = f"the sum of {ranks_text(contributors)}" if self.spec.reduces else "the chunk"
                raise self.error(rank, chunk, f"after the last step: expected {expected}, found {found}")

    # Refusals

    def error(self, rank: int, chunk: int | None, text: str) -> ScheduleError:
        return ScheduleError(self.schedule, rank, self.step, chunk, text)

    def refuse(self, rank: int, text: str, messages: Messages, m: int) -> None:
        chunks = messages.chunks_of(m)
        raise self.error(rank, int(chunks[0]) if len(chunks) else None, text)

    def explain(self, round_: Round) -> None:
        """Say which message of this step has no partner, and whether the ranks would wait for one another for ever."""
        cycle = waiting_cycle(self.schedule)
        if cycle is not None:
            raise ScheduleError(self.schedule, *cycle)
        sent = _by_pair(round_.sends, outgoing=True)
        received = _by_pair(round_.receives, outgoing=False)
        for (source, target), chunks in sorted(received.items()):
            if (source, target) not in sent:
                text = f"waits for chunks {chunk_list(chunks[0])} from rank {source}, which sends it nothing"
                raise self.error(target, _first(chunks), text + " in this step")
        for (source, target), chunks in sorted(sent.items()):
            if (source, target) not in received:
                text = f"sends chunks {chunk_list(chunks[0])} to rank {target}, which receives nothing from it"
                raise self.error(source, _first(chunks), text + " in this step")
        for (source, target), chunks in sorted(sent.items()):
            expected = received[source, target]
            if len(chunks) != len(expected):
                text = f"sends {len(chunks)} messages to rank {target}, which receives {len(expected)}"
                raise self.error(source, _first(chunks), text + " from it")
            for mine, theirs in zip(chunks, expected, strict=True):
                if [c % self.parts for c in mine] != [c % self.parts for c in theirs]:
                    differ = [b for a, b in zip(mine, theirs, strict=False) if a % self.parts != b % self.parts]
                    longer = theirs[len(mine) :] or mine[len(theirs) :]
                    raise self.error(
                        target,
                        (differ or longer)[0],
                        f"expects chunks {chunk_list(theirs)} from rank {source}, which sends {chunk_list(mine)}",
                    )
        raise AssertionError("messages that do not match, and no reason found")


def _entries(messages: Messages, order: Array) -> Array:
    """The indices of the chunks of the messages in this order."""
    if len(messages.chunks) == len(messages):
        return order
    counts = messages.counts[order]
    begin = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(messages.start[order] - begin, counts)


def _by_pair(messages: Messages, outgoing: bool) -> dict[tuple[int, int], list[list[int]]]:
    found: dict[tuple[int, int], list[list[int]]] = {}
    for m in range(len(messages)):
        rank, peer = int(messages.rank[m]), int(messages.peer[m])
        found.setdefault((rank, peer) if outgoing else (peer, rank), []).append(messages.chunks_of(m).tolist())
    return found


def _first(chunks: list[list[int]]) -> int | None:
    return chunks[0][0] if chunks[0] else None
