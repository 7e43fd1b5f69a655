"""How a tensor and its gradient lie on the mesh, and what it costs to get from one state to another.

    state        tensor       gradient       who makes it
    R            replicated   replicated     every rank computes the same
    C            replicated   partial        every rank uses the whole for a part of the work (Megatron's f)
    S0, S1, …    cut          cut            along that dim
    P            partial      replicated     every rank has a summand (Megatron's g)

Every ordered pair of states has a conversion: a collective forward, and its conjugate backward (see conjugate.py):

    S ─► R   all_gather │ -              R ─► S   - │ all_gather         P ─► R   all_reduce │ -
    S ─► C   all_gather │ reduce_scatter R ─► C   - │ all_reduce         P ─► C   all_reduce │ all_reduce
    S ─► S'  all_to_all │ all_to_all     P ─► S   reduce_scatter │ all_gather              all others cost nothing

A layout is a state per axis of the mesh. Axes are converted one after the other, first those where a tensor gets
smaller; each moves what its ranks hold by then.
Reference: the redistribution of MindSpore's auto-parallel and of GSPMD (arXiv:2105.04663); Megatron's f and g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtrain.launch.plan.machine import Machine

Layout = tuple[str, ...]
"""A state per axis of the mesh."""

# (first letters of two states) -> collectives forward and backward
CONVERSIONS: dict[str, tuple[str, str]] = {
    "RC": ("", "all_reduce"),
    "RS": ("", "all_gather"),
    "SR": ("all_gather", ""),
    "SC": ("all_gather", "reduce_scatter"),
    "SS": ("all_to_all", "all_to_all"),
    "PR": ("all_reduce", ""),
    "PC": ("all_reduce", "all_reduce"),
    "PS": ("reduce_scatter", "all_gather"),
}
NAMES = {"R": "whole", "C": "whole", "P": "partial"}


@dataclass(frozen=True)
class Step:
    """One collective of a redistribution."""

    kind: str
    axis: int
    bytes: float
    """Of the whole that the ranks of the axis have together (all_to_all: of what one of them has)."""
    backward: bool
    seconds: float


@dataclass(frozen=True)
class Devices:
    """The ranks as a mesh of one or two axes; the last one varies fastest, so that its ranks are neighbours."""

    sizes: tuple[int, ...]
    machine: Machine
    _known: dict[tuple[float, Layout, Layout], float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def number(self) -> int:
        """All ranks."""
        return math.prod(self.sizes)

    def collective(self, kind: str, axis: int, nbytes: float) -> float:
        """Seconds of a collective along an axis; in a node its cores do it, for all ranks that share them."""
        seconds, inside = self.machine.collective(kind, self.sizes[axis], math.prod(self.sizes[axis + 1 :]), nbytes)
        return seconds * (self.machine.crowd() if inside else 1.0)

    def inside(self, axis: int) -> bool:
        """Whether the ranks of an axis are on one node."""
        return self.machine.level(math.prod(self.sizes[axis + 1 :]) * (self.sizes[axis] - 1) + 1)[1]

    def share(self, layout: Layout) -> int:
        """Into how many pieces a tensor is cut."""
        return math.prod([size for size, state in zip(self.sizes, layout, strict=True) if state[0] == "S"])

    def seconds(self, nbytes: float, source: Layout, target: Layout) -> float:
        """Of getting a tensor of `nbytes` in all from one layout to another, and its gradient back."""
        key = (nbytes, source, target)
        if key not in self._known:
            self._known[key] = sum(step.seconds for step in self.steps(nbytes, source, target))
        return self._known[key]

    def steps(self, nbytes: float, source: Layout, target: Layout) -> list[Step]:
        """What is called for it."""
        held, found = list(source), []
        grows = [i for i, state in enumerate(target) if source[i][0] == "S" and state[0] != "S"]
        for axis in [i for i in range(len(held)) if i not in grows] + grows:
            if held[axis] != target[axis]:
                others = self.share(tuple("R" if i == axis else state for i, state in enumerate(held)))
                calls = CONVERSIONS.get(held[axis][0] + target[axis][0], ("", ""))
                for kind, backward in zip(calls, (False, True), strict=True):
                    if kind:
                        moved = nbytes / others / (self.sizes[axis] if kind == "all_to_all" else 1)
                        found.append(Step(kind, axis, moved, backward, self.collective(kind, axis, moved)))
                held[axis] = target[axis]
        return found


def meshes(ranks: int, machine: Machine) -> list[Devices]:
    """All meshes of one axis or two."""
    pairs = [(a, ranks // a) for a in range(2, ranks) if ranks % a == 0]
    return [Devices(sizes, machine) for sizes in [(ranks,), *pairs]]


def told(layout: Sequence[str]) -> str:
    """For a table: `S0 whole`, a word per axis."""
    return " ".join(NAMES.get(state, state) for state in layout)
