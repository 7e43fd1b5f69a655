"""The staging: the part of the shared memory where ranks lay down for the others what does not lie in the window.

    part of each rank   | 32 slots of 8 KiB, for what is short | 2 slots of 512 KiB, in pieces for what is long |

Collective n takes slot n modulo 32, or 2. Invariant: it is written once ARRIVED of all peers is above n - 32, or n - 2:
who has come to the next collective has finished reading this one. So whoever waits for nobody, as the root of a
broadcast, may be as many collectives ahead as there are slots. With more ranks than cores, each of them would be a
switch otherwise.
"""

from typing import NamedTuple

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.dtypes import Array
from dtrain.collectives.transport import Segment

BEGIN = -(-records.END // 4096) * 4096 + 2048  # as `arena.SKEW`: no slow copies


class Ring(NamedTuple):
    """Slots of one size, one after another."""

    begin: int  # byte of each part
    depth: int
    nbytes: int  # of a slot

    def portion(self, size: int, itemsize: int) -> int:
        """Elements in each of `size` blocks of a slot."""
        return self.nbytes // itemsize // size


SHORT = Ring(BEGIN, 32, 8 * 1024)
LONG = Ring(BEGIN + SHORT.depth * SHORT.nbytes, 2, 512 * 1024)
END = LONG.begin + LONG.depth * LONG.nbytes


def ring_for(nbytes: int) -> Ring:
    """Where so many bytes go: the most that any rank lays down, and known to all ranks."""
    return SHORT if nbytes <= SHORT.nbytes else LONG


class Staging:
    """The slots of all ranks, as arrays."""

    def __init__(self, segment: Segment) -> None:
        self._parts = segment.parts
        self._known: dict[tuple[Ring, int, np.dtype], list[Array]] = {}

    def slots(self, ring: Ring, index: int, dtype: np.dtype) -> list[Array]:
        """The slots of all ranks with this number, as arrays of dtype."""
        views = self._known.get((ring, index, dtype))
        if views is None:
            length = ring.nbytes // dtype.itemsize * dtype.itemsize
            start = ring.begin + index * ring.nbytes
            octets = [np.frombuffer(part, np.uint8, length, start) for part in self._parts]
            views = self._known[ring, index, dtype] = [part.view(dtype) for part in octets]
        return views

    def close(self) -> None:
        """Let go of the memory."""
        self._known.clear()
