"""Where numbers stand in a list, for many numbers at once.

    enter [7, 3, 9]      all different: True
    find  [3, 4]         at 1, there   at ?, not there

One look at a table that is never cleared: what it says is checked. Where the table would be too large, a binary search.
"""

import numpy as np

from dtrain.collectives.dtypes import Array

_LARGEST = 1 << 24  # entries of a table


class Lookup:
    """For numbers from 0 to bound - 1."""

    def __init__(self, bound: int) -> None:
        self.table = np.zeros(bound if bound <= _LARGEST else 0, np.int32)
        self.numbers = self.places = np.zeros(0, np.int64)

    def enter(self, numbers: Array) -> bool:
        """The list. Whether no number is in it twice."""
        self.numbers, here = numbers, np.arange(len(numbers))
        if len(self.table):
            self.table[numbers] = here
            return not np.count_nonzero(self.table[numbers] != here)
        self.places = np.argsort(numbers, kind="stable")
        self.numbers = numbers[self.places]
        return not bool((self.numbers[1:] == self.numbers[:-1]).any())

    def find(self, numbers: Array) -> tuple[Array, Array]:
        """The place of each of these numbers in the list, and whether it is there at all (else the place is any)."""
        found = self.table[numbers] if len(self.table) else np.searchsorted(self.numbers, numbers)
        found = np.minimum(found, len(self.numbers) - 1)
        there = np.asarray(self.numbers[found] == numbers)
        return found if len(self.table) else self.places[found], there
