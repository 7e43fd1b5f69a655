"""Long calls in the window that come again: which plan it is, by the addresses of their arrays, and the whole call.

    (array, out) -> one function of machine code: alike? at which of the known places? record, meeting -> index

What has an address in the window lies there at one place for as long as the communicator lives, so the addresses stand
for all that the key of a plan would be made of. With more ranks than cores, Python is run with cold caches by one rank
after another; it was half of an all_gather of 256 KiB between 8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.arena import Block
from dtrain.collectives.counters import Counters, Tally, Volume
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import Function, machine_code
from dtrain.collectives.machine_short import UNLIKE
from dtrain.collectives.machine_window import ROW, UNDONE, WORD
from dtrain.collectives.node import Node
from dtrain.collectives.prepared_window import Windowed
from dtrain.collectives.small import READ, WRITE, Like

FEW = 16  # places for which there is room at first; they are looked through one after another


What = tuple[str, str, int, Volume]
"""As which a call is counted: collective, algorithm, bytes, and what it moves."""


class Kept(NamedTuple):
    """What belongs to a plan."""

    tally: Tally
    result: Array | None = None
    """Where every call of it leaves its result; None: in what it is called with."""


class Places:
    """The plans of one collective for arrays of one shape and dtype.

    `run(array, out)` is the index of the plan that did it; or UNLIKE, and nothing happened; or what `finish` is told.
    """

    def __init__(self, node: Node, function: Callable[[Any], Function], source: Like, target: Like | None) -> None:
        """Target None: `out` is the source again, and is not written."""
        self._node = node
        self._plans: list[Windowed] = []
        self.kept: list[Kept] = []
        """By the index of a plan."""
        self._tallies: dict[What, Tally] = {}
        self._likes = [
            np.array(source.words(READ)),
            np.array(source.words(READ) if target is None else target.words(WRITE)),
        ]
        self._head = np.zeros(len(WORD), np.int64)
        words = {
            "crew": node.flags.all,
            "mine": node.flags.at,
            "turn": address(node.turn),
            "source": address(self._likes[0]),
            "target": address(self._likes[1]),
            "array": id(np.ndarray),
            "block": id(Block),
        }
        for name, word in words.items():
            self._head[WORD[name]] = word
        self._make_room(np.zeros((FEW, ROW), np.int64))
        self.run: Callable[[Array, Array | None], int] = function(self._head)

    def __len__(self) -> int:
        return len(self._plans)

    def add(
        self, array: Array, out: Array, plan: Windowed, what: What, counters: Counters, result: Array | None = None
    ) -> bool:
        """From now on `run` knows this plan, for arrays that lie where these do; False: it cannot, or did already.

        The plans must be few: nobody is dropped for a new one. Calls are counted as `what`.
        """
        at, known = (address(array), address(out)), len(self._plans)
        if (self._rows[:known, :2] == at).all(axis=1).any() or not plan.job.fused:
            return False
        plan.job.aim(array, out)
        if what not in self._tallies:
            self._tallies[what] = counters.tally(*what)
        kept = Kept(self._tallies[what], result)
        free = np.flatnonzero(self._rows[:known, 0] == 0)
        if free.size:
            index = int(free[0])
            self._plans[index], self.kept[index] = plan, kept
        else:
            index = known
            self._plans.append(plan)
            self.kept.append(kept)
            if index == len(self._rows):
                self._make_room(np.concatenate([self._rows, np.zeros_like(self._rows)]))
            self._head[WORD["places"]] = known + 1
        self._rows[index] = *at, plan.job.at, *plan.record
        return True

    def drop(self, at: int) -> None:
        """Forget the plans for the array at this address, which dies: its row may be taken by another."""
        for index in np.flatnonzero(self._rows[:, 0] == at):
            self._rows[index, :2] = 0
            self.kept[index] = self.kept[index]._replace(result=None)

    def finish(self, code: int, array: Array, out: Array | None) -> int:
        """Do the rest of a call that `run` began; the index of its plan."""
        assert code < UNLIKE and out is not None
        index = int(self._head[WORD["found"]])
        self._plans[index].job.go_on(self._node.number, code - UNDONE, array.reshape(-1), out.reshape(-1))
        return index

    def _make_room(self, rows: Array) -> None:
        self._rows = rows
        self._head[WORD["rows"]] = address(rows)


def places(node: Node, source: Like, target: Like | None) -> Places | None:
    """None where machine code does not do it."""
    code = machine_code()
    if code is None or code.window is None or node.flags.meet is None:
        return None
    return Places(node, code.window, source, target)
