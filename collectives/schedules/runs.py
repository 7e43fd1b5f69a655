"""Sets of contributions while the prover runs: nearly always they are runs of neighbours on the circle of the ranks.

    8 ranks:   {2, 3, 4} = 3 from 2 on       {7, 0} = 2 from 7 on       all = 8 from 0 on       {0, 4}: no run

A run is two numbers, and two runs make one when the second begins where the first ends. Other sets (a circulant graph
adds r and r + p/2) get a number, and a row of bits in a table; -1, -2, ... instead of a start are those of the table.
What makes a run is always kept as one, so two sets are equal where these numbers are.

With each set go a fingerprint of the brackets: fingerprint(x + y) = fingerprint(y + x), and different (up to 2^-64) for
other brackets.
"""

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.contents import Values
from dtrain.collectives.schedules.refusal import ranks_text
from dtrain.collectives.schedules.schedule import Schedule

# In one piece, so that a place is one look into the memory; a length of 0: nothing there.
_PLACE = np.dtype([("start", np.int32), ("length", np.int32), ("form", np.uint64)])
_AT_ONCE = 4096  # sets that are spread out to one byte per rank at a time


class Summed:
    """The sets of all places; `Values` are (start, length, fingerprint). See `Contents`."""

    def __init__(self, schedule: Schedule) -> None:
        cells = schedule.size * schedule.places
        self.cells = np.zeros(cells, _PLACE)
        self.size, self.sets = schedule.size, _Sets(schedule.size)
        self.ordered = True

    def give(self, rank: Array, cells: Array) -> None:
        """See `Contents`."""
        form = _mix(np.arange(1, self.size + 1, dtype=np.uint64))
        self.write(cells, (rank, np.ones(len(cells), np.int32), form[rank]))

    def read(self, cells: Array) -> Values:
        """See `Contents`."""
        found = self.cells[cells]
        return found["start"], found["length"], found["form"]

    def write(self, cells: Array, values: Values) -> None:
        """See `Contents`."""
        written = np.empty(len(cells), _PLACE)
        written["start"], written["length"], written["form"] = values
        self.cells[cells] = written

    def absent(self, values: Values) -> Array:
        """See `Contents`."""
        return np.asarray(values[1] == 0)

    def overlap(self, left: Values, right: Values, total: Values) -> Array:
        """See `Contents`."""
        return np.asarray(total[1] != left[1] + right[1])

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        """See `Contents`."""
        return sorted(set(self.members(left, entry)) & set(self.members(right, entry)))

    def add(self, left: Values, right: Values, before: Array | None) -> Values:
        """See `Contents`."""
        self.ordered = self.ordered and self.in_order(left, right, before)  # once it is not, no more is asked
        a, b = left[2], right[2]
        return *self.union(left, right), _mix(((a + b) * np.uint64(0x9E3779B97F4A7C15)) ^ (a * b))

    def union(self, left: Values, right: Values) -> tuple[Array, Array]:
        """Start and length of what is in either."""
        gap = right[0] - left[0]  # from where the left one starts to where the right one does, around the circle
        gap += (gap < 0) * np.int32(self.size)
        free = self.size - gap - right[1]  # from where the right one ends to where the left one starts
        follows, length = gap == left[1], left[1] + right[1]
        start = np.where(follows, left[0], right[0])
        start[length == self.size] = 0
        run = (follows & (free >= 0)) | ((free == 0) & (gap >= left[1]))
        run &= (left[0] | right[0]) >= 0
        if np.count_nonzero(run) < len(run):
            others = np.flatnonzero(~run)
            start[others], length[others] = self.sets.union(*(a[others] for a in (*left[:2], *right[:2])))
        return start, length

    def in_order(self, left: Values, right: Values, before: Array | None) -> bool:
        """Whether the ranks in the one are lower than those in the other."""
        if before is not None and not np.count_nonzero(before):
            return self.in_order(right, left, None)
        end = left[0] + left[1]
        runs = (left[0] >= 0) & (end <= right[0]) & (right[0] + right[1] <= self.size)
        if np.count_nonzero(runs if before is None else runs & before) == len(end):
            return True
        (low, high), (other_low, other_high) = self.sets.ends(*left[:2]), self.sets.ends(*right[:2])
        in_order = high < other_low if before is None else np.where(before, high < other_low, other_high < low)
        return not np.count_nonzero(~in_order)

    def wrong(self, cells: Array, contributors: Array) -> Array:
        """See `Contents`."""
        start, length, _ = self.read(cells)
        return np.asarray((start != 0) | (length != contributors))

    def describe(self, cell: int) -> str:
        """See `Contents`."""
        members = self.members(self.read(np.array([cell])), 0)
        return f"that of {ranks_text(members)}" if members else "nothing"

    def members(self, values: Values, entry: int) -> list[int]:
        """The ranks in one of them."""
        start, length = (array[entry : entry + 1] for array in values[:2])
        return [int(rank) for rank in np.flatnonzero(self.sets.spread(start, length)[0])]

    def forms(self, cells: Array) -> Array:
        """See `Contents`."""
        return self.read(cells)[2]


