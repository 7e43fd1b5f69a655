"""A collective that comes again, as one call of machine code: its parts between its synchronisations, no Python there.

    job   before -> ARRIVED, wait -> among -> REDUCED, wait -> after

With more ranks than cores it is Python between two switches that makes a meeting long. A call of machine code never
waits for long: after its looks and yields it comes back, and the rank waits in Python, where time limit, reports,
signals and works under way are seen to; then it goes on at the next stage.

Step by step instead, with the same flags: the first collectives, which are compared; with works under way; where a part
is not known to machine code. So ranks may meet that do it differently.
"""

from collections.abc import Callable

import numpy as np

from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.machine_long import AIMS
from dtrain.collectives.node import Node
from dtrain.collectives.parts import Part
from dtrain.collectives.records import RECORD_WORDS, RECORDS, RING

BEFORE, AMONG, AFTER, TWO, EXPECTED = 0, 7, 14, 21, 22  # words of a job: three actions, and these
_LATE_ARRIVED, _OTHER_PLACES, _LATE_REDUCED, _FAILED = -1, -2, -3, -4
_GO_ON = {_LATE_ARRIVED: 1, _OTHER_PLACES: 1, _LATE_REDUCED: 2}  # stages
_UNKNOWN = 1 << 62  # no place is packed into this word

# (number, expected) -> None: where the data of the peers lies depends on what they put aside; it writes the words that
# it found there into `expected`, one for each peer, and what follows from them into the tables of the parts.
Find = Callable[[int, Array], None]


class Job:
    """What one rank does in it."""

    def __init__(
        self,
        node: Node,
        before: Part | None = None,
        among: Part | None = None,
        after: Part | None = None,
        two: bool = True,
        find: Find | None = None,
    ) -> None:
        """two: the second synchronisation is needed, for who writes after ARRIVED or reads what may soon change."""
        self._node, self._two, self._find = node, two, find
        self._parts = {BEFORE: before, AMONG: among, AFTER: after}
        self._words = np.zeros(AIMS + 2, np.int64)
        self._words[TWO] = two
        self._expected = np.full(node.size - 1, _UNKNOWN, np.int64)
        if find is not None:
            self._words[EXPECTED] = address(self._expected)
        self.at = address(self._words)
        self._aims = []  # of the source, of the target
        self.fused = node.flags.meet is not None
        """Machine code knows all of it."""
        for at, part in self._parts.items():
            if part is None:
                continue
            if part.action is None:
                self.fused = False
                continue
            self._words[at : at + len(part.action)] = part.action
            for table, word, of_target, nbytes in part.aims:
                goal = (self._words, at + word) if table is None else (table, word)
                self._aims.append((*goal, of_target, nbytes))
        rows = [(address(table) + 8 * word, of_target, nbytes) for table, word, of_target, nbytes in self._aims]
        self._rows = np.array(rows, np.int64)  # the same for machine code
        self._words[AIMS:] = address(self._rows), len(rows)

    def meet(self, number: int, source: Array, target: Array) -> None:
        """Collective `number`, whose record is written; source and target are flat."""
        self.aim(source, target)
        if self.fused and self._node.alone(number):
            meet = self._node.flags.meet
            assert meet is not None
            self.go_on(number, meet(self.at, number, _record(number), 0, 0), source, target)
        else:
            self._step_by_step(number, source, target)

    def aim(self, source: Array, target: Array) -> None:
        """It is about these arrays from now on."""
        if self._aims:
            both = address(source), address(target)
            for table, word, of_target, nbytes in self._aims:
                table[word] = both[of_target] + nbytes

    def needs_second(self, two: bool) -> None:
        """For `find`: whether this very meeting needs its second synchronisation; the same on all ranks."""
        self._words[TWO] = two

    def go_on(self, number: int, found: int, source: Array, target: Array) -> None:
        """Do what is left when machine code, which is aimed at this source and target, came back with `found`."""
        node = self._node
        meet = node.flags.meet
        assert meet is not None
        while found:
            if found > 0:
                raise node.reports.mismatch(node.peers[found - 1][0], number)
            if found == _LATE_ARRIVED:
                node.await_arrived(number)
            elif found == _LATE_REDUCED:
                node.await_reduced(number)
            elif found == _FAILED:
                self._from_among(number, source, target)  # says why, or does it
                return
            else:
                assert self._find is not None
                self._find(number, self._expected)
            found = meet(self.at, number, _record(number), _GO_ON[found], 0)

    def _step_by_step(self, number: int, source: Array, target: Array) -> None:
        node = self._node
        self._do(BEFORE, source, target)
        node.arrive(number)
        if self._two:
            node.works.complete(number)  # works started before: REDUCED below speaks for them too
        node.await_arrived(number)
        if self._find is not None:
            self._find(number, self._expected)
        self._from_among(number, source, target)

    def _from_among(self, number: int, source: Array, target: Array) -> None:
        node = self._node
        self._do(AMONG, source, target)
        if self._words[TWO]:
            node.reduced(number)
            node.await_reduced(number)
        self._do(AFTER, source, target)

    def _do(self, at: int, source: Array, target: Array) -> None:
        part, code = self._parts[at], machine_code()
        if part is None:
            return
        if part.action is None or code is None or code.do(self.at, at):
            part.python(source, target)


def _record(number: int) -> int:
    """The byte where the record of this collective begins."""
    return 8 * (RECORDS + RECORD_WORDS * (number % RING))
