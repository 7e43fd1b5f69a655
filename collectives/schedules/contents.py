"""What the places of all ranks hold while the prover runs: contributions that are summed, or chunks that are moved.

    Summed   the ranks whose contributions are in it, and a fingerprint of the brackets (`runs.py`)
    Moved    for each place whether the chunk is there

`Values` is what some places held, taken out: arrays whose first dim runs over those places.
"""

from typing import Protocol

import numpy as np

from dtrain.collectives.dtypes import Array
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

    def add(self, left: Values, right: Values, before: Array | None) -> Values:
        """The sums; in the order of the ranks if the left one is first, but where not `before`: then the right one."""

    def overlap(self, left: Values, right: Values, total: Values) -> Array:
        """Where both have a contribution in common; `total` is what `add` gave."""

    def common(self, left: Values, right: Values, entry: int) -> list[int]: ...
    def wrong(self, cells: Array, contributors: Array) -> Array:
        """Which of the cells do not hold what they should in the end: the sum of so many ranks from 0 on."""

    def describe(self, cell: int) -> str: ...
    def forms(self, cells: Array) -> Array:
        """Fingerprints: equal where the bits of the content are."""


def take(values: Values, index: Array) -> Values:
    """Some of the values."""
    return tuple(array[index] for array in values)


def put(values: Values, index: Array, new: Values) -> None:
    """Replace some of the values."""
    for array, part in zip(values, new, strict=True):
        array[index] = part


class Moved:
    """Which chunks are where."""

    def __init__(self, schedule: Schedule) -> None:
        self.there = np.zeros(schedule.size * schedule.places, bool)
        self.ordered = True

    def give(self, rank: Array, cells: Array) -> None:
        """See `Contents`."""
        self.there[cells] = True

    def read(self, cells: Array) -> Values:
        """See `Contents`."""
        return (self.there[cells],)

    def write(self, cells: Array, values: Values) -> None:
        """See `Contents`; what is written was read somewhere, so it is there."""
        self.there[cells] = True

    def absent(self, values: Values) -> Array:
        """See `Contents`."""
        return np.asarray(~values[0])

    def add(self, left: Values, right: Values, before: Array | None) -> Values:
        """There is one right content, so adding is always wrong: see `overlap`."""
        return left

    def overlap(self, left: Values, right: Values, total: Values) -> Array:
        """See `add`."""
        return np.asarray(left[0] & right[0])

    def common(self, left: Values, right: Values, entry: int) -> list[int]:
        """Nothing is contributed."""
        return []

    def wrong(self, cells: Array, contributors: Array) -> Array:
        """See `Contents`."""
        return self.absent(self.read(cells))

    def describe(self, cell: int) -> str:
        """See `Contents`."""
        return "nothing"

    def forms(self, cells: Array) -> Array:
        """See `Contents`."""
        return np.zeros(len(cells), np.uint64)
