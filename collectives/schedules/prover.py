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

All ranks of a step are handled at once, in NumPy arrays, and what is asked of the messages alone those of many steps; a
set is mostly a run of neighbours (`runs.py`). A schedule that looks alike from all ranks is proven from the view of one
(`turning.py`), after it was checked that it does.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.contents import Contents, Moved, Values, put, take
from dtrain.collectives.schedules.lookup import Lookup
from dtrain.collectives.schedules.matching import Matching, mismatch
from dtrain.collectives.schedules.proof import Proof
from dtrain.collectives.schedules.refusal import ScheduleError, ranks_text
from dtrain.collectives.schedules.rounds import Folds, Messages, Round, rounds
from dtrain.collectives.schedules.runs import Summed
from dtrain.collectives.schedules.schedule import Schedule
from dtrain.collectives.schedules.turning import prove_turning

_TOGETHER = 64  # steps that are handled together, at most
_CELLS = 1 << 22  # of them all


def prove(schedule: Schedule) -> Proof:
    """Prove one schedule; ScheduleError names rank, step and chunk, what was expected and what was found."""
    return prove_turning(schedule) or prove_fully(schedule)


def prove_fully(schedule: Schedule) -> Proof:
    """The same, without a look at what all ranks have in common."""
    with suppress(ScheduleError):
        return Prover(schedule, _TOGETHER).run()
    return Prover(schedule, 1).run()  # something is wrong somewhere: step by step it is found where


