"""The simulator: how long a schedule takes on a described cluster, with thousands of ranks.

    levels, inside out          node: 8 ranks, α 1 µs, β 0.1 ns/B          network: α 5 µs, β 0.08 ns/B, 2 NICs per node

An event simulation, all ranks of a step at once and many lengths at once. A message begins when both ends have finished
their previous step and takes α + bytes·β of the innermost level that contains both; a rank ends a step with its last
message and then adds for γ seconds per byte. Links are shared: when more messages of a step leave (or enter) a unit of
a level than it has links, each takes so many times β longer. With links for all this is Hockney's α-β-γ model, in which
the catalogue's formulas hold exactly.

Equal steps are not computed twice: once a step lets all clocks advance alike, so does its repetition.
Reference: Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20, 1994.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.schedules.rounds import Folds, Messages, rounds
from dtrain.collectives.schedules.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Level:
    """Links of one kind. The units that a level joins are those of the level inside it; of the innermost one, ranks.

    ranks: how many the level joins in one unit (0: all). links: messages that one joined unit can send, and receive, at
    the same time at full speed (0: as many as it likes); for a network between nodes, the NICs of a node.
    """

    name: str
    alpha: float  # seconds per message
    beta: float  # seconds per byte
    ranks: int = 0
    links: int = 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Levels from the inside out, the last one joins all ranks; gamma: seconds per byte added."""

    levels: tuple[Level, ...]
    gamma: float = 0.0
    name: str = "cluster"

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: at least one is needed")
        inside = 1
        for number, level in enumerate(self.levels):
            last = number == len(self.levels) - 1
            if level.ranks == 0 and not last:
                raise ValueError(f"levels[{number}].ranks=0: only the last level, {self.levels[-1].name}, joins all")
            if level.ranks and (level.ranks < inside or level.ranks % inside):
                raise ValueError(
                    f"levels[{number}].ranks={level.ranks}: must be a multiple of {inside}, the level inside"
                )
            inside = level.ranks or inside


def uniform(alpha: float, beta: float, gamma: float = 0.0, links: int = 0) -> Cluster:
    """All links alike."""
    return Cluster((Level("link", alpha, beta, links=links),), gamma, "uniform links")


def cluster_from(description: Mapping[str, Any]) -> Cluster:
    """The cluster of a YAML file, already read:

        name: two racks
        gamma: 0.1e-9
        levels:
          - {name: node, ranks: 8, alpha: 1e-6, beta: 0.1e-9}
          - {name: network, alpha: 5e-6, beta: 0.08e-9, links: 2}

    ValueError names the key that is wrong.
    """
    _check_keys("", description, {"name", "gamma", "levels"}, {"levels"})
    rows = description["levels"]
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError("levels: must be a list, from the innermost level to the outermost")
    levels = []
    for number, row in enumerate(rows):
        place = f"levels[{number}]."
        if not isinstance(row, Mapping):
            raise ValueError(f"levels[{number}]: must have the keys name, alpha, beta and maybe ranks, links")
        _check_keys(place, row, {field.name for field in fields(Level)}, {"name", "alpha", "beta"})
        numbers = {key: _number(place + key, row[key], whole=key in ("ranks", "links")) for key in row if key != "name"}
        levels.append(Level(str(row["name"]), **numbers))  # type: ignore[arg-type]
    gamma = _number("gamma", description.get("gamma", 0.0), whole=False)
    return Cluster(tuple(levels), gamma, str(description.get("name", "cluster")))


def simulate(
    schedule: Schedule, cluster: Cluster, nbytes: Sequence[float] | Array, weights: Array | None = None
) -> Array:
    """Seconds until the last rank has finished, shape (len(nbytes),).

    nbytes: bytes of the vector that `Cost` calls n. weights: the share of n in each chunk, shape (parts,), where they
    are uneven; default: equal.
    """
    if cluster.levels[-1].ranks and cluster.levels[-1].ranks < schedule.size:
        raise ValueError(f"levels: {cluster.name} has {cluster.levels[-1].ranks} ranks, {schedule.size} are asked for")
    return _Simulation(schedule, cluster, np.asarray(nbytes, float), weights).run()


