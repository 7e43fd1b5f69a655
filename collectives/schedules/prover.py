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
from dtrain.collectives.schedules.contents import Contents, Moved, Summed, Values, choose, put, take
from dtrain.collectives.schedules.deadlock import waiting_cycle
from dtrain.collectives.schedules.refusal import ScheduleError, ranks_text
from dtrain.collectives.schedules.rounds import Folds, Messages, Round, rounds
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
        everyone = np.arange(self.size)
        given = [self.cells(rank, self.spec.given(rank)) for rank in range(self.size)]
        self.contents.give(np.repeat(everyone, [len(cells) for cells in given]), np.concatenate(given))
        self.sent, self.received, self.added = (np.zeros(self.size, np.int64) for _ in range(3))
        self.messages = 0

    def cells(self, rank: int, chunks: range) -> Array:
        """The numbers of these places of a rank; see `Contents`."""
        return rank * self.places + np.arange(chunks.start, chunks.stop, chunks.step)

    def run(self) -> Proof:
        steps = 0
        for number, round_ in enumerate(rounds(self.schedule)):
            self.step = number
            if len(round_.sends) or len(round_.receives):
                steps += 1
                self.exchange(round_)
            for folds in round_.folds:
                self.fold(folds)
        self.step += 1
        equal_bits = self.finish()
        sent, received, added = (count * self.spec.weight for count in (self.sent, self.received, self.added))
        return Proof(steps, self.messages, sent, received, added, equal_bits, self.contents.ordered)

    def exchange(self, round_: Round) -> None:
        """Match, read what is sent, then write what arrives."""
        sends, receives = round_.sends, round_.receives
        outgoing, incoming = sends.rank * self.size + sends.peer, receives.peer * self.size + receives.rank
        by_pair, arrivals = np.argsort(outgoing, kind="stable"), np.argsort(incoming, kind="stable")
        sent_entries, entries = sends.entries(by_pair), receives.entries(arrivals)
        if not self.matched(sends, by_pair, sent_entries, receives, arrivals, entries):
            self.explain(round_)
        for messages, verb in ((sends, "sends"), (receives, "receives")):
            if len(messages.chunks) and messages.chunks.view(np.uint64).max() >= self.places:
                self.refuse_chunks(messages, verb)
        self.messages += len(sends)
        np.add.at(self.sent, sends.rank, sends.counts)
        np.add.at(self.received, receives.rank, receives.counts)

        read = sends.each(sends.rank) * self.places + sends.chunks
        values = self.contents.read(read)
        if (absent := self.contents.absent(values)).any():
            e = int(absent.argmax())
            peer = sends.each(sends.peer)[e]
            raise self.error(*divmod(int(read[e]), self.places), f"is sent to rank {peer}, but is not there")
        values = take(values, sent_entries)  # from the order of the sends to that of the receives
        landing = (receives.each(receives.rank) * self.places + receives.chunks)[entries]
        reduce, origin = receives.each(receives.reduce)[entries], receives.each(receives.peer)[entries]
        in_order = np.sort(landing)
        alone = not (in_order[1:] == in_order[:-1]).any()
        if not reduce.any():
            self.check_hazards(read, landing, landing, alone)
            self.contents.write(landing, values)
        elif reduce.all():
            self.reduce(landing, origin, values, alone)
        else:
            self.check_hazards(read, landing[~reduce], landing, alone)
            self.contents.write(landing[~reduce], take(values, ~reduce))
            self.reduce(landing[reduce], origin[reduce], take(values, reduce), alone)

    def matched(
        self, sends: Messages, by_pair: Array, sent: Array, receives: Messages, arrivals: Array, received: Array
    ) -> bool:
        """Whether the sends are the receives: the same ranks, chunk for chunk."""
        if len(sends) != len(receives):
            return False
        ranks, peers = sends.rank[by_pair], sends.peer[by_pair]
        return (
            bool(((ranks == receives.peer[arrivals]) & (peers == receives.rank[arrivals]) & (ranks != peers)).all())
            and self.equal_counts(sends, by_pair, receives, arrivals)
            and bool((sends.chunks[sent] % self.parts == receives.chunks[received] % self.parts).all())
        )

    def equal_counts(self, sends: Messages, by_pair: Array, receives: Messages, arrivals: Array) -> bool:
        """Whether the messages have the same numbers of chunks."""
        if sends.single and receives.single:
            return True
        return np.array_equal(sends.counts[by_pair], receives.counts[arrivals])

    def check_hazards(self, read: Array, plain: Array, landing: Array, alone: bool) -> None:
        """What arrives without being added lands in place: nobody may send from there, or write there, meanwhile."""
        in_order = np.sort(plain)
        at = np.minimum(np.searchsorted(in_order, read), len(plain) - 1)
        if (overwritten := in_order[at] == read).any():
            text = "is overwritten by what arrives, in the step in which it is sent"
            raise self.error(*divmod(int(read[overwritten.argmax()]), self.places), text)
        if not alone:
            cells, counts = np.unique(landing, return_counts=True)
            twice = np.intersect1d(cells[counts > 1], plain)
            if len(twice):
                raise self.error(*divmod(int(twice[0]), self.places), "is written twice in one step")

    def reduce(self, landing: Array, origin: Array, values: Values, alone: bool) -> None:
        """Fold the arrivals and what the target has, from the left in the order of the ranks."""
        if not self.spec.reduces:
            e = int(landing.argmin())
            text = f"what rank {origin[e]} sends is added to it, but {self.spec.collective} only moves chunks"
            raise self.error(*divmod(int(landing[e]), self.places), text)
        target = landing // self.places
        np.add.at(self.added, target, 1)
        own = self.contents.read(landing)
        if (absent := self.contents.absent(own)).any():
            e = int(absent.argmax())
            text = f"what rank {origin[e]} sends is added to it, but it is empty"
            raise self.error(*divmod(int(landing[e]), self.places), text)
        if alone:  # one arrival for each cell
            before = origin < target
            self.contents.write(landing, self.add(landing, choose(before, values, own), choose(before, own, values)))
            return
        order = np.lexsort((origin, landing))
        first = np.flatnonzero(np.diff(landing[order], prepend=-1))
        lengths = np.diff(first, append=len(order))
        cells, rank = landing[order][first], target[order][first]
        mine, has_mine = take(own, order[first]), np.zeros(len(first), bool)
        position, total = np.zeros(len(first), np.int64), mine
        for turn in range(int(lengths.max()) + 1):
            # Each cell that still misses something adds its next arrival, or its own content when that is due.
            arrival = order[np.minimum(first + position, len(order) - 1)]
            due = ~has_mine & ((position == lengths) | (origin[arrival] > rank))
            value = choose(due, mine, take(values, arrival))
            position, has_mine = position + ~due, has_mine | due
            if turn == 0:
                total = value
                continue
            left_over = np.flatnonzero(turn <= lengths)
            put(total, left_over, self.add(cells[left_over], take(total, left_over), take(value, left_over)))
        self.contents.write(cells, total)

    def add(self, cells: Array, left: Values, right: Values) -> Values:
        """The sum of two contents; refused where they have a contribution in common."""
        if not self.spec.promise.idempotent and (twice := self.contents.overlap(left, right)).any():
            e = int(np.where(twice, cells, cells.max() + 1).argmin())
            common = self.contents.common(left, right, e)
            text = f"the contribution of {ranks_text(common)} is added a second time"
            raise self.error(*divmod(int(cells[e]), self.places), text)
        return self.contents.add(left, right)

    def fold(self, folds: Folds) -> None:
        """Local folds."""
        into = folds.rank * self.places + folds.into
        total: Values = ()
        for number, column in enumerate(folds.chunks.T):
            if (other := (column - folds.into) % self.parts != 0).any():
                e = int(other.argmax())
                raise self.error(
                    int(folds.rank[e]), int(column[e]), f"is folded into place {folds.into[e]}, not its own"
                )
            value = self.contents.read(folds.rank * self.places + column)
            if (absent := self.contents.absent(value)).any():
                e = int(absent.argmax())
                text = f"is folded into place {folds.into[e]}, but is not there"
                raise self.error(int(folds.rank[e]), int(column[e]), text)
            total = self.add(into, total, value) if number else value
        self.added[folds.rank] += folds.chunks.shape[1] - 1
        self.contents.write(into, total)

    def finish(self) -> bool:
        """The post-condition; True where all who want a chunk have the same bits of it."""
        first, known, equal = np.zeros(self.places, np.uint64), np.zeros(self.places, bool), True
        alike = self.spec.contributors(0) == self.spec.contributors(self.size - 1)  # for all; not in a scan
        together = 64 if alike else 1  # ranks looked at in one go
        for begin in range(0, self.size, together):
            ranks = range(begin, min(begin + together, self.size))
            cells = np.concatenate([self.cells(rank, self.spec.wanted(rank)) for rank in ranks])
            contributors = self.spec.contributors(begin)
            if (wrong := self.contents.wrong(cells, contributors)).any():
                cell = int(cells[wrong.argmax()])
                expected = f"the sum of {ranks_text(contributors)}" if self.spec.reduces else "the chunk"
                text = f"after the last step: expected {expected}, found {self.contents.describe(cell)}"
                raise self.error(*divmod(cell, self.places), text)
            if alike and not self.spec.promise.idempotent:
                chunks, forms = cells % self.places, self.contents.forms(cells)
                fresh = ~known[chunks]
                first[chunks[fresh]] = forms[fresh]
                known[chunks] = True
                equal = equal and bool((first[chunks] == forms).all())
        return equal

    # Refusals

    def error(self, rank: int, chunk: int | None, text: str) -> ScheduleError:
        return ScheduleError(self.schedule, rank, self.step, chunk, text)

    def refuse_chunks(self, messages: Messages, verb: str) -> None:
        """Chunks that do not exist."""
        e = int(((messages.chunks < 0) | (messages.chunks >= self.places)).argmax())
        text = f"{verb} it, but there are only chunks 0 to {self.places - 1}"
        raise self.error(int(messages.each(messages.rank)[e]), int(messages.chunks[e]), text)

    def check_peers(self, messages: Messages, verb: str) -> None:
        """Peers that do not exist, or are the rank itself."""
        wrong = (messages.peer < 0) | (messages.peer >= self.size) | (messages.peer == messages.rank)
        if wrong.any():
            m = int(wrong.argmax())
            peer, chunks = int(messages.peer[m]), messages.chunks_of(m)
            who = "itself" if peer == messages.rank[m] else f"rank {peer}, which does not exist"
            first = int(chunks[0]) if len(chunks) else None
            raise self.error(int(messages.rank[m]), first, f"{verb} {who}")

    def explain(self, round_: Round) -> None:
        """Say which message of this step has no partner, and whether the ranks would wait for one another for ever."""
        self.check_peers(round_.sends, "sends to")
        self.check_peers(round_.receives, "receives from")
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


def _by_pair(messages: Messages, outgoing: bool) -> dict[tuple[int, int], list[list[int]]]:
    found: dict[tuple[int, int], list[list[int]]] = {}
    for m in range(len(messages)):
        rank, peer = int(messages.rank[m]), int(messages.peer[m])
        found.setdefault((rank, peer) if outgoing else (peer, rank), []).append(messages.chunks_of(m).tolist())
    return found


def _first(chunks: list[list[int]]) -> int | None:
    return chunks[0][0] if chunks[0] else None
