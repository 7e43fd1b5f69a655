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
    """The memory of all ranks."""

    ordered: bool  # so far, every sum kept the order of the ranks

    def give(self, rank: int, places: Array) -> None:
        """Before: the rank has its own contribution in these places."""

    def read(self, rank: Array, place: Array) -> Values: ...
    def write(self, rank: Array, place: Array, values: Values) -> None: ...
    def absent(self, values: Values) -> Array:
        """Where there was nothing."""

    def take(self, values: Values, index: Array) -> Values: ...
    def choose(self, first: Array, a: Values, b: Values) -> Values:
        """`a` where `first`, else `b`."""

    def put(self, values: Values, index: Array, new: Values) -> Values: ...
    def overlap(self, left: Values, right: Values) -> Array:
        """Where both have a contribution in common."""

    def common(self, left: Values, right: Values, entry: int) -> list[int]: ...
    def add(self, left: Values, right: Values) -> Values: ...
    def wrong(self, rank: int, places: Array, contributors: range) -> Array:
        """Which of the places do not hold what they should in the end."""

    def describe(self, rank: int, place: int) -> str: ...
    def equal_bits(self) -> bool:
        """Whether all who want a chunk hold the same bits of it."""


class _Arrays:
    """Values are tuples of arrays, handled alike."""

    def take(self, values: Values, index: Array) -> Values:
        return tuple(array[index] for array in values)

    def choose(self, first: Array, a: Values, b: Values) -> Values:
        if not first.any():
            return b
        return tuple(
            np.where(first.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)
        )

    def put(self, values: Values, index: Array, new: Values) -> Values:
        for array, part in zip(values, new, strict=True):
            array[index] = part
        return values


class Summed(_Arrays):
    """Sets of contributions."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        size, places = schedule.size, schedule.places
        self.bits = np.zeros((size, places, (size + 63) // 64), np.uint64)
        self.low = np.zeros((size, places), np.int16)
        self.high = np.full((size, places), -1, np.int16)  # -1: nothing here
        self.form = np.zeros((size, places), np.uint64)
        self.ordered = True

    def give(self, rank: int, places: Array) -> None:
        self.bits[rank, places, rank // 64] = np.uint64(1 << rank % 64)
        self.low[rank, places] = self.high[rank, places] = rank
        self.form[rank, places] = _mix(np.array([rank + 1], np.uint64))

    def read(self, rank: Array, place: Array) -> Values:
        return self.bits[rank, place], self.low[rank, place], self.high[rank, place], self.form[rank, place]

    def write(self, rank: Array, place: Array, values: Values) -> None:
        self.bits[rank, place], self.low[rank, place], self.high[rank, place], self.form[rank, place] = values

    def absent(self, values: Values) -> Array:
        return np.asarray(values[2] < 0)

    def overlap(self, left: Values, right: Values) -> Array:
        return np.asarray((left[0] & right[0]).any(axis=1))

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        return _members(left[0][entry] & right[0][entry])

    def add(self, left: Values, right: Values) -> Values:
        self.ordered &= bool((left[2] < right[1]).all())
        a, b = left[3], right[3]
        return (
            left[0] | right[0],
            np.minimum(left[1], right[1]),
            np.maximum(left[2], right[2]),
            _mix(_mix(a + b) ^ (a * b)),
        )

    def wrong(self, rank: int, places: Array, contributors: range) -> Array:
        expected = np.zeros(self.bits.shape[2] * 64, np.uint8)
        expected[contributors.start : contributors.stop] = 1
        words = np.packbits(expected, bitorder="little").view("<u8").astype(np.uint64)
        return np.asarray((self.bits[rank, places] != words).any(axis=1))

    def describe(self, rank: int, place: int) -> str:
        members = _members(self.bits[rank, place])
        return f"that of {ranks_text(members)}" if members else "nothing"

    def equal_bits(self) -> bool:
        spec = self.schedule.specification
        if spec.collective in ("scan", "exscan", "barrier"):
            return True  # every rank wants something else
        first = np.zeros(self.schedule.places, np.uint64)
        known = np.zeros(self.schedule.places, bool)
        for rank in range(spec.size):
            chunks = np.asarray(spec.wanted(rank), np.int64)
            fresh = chunks[~known[chunks]]
            first[fresh] = self.form[rank, fresh]
            known[fresh] = True
            if (self.form[rank, chunks] != first[chunks]).any():
                return False
        return True


class Moved(_Arrays):
    """Which chunks are where, eight per byte."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.bits = np.zeros((schedule.size, (schedule.places + 7) // 8), np.uint8)
        self.ordered = True

    def give(self, rank: int, places: Array) -> None:
        self.write(np.full(len(places), rank), places, (np.ones(len(places), bool),))

    def read(self, rank: Array, place: Array) -> Values:
        return ((self.bits[rank, place >> 3] >> (place & 7) & 1).astype(bool),)

    def write(self, rank: Array, place: Array, values: Values) -> None:
        np.bitwise_or.at(self.bits, (rank, place >> 3), np.left_shift(1, place & 7).astype(np.uint8))

    def absent(self, values: Values) -> Array:
        return np.asarray(~values[0])

    def overlap(self, left: Values, right: Values) -> Array:
        return np.asarray(left[0] & right[0])

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        return []

    def add(self, left: Values, right: Values) -> Values:
        return left

    def wrong(self, rank: int, places: Array, contributors: range) -> Array:
        return self.absent(self.read(np.full(len(places), rank), places))

    def describe(self, rank: int, place: int) -> str:
        return "nothing"

    def equal_bits(self) -> bool:
        return True


def _members(words: Array) -> list[int]:
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return [int(member) for member in np.flatnonzero(bits)]


def _mix(x: Array) -> Array:
    """A bijection of 64-bit numbers that scatters them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
