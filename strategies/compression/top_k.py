"""Only the largest elements travel; the rest waits in a residual until it is large enough.

    gradient + residual │ . . █ . . . ▄ . █ . │ ─► places 2 6 8, values ─► all_gather ─► sum of all nodes' elements
    residual = the rest │ . . 0 . . . 0 . 0 . │

Nothing is lost, only late: what was sent plus the residual is exactly the sum of all gradients so far, which is why 1 %
of the elements can be enough. Every rank adds the elements up in rank order, so the bits are equal. The sum has
between k and N k elements: the cost grows with the number of nodes. Sent per rank: (N-1) k (4 + 4) bytes in float32.

References: Aji and Heafield, "Sparse communication", arXiv:1704.05021; Lin et al., "Deep gradient compression",
arXiv:1712.01887; Stich et al., "Sparsified SGD with memory", arXiv:1809.07599, for why it converges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from dtrain.collectives import Communicator, Work
from dtrain.strategies.compression.interface import Compression, Part, widened


class TopK(Compression):
    """The share `fraction` of a part that is largest in magnitude, at least one element."""

    name: ClassVar[str] = "top_k"
    stages: ClassVar[int] = 1
    feedback: ClassVar[bool] = True

    def __init__(self, fraction: float = 0.01) -> None:
        self.fraction = fraction

    def exchange(self, part: Part, lane: Communicator, step: int) -> Iterator[list[Work]]:
        """Choose, send, keep the rest, add up."""
        assert part.residual is not None
        total = widened(part)
        chosen = self.count(total.size)
        if chosen < total.size:
            # NaN is the largest of all: it must be seen
            places = np.argpartition(np.abs(total), total.size - chosen)[total.size - chosen :]
            places.sort()
        else:
            places = np.arange(total.size)
        message = np.empty(chosen, [("place", np.uint32), ("value", part.wide)])
        message["place"], message["value"] = places, total[places]
        part.residual[...] = total
        part.residual[places] = 0
        gathered = np.empty(lane.size * message.nbytes, np.uint8)
        yield [lane.all_gather_async(message.view(np.uint8), out=gathered)]
        total[...] = 0
        for one in gathered.view(message.dtype).reshape(lane.size, chosen):
            total[one["place"]] += one["value"]  # places differ within a rank
        part.gradient[...] = total

    def count(self, size: int) -> int:
        """How many of `size` elements are sent."""
        return max(1, math.ceil(self.fraction * size))

    def sent(self, part: Part, nodes: int) -> int:
        """Places and values, k of each, to all others."""
        return (nodes - 1) * self.count(part.gradient.size) * (4 + part.wide.itemsize)