class Prover:
    """Of one schedule, so many steps at once; in one at a time all mistakes are found where they are."""

    def __init__(self, schedule: Schedule, together: int) -> None:
        self.schedule = schedule
        self.spec = schedule.specification
        self.size, self.parts, self.places = schedule.size, schedule.parts, schedule.places
        self.cells = self.size * self.places
        self.step = 0
        self.contents: Contents = (Summed if self.spec.reduces else Moved)(schedule)
        rank, chunks = self.for_all(self.spec.given)
        self.contents.give(rank, rank * self.places + chunks)
        self.together = max(1, min(together, _CELLS // self.cells))
        self.matching, self.landings = Matching(schedule, self.together), Lookup(self.together * self.cells)
        self.sent, self.received, self.added = (np.zeros(self.size) for _ in range(3))  # chunks
        self.messages = 0

    def for_all(self, promise: Callable[[int], range]) -> tuple[Array, Array]:
        """What all ranks have or want: rank and chunk of each. Place q of rank r is cell r * places + q."""
        ranges = [promise(rank) for rank in range(self.size)]
        start, step, length = np.array([(chunks.start, chunks.step, len(chunks)) for chunks in ranges]).T
        rank = np.repeat(np.arange(self.size), length)
        if (length == length[0]).all():
            return rank, (start[:, None] + step[:, None] * np.arange(length[0])).reshape(-1)
        number = np.arange(len(rank)) - (np.cumsum(length) - length)[rank]
        return rank, start[rank] + step[rank] * number

    def run(self) -> Proof:
        steps = 0
        for table in rounds(self.schedule, self.together):
            if len(table.sends) or len(table.receives):
                steps += self.exchange(table)
            self.step += table.steps - 1
            for folds in table.folds:
                self.fold(folds)
            self.step += 1
        equal_bits = self.finish()
        sent, received, added = (count * self.spec.weight for count in (self.sent, self.received, self.added))
        return Proof(steps, self.messages, sent, received, added, equal_bits, self.contents.ordered)

    def exchange(self, table: Round) -> int:
        """Match, read what is sent, then write what arrives; in how many steps there was something to do.

        What is asked of the messages alone is asked of all steps of the table at once.
        """
        sends, receives = table.sends, table.receives
        sent = self.matching.entries(sends, receives)  # in the order of the receives, as all that follows
        if sent is None:
            raise mismatch(self.schedule, self.step, table) if table.steps == 1 else self.error(0, None, "somewhere")
        for messages, verb in ((sends, "sends"), (receives, "receives")):
            if np.count_nonzero(messages.chunks.view(np.uint64) >= self.places):
                self.refuse_chunks(messages, verb)
        self.messages += len(sends)
        self.sent += np.bincount(sends.rank, sends.counts, self.size)
        self.received += np.bincount(receives.rank, receives.counts, self.size)

        read = receives.each(receives.peer) * self.places + sends.chunks[sent]
        landing = receives.each(receives.rank) * self.places + receives.chunks
        reduce, alone = receives.each(receives.reduce), self.check_hazards(receives, read, landing)
        busy = np.bincount(receives.step, minlength=table.steps)
        entries = np.bincount(receives.each(receives.step), minlength=table.steps)
        first, end = self.step, 0
        for t in np.flatnonzero(busy):
            begin, end = end, end + int(entries[t])
            self.step = first + int(t)
            self.move(read[begin:end], landing[begin:end], reduce[begin:end], alone)
        self.step = first
        return int(np.count_nonzero(busy))

    def move(self, read: Array, landing: Array, reduce: Array, alone: bool) -> None:
        """One step."""
        values = self.contents.read(read)
        if np.count_nonzero(absent := self.contents.absent(values)):
            e = int(np.where(absent, read, self.cells).argmin())
            text = f"is sent to rank {landing[e] // self.places}, but is not there"
            raise self.error(*divmod(int(read[e]), self.places), text)
        added = np.count_nonzero(reduce)
        if added == 0:
            self.contents.write(landing, values)
        elif added == len(reduce):
            self.reduce(landing, read, values, alone)
        else:
            self.contents.write(landing[~reduce], take(values, ~reduce))
            self.reduce(landing[reduce], read[reduce], take(values, reduce), alone)

    def check_hazards(self, receives: Messages, read: Array, landing: Array) -> bool:
        """What arrives without being added lands in place: nobody may send from there, or write there, meanwhile.

        Returns whether there is one arrival at most for each cell and step.
        """
        steps = receives.each(receives.step) * self.cells
        reading, writing = steps + read, steps + landing
        alone = self.landings.enter(writing)
        plain = writing
        if receives.reduce.any():
            plain = writing[~receives.each(receives.reduce)]
            self.landings.enter(plain)
        if len(plain) == 0:
            return alone
        if np.count_nonzero(overwritten := self.landings.find(reading)[1]):
            text = "is overwritten by what arrives, in the step in which it is sent"
            raise self.error(*divmod(int(read[overwritten].min()), self.places), text)
        if not alone:
            cells, counts = np.unique(writing, return_counts=True)
            twice = np.intersect1d(cells[counts > 1], plain)
            if len(twice):
                raise self.error(*divmod(int(twice[0]) % self.cells, self.places), "is written twice in one step")
        return alone

    def reduce(self, landing: Array, read: Array, values: Values, alone: bool) -> None:
        """Fold the arrivals and what the target has, from the left in the order of the ranks."""
        origin = read // self.places
        if len(landing) == 0:
            return  # messages of no chunks
        if not self.spec.reduces:
            self.refuse_sum(landing, origin, landing, f", but {self.spec.collective} only moves chunks")
        cells = landing if alone else np.unique(landing)
        target = cells // self.places
        self.added += np.bincount(landing // self.places, minlength=self.size)
        own = self.contents.read(cells)
        if np.count_nonzero(absent := self.contents.absent(own)):
            self.refuse_sum(landing, origin, cells[absent], ", but it is empty")
        if alone:  # one arrival for each cell
            self.contents.write(cells, self.add(cells, values, own, origin < target))
            return
        # All that is added, cell by cell, in the order of the ranks.
        which, rank = np.concatenate([landing, cells]), np.concatenate([origin, target])
        order = np.lexsort((rank, which))
        first = np.flatnonzero(np.diff(which[order], prepend=-1))
        lengths = np.diff(first, append=len(order))
        values = tuple(np.concatenate(both)[order] for both in zip(values, own, strict=True))
        total = take(values, first)
        for turn in range(1, int(lengths.max())):
            left_over = np.flatnonzero(turn < lengths)
            next_one = take(values, first[left_over] + turn)
            put(total, left_over, self.add(cells[left_over], take(total, left_over), next_one))
        self.contents.write(cells, total)

    def add(self, cells: Array, left: Values, right: Values, before: Array | None = None) -> Values:
        """The sum of two contents, in this order but where not `before`; refused where both have a contribution."""
        total = self.contents.add(left, right, before)
        twice = self.contents.overlap(left, right, total)
        if np.count_nonzero(twice) and not self.spec.promise.idempotent:
            e = int(np.where(twice, cells, cells.max() + 1).argmin())
            common = self.contents.common(left, right, e)
            text = f"the contribution of {ranks_text(common)} is added a second time"
            raise self.error(*divmod(int(cells[e]), self.places), text)
        return total

    def fold(self, folds: Folds) -> None:
        """Local folds."""
        named = np.concatenate([folds.into[:, None], folds.chunks], axis=1)
        if np.count_nonzero(strange := (named < 0) | (named >= self.places)):
            e, column = np.argwhere(strange)[0]
            raise self.strange(int(folds.rank[e]), int(named[e, column]), "folds")
        into = folds.rank * self.places + folds.into
        total: Values = ()
        for number, column in enumerate(folds.chunks.T):
            if np.count_nonzero(other := (column - folds.into) % self.parts):
                e = int((other != 0).argmax())
                raise self.error(
                    int(folds.rank[e]), int(column[e]), f"is folded into place {folds.into[e]}, not its own"
                )
            value = self.contents.read(folds.rank * self.places + column)
            if np.count_nonzero(absent := self.contents.absent(value)):
                e = int(absent.argmax())
                text = f"is folded into place {folds.into[e]}, but is not there"
                raise self.error(int(folds.rank[e]), int(column[e]), text)
            total = self.add(into, total, value) if number else value
        self.added[folds.rank] += folds.chunks.shape[1] - 1
        self.contents.write(into, total)

    def finish(self) -> bool:
        """The post-condition; True where all who want a chunk have the same bits of it."""
        rank, chunks = self.for_all(self.spec.wanted)
        cells = rank * self.places + chunks
        counts = np.array([len(self.spec.contributors(r)) for r in range(self.size)])
        if (wrong := self.contents.wrong(cells, counts[rank])).any():
            e = int(wrong.argmax())
            contributors = self.spec.contributors(int(rank[e]))
            expected = f"the sum of {ranks_text(contributors)}" if self.spec.reduces else "the chunk"
            text = f"after the last step: expected {expected}, found {self.contents.describe(int(cells[e]))}"
            raise self.error(int(rank[e]), int(chunks[e]), text)
        if not self.spec.reduces or (counts != counts[0]).any() or self.spec.promise.idempotent:
            return True  # chunks that are moved are what they were; in a scan all want sums of their own
        forms, one = self.contents.forms(cells), np.zeros(self.places, np.uint64)
        one[chunks] = forms
        return bool((one[chunks] == forms).all())

    # Refusals

    def error(self, rank: int, chunk: int | None, text: str) -> ScheduleError:
        return ScheduleError(self.schedule, rank, self.step, chunk, text)

    def refuse_chunks(self, messages: Messages, verb: str) -> None:
        """Chunks that do not exist."""
        e = int(((messages.chunks < 0) | (messages.chunks >= self.places)).argmax())
        raise self.strange(int(messages.each(messages.rank)[e]), int(messages.chunks[e]), verb)

    def strange(self, rank: int, chunk: int, verb: str) -> ScheduleError:
        """A chunk that does not exist."""
        return self.error(rank, chunk, f"{verb} it, but there are only chunks 0 to {self.places - 1}")

    def refuse_sum(self, landing: Array, origin: Array, wrong: Array, why: str) -> None:
        """Something is added to the first of these cells, and must not be."""
        cell = int(wrong.min())
        source = origin[(landing == cell).argmax()]
        raise self.error(*divmod(cell, self.places), f"what rank {source} sends is added to it{why}")
