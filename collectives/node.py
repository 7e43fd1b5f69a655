"""The ranks of one node in one communicator: what they share, and the steps of a collective between them.

Each rank writes only its own part of the control segment, and everybody reads all parts:

    word 0       ARRIVED   number of the last collective to which this rank has brought its data
    word 16      REDUCED   number of the last collective whose part this rank has computed and written
    word 32      bell      of rank 0 alone; with the two above in `flags.py`
    word 40 ..   identity  of the process, for `cross_memory.py`
    word 48 ..   records   a ring: what collective number n is (name, operation, dtype, count, place)
    then         texts     a ring: who called it, of the first collectives, or of all with DTRAIN_DEBUG=1
    then         staging   for arrays that do not lie in the arena (`staging.py`)

Collectives of a communicator are numbered 1, 2, 3, ... in program order, the same on all ranks. Invariants:

- Flags are monotone. ARRIVED = n says: my data for all collectives up to n may be read. REDUCED = n says: I shall
  neither read nor write for any collective up to n.
- Data is written before its flag (128 bytes apart: flags of different words never share a line).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dtrain.collectives import cross_memory, records, staging
from dtrain.collectives.arena import Arena, Place
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.flags import Flags, Peers
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.progress import Progress
from dtrain.collectives.records import ASIDE, NO_PLACE, RECORD_WORDS, RECORDS, RING, SIGNATURE, Record
from dtrain.collectives.reports import Reports
from dtrain.collectives.staging import LONG, Ring, Staging
from dtrain.collectives.transport import Segment, Transport
from dtrain.collectives.unfinished import IN_FLIGHT, Unfinished
from dtrain.collectives.waiting import ARRIVED, CHECKED, IDENTITY, REDUCED, Patience, debugging
from dtrain.collectives.work import Request


class Compared:
    """One of the first collectives, started by messages: nobody waits in the MPI library before all have come."""

    def __init__(self, node: "Node", number: int, request: Request) -> None:
        self._node = node
        self._number = number
        self._request = request

    def test(self) -> bool:
        """Has it finished? Never waits."""
        if not self._node.closed:
            if not self._node.have_arrived(self._number):
                return False
            self._node.await_arrived(self._number)
        return self._request.test()

    def wait(self) -> None:
        """Return when it has finished."""
        if not self._node.closed:
            self._node.await_arrived(self._number)
        self._request.wait()


class Node:
    """What one rank shares with the other ranks of its node."""

    def __init__(self, transport: Transport, patience: Patience, together: Progress) -> None:
        """Collective. `together` is helped along in every wait."""
        segment = transport.share(staging.END)
        self.rank = transport.rank
        self.size = transport.size
        self._segment = segment
        self._together = together
        self.flags = Flags(segment, self.rank, staging.BEGIN, patience)
        self._words = self.flags.words
        self._mine = self.flags.mine
        self.peers = self.flags.peers
        self._octets = segment.parts[self.rank]
        self._octets[: staging.BEGIN] = bytes(staging.BEGIN)
        self._staging = Staging(segment)
        self.turn = np.zeros(2, np.int64)
        """The number of the last collective, and one to which all peers had come when machine code last looked."""
        self._turn = self.turn.data
        self.traced = 1 << 62 if debugging() else CHECKED  # up to here, who called is written beside the record
        self._alike = 0  # up to here, the records of all ranks were compared
        self.reports = Reports(self.rank, self.flags, segment.parts, self.traced, transport.world_ranks, together)
        self.closed = False
        self.kept: dict[str, Any] = {}
        """What modules prepare once for all their calls, by their names."""
        self.works = Unfinished(self, together)

        def share(nbytes: int) -> Segment:
            self._meet()
            return transport.share(nbytes)

        def agree(flags: Array) -> Array:
            self._meet()
            least = np.empty_like(flags)
            transport.all_reduce(flags, least, "min")
            return least

        self.arena = Arena(self.rank, share, agree)
        for word, value in enumerate(cross_memory.identity()):
            self._mine[IDENTITY + word] = value
        code = machine_code()
        # Both are collective: everybody's flags are zero, and identities written, before anybody goes on.
        if _all(transport, transport.crowded and code is not None and code.raise_flag is not None):
            self.flags.ring()
        self.processes = [words[IDENTITY] for words in self._words]
        identities = [words[IDENTITY : IDENTITY + cross_memory.WORDS].tolist() for _, words in self.peers]
        self.reads = _all(transport, cross_memory.wanted() and all(cross_memory.reaches(*each) for each in identities))
        """Whether every rank may copy straight out of the memory of every other."""

    @property
    def number(self) -> int:
        """Of the last collective."""
        return self._turn[0]

    def finish(self) -> None:
        """Return when all works started here are done, on all ranks."""
        self.works.complete(self.number)
        if self.works.last:
            self.await_reduced(self.works.last)

    def close(self) -> None:
        """Collective: unmap everything."""
        self.closed = True
        self.arena.close()
        self.works.close()
        self.kept.clear()
        self._staging.close()
        self.flags.close()
        self._octets.release()
        self._segment.free()

    # One collective: begin, (write data), arrive, await_arrived, (compute), reduced, await_reduced

    def begin(
        self,
        name: str,
        algorithm: str,
        op: str = "",
        array: Array | None = None,
        place: Place = NO_PLACE,
        extra: int = 0,
        aside: Place = NO_PLACE,
    ) -> int:
        """The number of a new collective, after writing its record.

        Everything must be equal on all ranks, except `aside`: a place of this rank alone that the peers look up.
        """
        dtype, count = (None, 0) if array is None else (array.dtype, array.size)
        return self.begin_record(records.record(name, algorithm, op, dtype, count, place, extra), aside)

    def begin_record(self, record: Record, aside: Place = NO_PLACE) -> int:
        """`begin` with a prepared record."""
        if len(self.works.pending) >= IN_FLIGHT:
            self.works.complete(self.works.pending[0].number)
        self._turn[0] = number = self._turn[0] + 1
        offset = 8 * RECORDS + 8 * RECORD_WORDS * (number % RING)
        records.pack(self._octets, offset, number, *record, aside[0] << 48 | aside[1])
        if number <= self.traced:
            records.write_text(self._octets, number)
        return number

    def arrive(self, number: int) -> None:
        """Publish: my data for this collective may be read."""
        self.flags.put(ARRIVED, number)

    def await_arrived(self, number: int, peers: Peers | None = None) -> None:
        """Return when the peers (default: all) have brought their data; CollectiveMismatch if one brought other."""
        slot = RECORDS + RECORD_WORDS * (number % RING) + SIGNATURE
        other = self._await(ARRIVED, number, peers, slot)
        if other is not None:
            raise self.reports.mismatch(other, number)
        if self._alike < self.traced:
            self._compare()

    def only(self, rank: int) -> Peers:
        """One rank, as peers; nobody if it is this rank itself."""
        return [] if rank == self.rank else [(rank, self._words[rank])]

    def have_arrived(self, number: int, peers: Peers | None = None) -> bool:
        """Whether `await_arrived` would return at once."""
        return all(words[ARRIVED] >= number for _, words in (self.peers if peers is None else peers))

    def aside(self, rank: int, number: int) -> Place | None:
        """The place that a rank which has arrived wrote aside; None when it gave none, or too long ago."""
        if self._words[rank][RECORDS + RECORD_WORDS * (number % RING)] != number:
            return None
        return records.unpacked(self.packed_aside(rank, number))

    def packed_aside(self, rank: int, number: int) -> int:
        """The word in which this place stands."""
        return self._words[rank][RECORDS + RECORD_WORDS * (number % RING) + ASIDE]

    def at_home(self, rank: int, where: int) -> tuple[int, int]:
        """Process, 0 for this one, and address of what a rank put at this packed place, in the window or at home."""
        place = records.unpacked(where)
        assert place is not None
        if place[0] == cross_memory.PRIVATE:
            return self.processes[rank], place[1]
        return 0, address(self.arena.part(rank, place, 1, np.dtype(np.uint8)))

    def reduced(self, number: int) -> None:
        """Publish: I neither read nor write any more for collectives up to this one."""
        self.flags.put(REDUCED, number)

    def await_reduced(self, number: int, peers: Peers | None = None) -> None:
        """Return when the peers (default: all) neither read nor write any more for collectives up to this one."""
        self._await(REDUCED, number, peers)

    def have_reduced(self, number: int, peers: Peers | None = None) -> bool:
        """Whether `await_reduced` would return at once, with this rank's own part."""
        if self._mine[REDUCED] < number:
            return False
        return all(words[REDUCED] >= number for _, words in (self.peers if peers is None else peers))

    def alone(self, number: int) -> bool:
        """Whether this collective is neither compared nor has works before it: machine code may do it in one go."""
        # `pending` first: a work is at work before it is taken out, so none falls between the two looks.
        return number > self.traced and not self.works.pending and not self.works.at_work

    def note(self, name: str, algorithm: str, op: str = "", array: Array | None = None, extra: int = 0) -> int:
        """Number and publish a collective that runs elsewhere (by messages), for the reports and checks."""
        number = self.begin(name, algorithm, op, array, extra=extra)
        self.arrive(number)
        if number % (RING // 4) == 0:  # nobody here waits for anybody: a peer's record must not be overwritten unread
            self._await(ARRIVED, number - RING // 2)
        return number

    def _meet(self) -> None:
        """Return when all ranks have come here: before what the MPI library does alone."""
        self.await_arrived(self.note("barrier", "none"))

    def compared(self, request: Request) -> Request:
        """A request of the MPI library: before anybody waits there, all have come and have brought the same."""
        return Compared(self, self.number, request) if self.number <= self.traced else request

    # Staging

    def stage(self, number: int, dtype: np.dtype[Any], ring: Ring = LONG) -> list[Array]:
        """The slots of all ranks for this collective, of which mine may be written."""
        return self.slots(self.free_slot(number, ring), dtype, ring)

    def free_slot(self, number: int, ring: Ring = LONG) -> int:
        """Which slot this collective takes, once mine may be written."""
        goal = number - ring.depth + 1
        if any(words[ARRIVED] < goal for _, words in self.peers):
            self._await(ARRIVED, goal)
        return number % ring.depth

    def slots(self, index: int, dtype: np.dtype[Any], ring: Ring = LONG) -> list[Array]:
        """The slots of all ranks with this number, as arrays of dtype."""
        return self._staging.slots(ring, index, dtype)

    # Waiting

    def _await(self, index: int, goal: int, peers: Peers | None = None, slot: int = 0) -> int | None:
        late = partial(self.reports.timeout, index, goal)
        if peers is None or peers is self.peers:
            return self.flags.wait(index, goal, self._check, late, slot)
        return self.flags.wait_for(peers, index, goal, self._check, late, slot)

    def _check(self) -> Callable[[], None] | None:
        """What a long wait calls again and again."""
        if self._alike < self.traced:
            return self._compare_and_poll
        return self._together.poll if self._together.busy() else None

    def _compare(self) -> None:
        """The first collectives to which everybody has come: where not all wait for all, others may differ."""
        last = min(self.number, self.traced, *(words[ARRIVED] for _, words in self.peers))
        while self._alike < last:
            self.reports.check(self._alike + 1)
            self._alike += 1

    def _compare_and_poll(self) -> None:
        self._compare()
        self._together.poll()


def _all(transport: Transport, mine: bool) -> bool:
    """Whether it is so on all ranks. Collective."""
    least = np.empty(1, np.uint8)
    transport.all_reduce(np.array([mine], np.uint8), least, "min")
    return bool(least[0])