class _Simulation:
    def __init__(self, schedule: Schedule, cluster: Cluster, nbytes: Array, weights: Array | None) -> None:
        self.schedule, self.cluster, self.nbytes, self.weights = schedule, cluster, nbytes, weights
        self.clock: Array = np.zeros((schedule.size, len(nbytes)))
        self.last: tuple[Array, ...] = ()  # what the last step was made of
        self.duration: Array = self.clock  # of its messages
        self.adding: Array = self.clock  # of its sums
        self.advance: Array | None = None  # by how much it moved all clocks, if all alike

    def run(self) -> Array:
        for round_ in rounds(self.schedule):
            if len(round_.receives):
                self.exchange(round_.receives)
            for folds in round_.folds:
                self.fold(folds)
        return np.asarray(self.clock.max(axis=0))

    def exchange(self, receives: Messages) -> None:
        """One step. The receives of a schedule that was proven say all."""
        step = (receives.rank, receives.peer, self.shares(receives), receives.reduce)
        if len(self.last) and all(map(np.array_equal, step, self.last)):
            if self.advance is not None:
                self.clock += self.advance
                return
        else:
            self.last = step
            self.prepare(receives, step[2])
        before = self.clock
        end: Array = np.maximum(before[receives.rank], before[receives.peer]) + self.duration
        self.clock = np.array(before)
        for side in (receives.rank, receives.peer):
            if (np.bincount(side) > 1).any():
                np.maximum.at(self.clock, side, end)
            else:
                self.clock[side] = np.maximum(self.clock[side], end)
        self.clock += self.adding
        # Max-plus algebra: f(t + c) = f(t) + c. A step that moved all clocks alike does so again.
        moved = self.clock - before
        alike = (np.abs(moved - moved[0]) <= 1e-9 * moved[0]).all()
        self.advance = moved[0] if alike else None

    def prepare(self, receives: Messages, shares: Array) -> None:
        """The durations of the messages and sums of a step, for every length."""
        alpha, beta = self.links(receives)
        self.duration = alpha[:, None] + (beta * shares)[:, None] * self.nbytes
        added = np.bincount(receives.rank, shares * receives.reduce, self.schedule.size)
        self.adding = np.asarray(self.cluster.gamma * added)[:, None] * self.nbytes

    def links(self, receives: Messages) -> tuple[Array, Array]:
        """α and β of each message, links shared."""
        alpha, beta = np.zeros(len(receives)), np.zeros(len(receives))
        pending, inside = np.ones(len(receives), bool), 1
        for level in self.cluster.levels:
            unit = level.ranks or self.schedule.size
            here = np.flatnonzero(pending & (receives.rank // unit == receives.peer // unit))
            pending[here] = False
            into, out = receives.rank[here] // inside, receives.peer[here] // inside
            crowd = np.maximum(np.bincount(into)[into], np.bincount(out)[out]) if len(here) else np.zeros(0)
            alpha[here] = level.alpha
            beta[here] = level.beta * (np.maximum(1, crowd / level.links) if level.links else 1)
            inside = unit
        return alpha, beta

    def shares(self, messages: Messages) -> Array:
        """The share of n in each message."""
        if self.weights is None:
            return np.asarray(messages.counts * self.schedule.specification.weight)
        of_chunk = self.weights[messages.chunks % self.schedule.parts]
        return np.bincount(messages.each(np.arange(len(messages))), of_chunk, len(messages))

    def fold(self, folds: Folds) -> None:
        """Local sums."""
        if self.weights is None:
            shares = np.full(len(folds.rank), self.schedule.specification.weight)
        else:
            shares = self.weights[folds.into % self.schedule.parts]
        seconds = self.cluster.gamma * (folds.chunks.shape[1] - 1) * shares
        np.add.at(self.clock, folds.rank, seconds[:, None] * self.nbytes)
        self.last = ()


def _check_keys(place: str, row: Mapping[str, Any], allowed: set[str], needed: set[str]) -> None:
    if unknown := sorted(map(str, set(row) - allowed)):
        raise ValueError(f"{place}{unknown[0]}: not a key; allowed: {', '.join(sorted(allowed))}")
    if missing := sorted(needed - set(row)):
        raise ValueError(f"{place}{missing[0]}: missing")


def _number(place: str, value: Any, whole: bool) -> float:
    try:
        number = int(value) if whole else float(value)  # YAML reads 1e-6 as text
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < float("inf") or (whole and number != value):
        raise ValueError(f"{place}={value}: must be a {'whole ' if whole else ''}number from 0")
    return number
