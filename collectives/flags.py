"""The flags by which the ranks of a node tell each other how far they are, and the waiting for them.

    word 0     ARRIVED   ┐ on cache lines of their own in the part of each rank; who owns them writes, all read
    word 16    REDUCED   ┘
    word 32    bell      in the part of rank 0 alone: how often it rang, how many sleep

With more ranks than cores a wait for all peers is one call of machine code: it yields, and sleeps until the last one
rings (`machine_code.py`). Who waits by looking keeps a core from those who are waited for, and who naps oversleeps. All
other waits look, yield and nap (`waiting.py`): where every rank has a core, a call costs more than the look it saves.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import Function, crew_words, machine_code
from dtrain.collectives.transport import Segment
from dtrain.collectives.waiting import BELL, CROWDED_TRIES, ORDERED_STORES, SHORT_TRIES, TRIES, Patience, nap

SLEEP = 20_000_000  # ns without a look, where nothing waits to be helped along

# Some of the other ranks, with their words.
Peers = list[tuple[int, memoryview]]
Late = Callable[[float], Exception]


class Flags:
    """One rank's flags and its view of those of its peers."""

    def __init__(self, segment: Segment, rank: int, end: int, patience: Patience) -> None:
        """`end`: bytes of each part that are words."""
        self.patience = patience
        self.fence = None if ORDERED_STORES else segment.fence
        self.words = [part[:end].cast("q") for part in segment.parts]
        self.mine = self.words[rank]
        self.peers: Peers = [(other, words) for other, words in enumerate(self.words) if other != rank]
        self._raise: Function | None = None
        self._await: Function | None = None
        code = machine_code()
        self.meet: Callable[..., int] | None = None
        """(job, number, byte of the record, stage) of `machine_waiting.py`, where there is machine code."""
        if code is not None and code.meet is not None:
            self._prepare(segment)
            self.meet = partial(code.meet, self._crew, self.at)

    def ring(self) -> None:
        """From now on wait in machine code, and wake who sleeps there; all ranks or none."""
        code = machine_code()
        assert code is not None
        self._raise, self._await = code.raise_flag, code.await_flags

    @property
    def all(self) -> int:
        """The address of what machine code has to know to wait for all peers."""
        return self._crew

    def _prepare(self, segment: Segment) -> None:
        """What machine code has to know of the ranks."""
        self._places = [address(np.frombuffer(part, np.uint8)) for part in segment.parts]
        self._tables: dict[tuple[object, ...], Array] = {}
        self.at = address(np.frombuffer(self.mine, np.int64))
        self._crew = self._table(self.peers, self._tries(TRIES))
        self._tired_crew = self._table(self.peers, (0, 0))  # has looked often enough: sleeps at once

    def crew(self, peers: Peers) -> int:
        """The address of what machine code has to know to wait for these ranks, in short calls; 0: for nobody."""
        return self._table(peers, self._tries(SHORT_TRIES)) if peers else 0

    def _tries(self, alone: tuple[int, int]) -> tuple[int, int]:
        """Looks and yields, where each rank has a core of its `alone`, or not."""
        return alone if self.patience.spins else CROWDED_TRIES

    def _table(self, peers: Peers, tries: tuple[int, int]) -> int:
        ranks = [rank for rank, _ in peers]
        words = crew_words([self._places[rank] for rank in ranks], self._places[0] + 8 * BELL, *tries)
        table = self._tables.setdefault((*ranks, tries), np.array(words, np.int64))
        return address(table)

    def close(self) -> None:
        """Let go of the memory."""
        self._raise = self._await = self.meet = None
        self.peers.clear()
        for words in self.words:
            words.release()
        self.mine.release()

    def put(self, index: int, number: int) -> None:
        """My flag is `number` from now on: after all that I wrote before."""
        if self._raise is not None:
            self._raise(self._crew, self.at + 8 * index, 8 * index, number)
            return
        if self.fence is not None:
            self.fence()
        self.mine[index] = number

    def wait(
        self, index: int, number: int, check: Callable[[], Callable[[], None] | None], late: Late, slot: int = 0
    ) -> int | None:
        """Return when the flags of all peers are at `number`; then the first peer whose word `slot` is not as mine.

        check(): what to call between the looks in a long wait, if anything; `late(seconds)`: the exception after the
        time limit.
        """
        if self._await is None:
            return self.wait_for(self.peers, index, number, check, late, slot)
        signature = self.mine[slot]
        found = self._await(self._crew, 8 * index, number, 8 * slot, signature, 0)
        if found < 0:
            began = time.monotonic()
            help_along = check()
            waited = 0.0
            while True:
                sleep = SLEEP
                if help_along is not None:
                    help_along()
                    sleep = int(1e9 * nap(waited))
                found = self._await(self._tired_crew, 8 * index, number, 8 * slot, signature, sleep)
                if found >= 0:
                    break
                waited = time.monotonic() - began
                if waited > self.patience.timeout:
                    raise late(waited)
        return self.peers[found - 1][0] if found else None

    def wait_for(
        self,
        peers: Peers,
        index: int,
        number: int,
        check: Callable[[], Callable[[], None] | None],
        late: Late,
        slot: int = 0,
    ) -> int | None:
        """`wait` for some of the peers."""
        signature = self.mine[slot]
        for rank, words in peers:
            if words[index] < number:
                self.patience.wait(words, index, number, check(), late, self.fence)
            if slot and words[slot] != signature:
                return rank
        if self.fence is not None:
            self.fence()
        return None
