"""The sum of arrays that travel encoded: to the owner of each slice, and from there to all.

    rank 0   │e0│e1│  all_to_all   owner of slice 0 decodes and adds up in rank order, encodes the sum   all_gather
    rank 1   │e0│e1│ ───────────►  owner of slice 1          "                                         ───────────►

An encoded sum cannot be added to another one, so the ring of an ordinary all_reduce will not do. This way every element
is encoded twice, whatever the number of nodes, and a rank sends 2 (N-1)/N times the encoded array, as the ring does.
The owner takes its own sum from the encoded form, too: that is what makes the bits equal on all ranks.

Reference: the same two steps in Tang et al., "1-bit Adam", arXiv:2102.02888, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.strategies.compression.interface import Compression, Part, widened


class TwoWays(Compression):
    """A compression by values as bytes and back; the number of bytes depends on the number of values alone."""

    stages: ClassVar[int] = 2

    def nbytes(self, count: int) -> int:
        """Length of `count` encoded values."""
        raise NotImplementedError

    def encode(self, values: Array, key: tuple[int, ...]) -> Array:
        """Values (n,) as bytes (nbytes(n),), uint8; `key` names this use, for those that draw lots."""
        raise NotImplementedError

    def decode(self, payload: Array, out: Array) -> None:
        """Write the values of the bytes to out (n,)."""
        raise NotImplementedError

    def exchange(self, part: Part, lane: Communicator, step: int) -> Iterator[list[Work]]:
        """Encode, sum, encode, hand around."""
        values = widened(part)
        cuts = borders(values.size, lane.size)
        lengths = [self.nbytes(cuts[rank + 1] - cuts[rank]) for rank in range(lane.size)]
        key = (step, part.number, lane.rank)
        slices = [self.encode(values[cuts[rank] : cuts[rank + 1]], (*key, rank)) for rank in range(lane.size)]
        mine = lengths[lane.rank]
        received = np.empty((lane.size, mine), np.uint8)
        leaving = np.concatenate(slices)
        yield [lane.all_to_all_async(leaving, received.reshape(-1), counts=lengths, out_counts=[mine] * lane.size)]
        total = np.zeros(cuts[lane.rank + 1] - cuts[lane.rank], part.wide)
        term = np.empty_like(total)
        for rank in range(lane.size):
            self.decode(received[rank], term)
            total += term
        gathered = np.empty(sum(lengths), np.uint8)
        yield [lane.all_gather_async(self.encode(total, (*key, lane.size)), out=gathered, counts=lengths)]
        start = 0
        for rank in range(lane.size):
            self.decode(gathered[start : start + lengths[rank]], values[cuts[rank] : cuts[rank + 1]])
            start += lengths[rank]
        part.gradient[...] = values

    def sent(self, part: Part, nodes: int) -> int:
        """Of what the ranks of a lane send together, a rank's share: each slice goes N-1 times one way, N-1 times the
        other."""
        cuts = borders(part.gradient.size, nodes)
        return sum(2 * (nodes - 1) * self.nbytes(b - a) for a, b in pairwise(cuts)) // nodes


def borders(count: int, size: int) -> list[int]:
    """Where each of `size` slices begins, and the end."""
    return [count * rank // size for rank in range(size + 1)]
