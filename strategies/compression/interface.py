"""What a compression is: a sum over the ranks of a lane, in steps between which other buckets have their turn.

    node 0   part = sum of its ranks ─► exchange(part, lane) ─► part = sum of all nodes, to the compression's precision
    node 1   part = sum of its ranks ─►        "             ─► the same bits

`exchange` is a generator: it starts a collective, yields its works, and goes on when they are done. So the buckets of a
step overlap: while the bytes of one are on their way, the next one is compressed.

Invariants: the ranks of a lane get the same bits; every exchange yields `stages` times, on all ranks, so that none
overtakes another; what a rank sends is a function of its gradients, its state and the step, never of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.flat_group import Piece


@dataclass(slots=True)
class Part:
    """The slice of a bucket that this rank exchanges with the other nodes."""

    number: int
    """Of the bucket."""
    gradient: Array
    """(n,), a view of the flat gradients."""
    pieces: list[Piece]
    """Which parameters lie in it."""
    wide: np.dtype[Any]
    """In which it is added up: float32, or float64 where gradients are."""
    state: dict[str, dict[str, Array]] = field(default_factory=dict)
    """What is kept from step to step: by its name, then by parameter."""
    residual: Array | None = None
    """(n,) in the wide dtype, with error feedback: what this node has not sent yet."""


class Compression:
    """Base of all compressions."""

    name: ClassVar[str]
    stages: ClassVar[int]
    """How often `exchange` yields."""
    feedback: ClassVar[bool] = False
    """Whether what was not sent is added to the next gradient."""
    whole_parameters: ClassVar[bool] = False
    """Whether a part must not begin or end within a parameter."""

    def attach(self, part: Part) -> None:
        """Make the state of a part; `residual` is there already."""

    def exchange(self, part: Part, lane: Communicator, step: int) -> Iterator[list[Work]]:
        """part.gradient = its sum over the lane, in steps; `step` counts from 0."""
        raise NotImplementedError

    def sent(self, part: Part, nodes: int) -> int:
        """Bytes that one rank sends for a part, if the collectives send the least that they can."""
        raise NotImplementedError


def widened(part: Part) -> Array:
    """A copy of the gradient in the wide dtype, plus what earlier steps left behind."""
    gradient = part.gradient.astype(part.wide)
    if part.residual is not None:
        gradient += part.residual
    return gradient
