"""What the places of all ranks hold while the prover runs: contributions that are summed, or chunks that are moved.

    Summed   a row of bits per place, one bit per rank; with it the lowest and highest rank in it, and a fingerprint of
             the brackets: fingerprint(x + y) = fingerprint(y + x), and different (up to 2^-64) for other brackets
    Moved    one bit per place: the chunk is there

`Values` is what some places held, taken out: arrays whose first dim runs over those places.
"""

from typing import Protocol

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.refusal import ranks_text
from dtrain.collectives.schedules.schedule import Schedule

Values = tuple[Array, ...]


class Contents(Protocol):
    """The memory of all ranks; place q of rank r is cell r * places + q."""

    ordered: bool  # so far, every sum kept the order of the ranks

    def give(self, rank: Array, cells: Array) -> None:
        """Before: the ranks have their own contributions in these cells."""

    def read(self, cells: Array) -> Values: ...
    def write(self, cells: Array, values: Values) -> None: ...
    def absent(self, values: Values) -> Array:
        """Where there was nothing."""

    def overlap(self, left: Values, right: Values) -> Array:
        """Where both have a contribution in common."""

    def common(self, left: Values, right: Values, entry: int) -> list[int]: ...
    def add(self, left: Values, right: Values) -> Values: ...
    def wrong(self, cells: Array, contributors: range) -> Array:
        """Which of the cells do not hold what they should in the end."""

    def describe(self, cell: int) -> str: ...
    def forms(self, cells: Array) -> Array:
        """Fingerprints: equal where the bits of the content are."""


def take(values: Values, index: Array) -> Values:
    """Some of the values."""
    return tuple(array[index] for array in values)


def choose(first: Array, a: Values, b: Values) -> Values:
    """`a` where `first`, else `b`."""
    if not first.any():
        return b
    return tuple(np.where(first.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True))


def put(values: Values, index: Array, new: Values) -> None:
    """Replace some of the values."""
    for array, part in zip(values, new, strict=True):
        array[index] = part


class Summed:
    """Sets of contributions."""

    def __init__(self, schedule: Schedule) -> None:
        cells = schedule.size * schedule.places
        self.bits = np.zeros((cells, (schedule.size + 63) // 64), np.uint64)
        self.low = np.zeros(cells, np.int16)
        self.high = np.full(cells, -1, np.int16)  # -1: nothing here
        self.form = np.zeros(cells, np.uint64)
        self.ordered = True

    def give(self, rank: Array, cells: Array) -> None:
        """See `Contents`."""
        self.bits[cells, rank // 64] = np.left_shift(np.uint64(1), (rank % 64).astype(np.uint64))
        self.low[cells] = self.high[cells] = rank
        self.form[cells] = _mix(rank.astype(np.uint64) + np.uint64(1))

    def read(self, cells: Array) -> Values:
        """See `Contents`."""
        return self.bits[cells], self.low[cells], self.high[cells], self.form[cells]

    def write(self, cells: Array, values: Values) -> None:
        """See `Contents`."""
        self.bits[cells], self.low[cells], self.high[cells], self.form[cells] = values

    def absent(self, values: Values) -> Array:
        """See `Contents`."""
        return np.asarray(values[2] < 0)

    def overlap(self, left: Values, right: Values) -> Array:
        """See `Contents`."""
        both = left[0] & right[0]
        return np.asarray(both[:, 0] != 0 if both.shape[1] == 1 else both.any(axis=1))

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        """The contributions that both have."""
        return _members(left[0][entry] & right[0][entry])

    def add(self, left: Values, right: Values) -> Values:
        """See `Contents`."""
        self.ordered = self.ordered and bool((left[2] < right[1]).all())
        a, b = left[3], right[3]
        return (
            left[0] | right[0],
            np.minimum(left[1], right[1]),
            np.maximum(left[2], right[2]),
            _mix(((a + b) * np.uint64(0x9E3779B97F4A7C15)) ^ (a * b)),
        )

    def wrong(self, cells: Array, contributors: range) -> Array:
        """See `Contents`."""
        expected = np.zeros(self.bits.shape[1] * 64, np.uint8)
        expected[contributors.start : contributors.stop] = 1
        words = np.packbits(expected, bitorder="little").view("<u8").astype(np.uint64)
        return np.asarray((self.bits[cells] != words).any(axis=1))

    def describe(self, cell: int) -> str:
        """See `Contents`."""
        members = _members(self.bits[cell])
        return f"that of {ranks_text(members)}" if members else "nothing"

    def forms(self, cells: Array) -> Array:
        """See `Contents`."""
        return np.asarray(self.form[cells])


class Moved:
    """Which chunks are where, eight per byte."""

    def __init__(self, schedule: Schedule) -> None:
        self.bits = np.zeros((schedule.size * schedule.places + 7) // 8, np.uint8)
        self.ordered = True

    def give(self, rank: Array, cells: Array) -> None:
        """See `Contents`."""
        self.write(cells, ())

    def read(self, cells: Array) -> Values:
        """See `Contents`."""
        return ((self.bits[cells >> 3] >> (cells & 7) & 1).astype(bool),)

    def write(self, cells: Array, values: Values) -> None:
        """See `Contents`; what is written was read somewhere, so it is there."""
        np.bitwise_or.at(self.bits, cells >> 3, np.left_shift(1, cells & 7).astype(np.uint8))

    def absent(self, values: Values) -> Array:
        """See `Contents`."""
        return np.asarray(~values[0])

    def overlap(self, left: Values, right: Values) -> Array:
        """There is one right content, so adding is always wrong."""
        return np.asarray(left[0] & right[0])

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        """Nothing is contributed."""
        return []

    def add(self, left: Values, right: Values) -> Values:
        """See `overlap`."""
        raise AssertionError("chunks that are only moved are never added")

    def wrong(self, cells: Array, contributors: range) -> Array:
        """See `Contents`."""
        return self.absent(self.read(cells))

    def describe(self, cell: int) -> str:
        """See `Contents`."""
        return "nothing"

    def forms(self, cells: Array) -> Array:
        """See `Contents`."""
        return np.zeros(len(cells), np.uint64)


def _members(words: Array) -> list[int]:
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return [int(member) for member in np.flatnonzero(bits)]


def _mix(x: Array) -> Array:
    """A bijection of 64-bit numbers that scatters them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