class _Sets:
    """Those that are no runs: set i has start -1 - i."""

    def __init__(self, size: int) -> None:
        self.size, self.count, self.ranks = size, 0, np.arange(size, dtype=np.int32)
        self.bits = np.zeros((0, (size + 7) // 8), np.uint8)  # one bit per rank; more rows than sets
        self.low, self.high = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def spread(self, start: Array, length: Array) -> Array:
        """The members as booleans, shape (sets, ranks)."""
        begin, end = start[:, None], (start + length)[:, None]
        members = (self.ranks >= begin) & (self.ranks < end) | (self.ranks < end - self.size)
        if np.count_nonzero(tabled := start < 0):
            members[tabled] = np.unpackbits(self.bits[-1 - start[tabled]], axis=1, count=self.size, bitorder="little")
        return members

    def ends(self, start: Array, length: Array) -> tuple[Array, Array]:
        """The lowest and the highest rank in each."""
        last = start + length - 1
        around = last >= self.size  # a run past the last rank
        low, high = np.where(around, 0, start), np.where(around, self.size - 1, last)
        if np.count_nonzero(tabled := start < 0):
            low[tabled], high[tabled] = self.low[-1 - start[tabled]], self.high[-1 - start[tabled]]
        return low, high

    def union(self, start: Array, length: Array, other_start: Array, other_length: Array) -> tuple[Array, Array]:
        """Start and length of what is in either: once for each pair that is there."""
        bound = self.size * (self.size + 1) + self.count + 1
        keys = self.key(start, length) * bound + self.key(other_start, other_length)
        _, first, pair = np.unique(keys, return_index=True, return_inverse=True)
        found = np.empty((2, len(first)), np.int32)
        for begin in range(0, len(first), _AT_ONCE):
            some = first[begin : begin + _AT_ONCE]
            members = self.spread(start[some], length[some]) | self.spread(other_start[some], other_length[some])
            found[:, begin : begin + _AT_ONCE] = self.keep(members)
        return found[0][pair], found[1][pair]

    def key(self, start: Array, length: Array) -> Array:
        """One number for each set, different for different ones."""
        run = start.astype(np.int64) * (self.size + 1) + length
        return np.where(start < 0, self.size * (self.size + 1) - start, run)

    def keep(self, members: Array) -> tuple[Array, Array]:
        """Start and length of these sets; those that are no runs go to the table."""
        begins = members & ~np.roll(members, 1, axis=1)
        pieces, length = np.count_nonzero(begins, axis=1), np.count_nonzero(members, axis=1)
        start = np.argmax(begins, axis=1)
        new = members[many := pieces > 1]
        end = self.count + len(new)
        if end > len(self.bits):
            more = max(end, 2 * len(self.bits)) - len(self.bits)
            self.bits = np.concatenate([self.bits, np.zeros((more, self.bits.shape[1]), np.uint8)])
            self.low, self.high = (np.concatenate([ends, np.zeros(more, np.int32)]) for ends in (self.low, self.high))
        self.bits[self.count : end] = np.packbits(new, axis=1, bitorder="little")
        self.low[self.count : end] = np.argmax(new, axis=1)
        self.high[self.count : end] = self.size - 1 - np.argmax(new[:, ::-1], axis=1)
        start[many] = -1 - np.arange(self.count, end)
        self.count = end
        return start, length


def _mix(x: Array) -> Array:
    """A bijection of 64-bit numbers that scatters them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
