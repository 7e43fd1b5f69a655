"""What was not measured, from what was: the cost of an algorithm as  A α + B n β + C n γ,  fitted to measured times.

    messages (catalogue)    A, B, C from the formula of the schedule; one α, β, γ for all of them
    all others              A = 1, B = what one rank must receive at least (n = 1), C = 0; α, β of their own

α is the latency, β the seconds per byte moved, γ those per byte added. One node and several nodes are fitted apart,
and so are arrays in the window and elsewhere. A fit is a least-squares one of relative errors with no negative
constants: of plain errors only the longest arrays would count.

On one node nothing is said beyond the measured numbers of ranks: below and above them, how ranks share cores and
caches changes more than a formula knows. Between nodes messages cost what they cost, and any number is answered.
Reference: Hockney, Parallel Computing 20 (1994); Thakur, Rabenseifner, Gropp, IJHPCA 19 (2005).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# collective, ranks, nodes, place, bytes, algorithm, seconds
Sample = tuple[str, int, int, str, int, str, float]
Group = tuple[bool, str]  # several nodes?, place
MESSAGES = "messages"
CONSTANTS = ("alpha", "beta", "gamma")  # seconds, seconds per byte

_RECEIVED: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda p: 2 * (p - 1) / p,
    "broadcast": lambda p: 1.0,
    "reduce": lambda p: 1.0,
}


@cache
def terms(collective: str, algorithm: str, ranks: int) -> tuple[bool, tuple[float, float, float]]:
    """Whether it is a schedule of the catalogue, and A, B, C for n = 1."""
    from dtrain.collectives.algorithms import TABLES  # they import the communicator, which imports this
    from dtrain.collectives.schedules.catalogue import ALGORITHMS, schedule

    row = ALGORITHMS.get(collective, {}).get(algorithm)
    own = algorithm in TABLES.get(collective, ())  # shared memory has a "direct" and a "hierarchical" of its own
    if row is not None and not own and row.sizes(ranks):
        return True, tuple(map(float, schedule(collective, algorithm, ranks).cost))  # type: ignore[return-value]
    received = _RECEIVED[collective](ranks) if collective in _RECEIVED else (ranks - 1) / ranks
    return False, (1.0, received, 0.0)


@dataclass
class Costs:
    """The fitted constants. `fitted`: (group, collective, algorithm) -> α, β, γ; schedules share ("", MESSAGES)."""

    fitted: dict[tuple[Group, str, str], tuple[float, float, float]] = field(default_factory=dict)
    known: dict[tuple[Group, str], dict[str, set[int]]] = field(default_factory=dict)
    """(group, collective) -> algorithm -> the numbers of ranks that it was measured on."""

    def rows(self) -> list[dict[str, Any]]:
        """The constants as they stand in a file."""
        return [
            {"several_nodes": group[0], "place": group[1], "collective": collective, "algorithm": algorithm}
            | dict(zip(CONSTANTS, constants, strict=True))
            for (group, collective, algorithm), constants in self.fitted.items()
        ]

    @classmethod
    def read(cls, rows: Sequence[Any], known: Iterable[tuple[str, int, int, str, Iterable[str]]]) -> "Costs":
        """From the rows of a file, and (collective, ranks, nodes, place, algorithms) of what was measured."""
        costs = cls()
        for number, row in enumerate(rows):
            names = {"several_nodes", "place", "collective", "algorithm", *CONSTANTS}
            if not isinstance(row, dict) or set(row) != names:
                raise ValueError(f"costs[{number}]: must have the keys {', '.join(sorted(names))}")
            for word in CONSTANTS:
                if type(row[word]) not in (int, float) or not 0 <= row[word] < math.inf:
                    raise ValueError(f"costs[{number}].{word}={row[word]}: must be a number from 0")
            group = bool(row["several_nodes"]), str(row["place"])
            alpha, beta, gamma = (float(row[word]) for word in CONSTANTS)
            costs.fitted[group, str(row["collective"]), str(row["algorithm"])] = alpha, beta, gamma
        for collective, ranks, nodes, place, algorithms in known:
            costs.know(collective, ranks, nodes, place, algorithms)
        return costs

    def know(self, collective: str, ranks: int, nodes: int, place: str, algorithms: Iterable[str]) -> None:
        """These were measured together."""
        measured = self.known.setdefault(((nodes > 1, place), collective), {})
        for name in algorithms:
            measured.setdefault(name, set()).add(ranks)

    def seconds(self, collective: str, ranks: int, nodes: int, place: str, nbytes: float, algorithm: str) -> float:
        """The time of one call; infinite where nothing like it was measured."""
        group = nodes > 1, place
        message, factors = terms(collective, algorithm, ranks)
        constants = self.fitted.get((group, "", MESSAGES) if message else (group, collective, algorithm))
        if constants is None:
            return math.inf
        a, b, c = factors
        alpha, beta, gamma = constants
        return a * alpha + nbytes * (b * beta + c * gamma)

    def order(self, collective: str, ranks: int, nodes: int, place: str, nbytes: float) -> tuple[str, ...]:
        """The measured algorithms of a collective, the cheapest first; () where nothing can be said."""
        known = self.known.get((((nodes > 1), place), collective), {})
        sizes = {size for measured in known.values() for size in measured}
        if not sizes or (nodes == 1 and not min(sizes) <= ranks <= max(sizes)):
            return ()
        times = {name: self.seconds(collective, ranks, nodes, place, nbytes, name) for name in known}
        return tuple(sorted((name for name in times if times[name] < math.inf), key=lambda name: times[name]))


def fit(samples: Iterable[Sample]) -> Costs:
    """The constants that come closest to all samples."""
    costs = Costs()
    rows: dict[tuple[Group, str, str], list[tuple[float, float, float, float]]] = defaultdict(list)
    for collective, ranks, nodes, place, nbytes, algorithm, seconds in samples:
        group = nodes > 1, place
        message, (a, b, c) = terms(collective, algorithm, ranks)
        key = (group, "", MESSAGES) if message else (group, collective, algorithm)
        rows[key].append((a, b * nbytes, c * nbytes, seconds))
        costs.know(collective, ranks, nodes, place, [algorithm])
    for key, found in rows.items():
        costs.fitted[key] = _constants(found)
    return costs


def _constants(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    """α, β, γ >= 0 of the least sum of squared relative errors."""
    import numpy as np  # where a table is made, not where it is used

    values = np.array(rows, np.float64)
    relative = values[:, :3] / values[:, 3:]
    active = [column for column in range(3) if relative[:, column].any()]
    while active:  # the classic way with so few: leave out what comes out negative, the worst first
        scale = relative[:, active].max(0)
        found = np.linalg.lstsq(relative[:, active] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if (found >= 0).all():
            result = [0.0, 0.0, 0.0]
            for column, constant in zip(active, found.tolist(), strict=True):
                result[column] = constant
            return result[0], result[1], result[2]
        worst = int(np.argmin(found * scale))
        active.pop(worst)
    return 0.0, 0.0, 0.0
