"""A schedule is data: what every rank sends, receives and adds up in every step of a collective.

    one algorithm (a function)  ──►  steps of each rank  ──►  prover · simulator · drawing · interpreter · executor

    def ring(rank, size):                                   step 0, 3 ranks:     0 ──c0──► 1 ──c1──► 2 ──c2──► 0
        for k in range(size - 1):
            yield Step(
                sends=[Send((rank + 1) % size, [(rank - k) % size])],
                receives=[Receive((rank - 1) % size, [(rank - k - 1) % size], reduce=True)],
            )

The vector is cut into `parts` chunks; a rank has one place for each, numbered as the chunks (an algorithm that needs
scratch memory has `copies` > 1: place p is chunk p % parts in copy p // parts). The meaning of a step, the same for
all who read it:

1. all sends read what their places held before the step;
2. what arrives without `reduce` replaces the content of its places;
3. what arrives with `reduce` is added: the arrivals of the step and what the rank has, folded from the left in the
   order of the ranks, so that a chunk keeps the order of the ranks where the algorithm does;
4. the local `folds` run, in the order written.

Step t of one rank meets step t of its peers: a message sent in step t is received in step t. A rank with nothing to do
yields an empty Step; one whose steps end early is idle afterwards. So a schedule whose messages match cannot deadlock:
all ranks can finish step t when all have begun it, which they can when all have finished step t - 1.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.schedules.specification import PROMISES, Specification, specification

NONE = -1


@dataclass(frozen=True, slots=True)
class Send:
    """One message to `peer`: the content of `chunks`, in this order. Not sent unless `when`.

    A chunk NONE (-1) in the list is left out: so that lists of different lengths can be written for all ranks at once.
    """

    peer: int
    chunks: Sequence[int]
    when: bool = True

    def __str__(self) -> str:
        return f"→{self.peer} {chunk_list(self.chunks)}"


@dataclass(frozen=True, slots=True)
class Receive:
    """One message from `peer` into the places `chunks`: it replaces their content, or is added to it (`reduce`)."""

    peer: int
    chunks: Sequence[int]
    reduce: bool = False
    when: bool = True

    def __str__(self) -> str:
        return f"←{self.peer} {'+' if self.reduce else ''}{chunk_list(self.chunks)}"


@dataclass(frozen=True, slots=True)
class Fold:
    """Local: place `into` = chunks[0] + chunks[1] + ... in this order; with one chunk, a copy."""

    into: int
    chunks: Sequence[int]

    def __str__(self) -> str:
        return f"{self.into}={'+'.join(map(str, self.chunks))}"


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step; see the module's text for the order."""

    sends: Sequence[Send] = ()
    receives: Sequence[Receive] = ()
    folds: Sequence[Fold] = ()

    def __str__(self) -> str:
        return "  ".join(map(str, [*self.sends, *self.receives, *self.folds])) or "idle"


Steps = Callable[..., Iterable[Step]]  # (rank, size, **parameters) -> the steps of the rank


class Cost(NamedTuple):
    """Time on uniform links: alpha messages one after the other, beta * n bytes sent, gamma * n bytes added.

    n: bytes of the whole vector; of what is gathered, for all_gather and gather; of one rank's send buffer, for
    all_to_all.
    """

    alpha: float
    beta: float = 0.0
    gamma: float = 0.0

    def seconds(self, nbytes: float, alpha: float, beta: float, gamma: float) -> float:
        """The time with `alpha` seconds per message, `beta` per byte sent, `gamma` per byte added."""
        return self.alpha * alpha + nbytes * (self.beta * beta + self.gamma * gamma)


def any_size(size: int) -> bool:
    """For algorithms that work with every number of ranks."""
    return True


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the catalogue.

    parts: chunks per vector, or per block for collectives on blocks, as a function of size and parameters.
    regular: the steps contain no `if` on the rank, so that one call with the array of all ranks gives the steps of all
    at once (each peer, chunk and `when` is then an array); the prover and the simulator are faster for it.
    ordered: the sum of every chunk is x0 + x1 + x2 + ... in the order of the ranks (any brackets).
    """

    steps: Steps
    cost: Callable[..., Cost]
    parts: Callable[..., int] = lambda size, **parameters: 1
    copies: Callable[..., int] = lambda size, **parameters: 1
    regular: bool = False
    ordered: bool = False
    sizes: Callable[[int], bool] = any_size
    parameters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """An algorithm for one collective between `size` ranks, its parameters bound."""

    collective: str
    name: str
    size: int
    algorithm: Algorithm
    parameters: dict[str, Any]
    root: int = 0

    @cached_property
    def specification(self) -> Specification:
        """What the collective asks for: who has which chunk before, who wants which one after."""
        parts = self.algorithm.parts(self.size, **self.parameters)
        return specification(self.collective, self.size, parts, self.root)

    @property
    def parts(self) -> int:
        """The number of chunks."""
        return self.specification.parts

    @property
    def places(self) -> int:
        """The number of places in the memory of a rank: chunks and scratch."""
        return self.parts * self.algorithm.copies(self.size, **self.parameters)

    @property
    def cost(self) -> Cost:
        """The formula of the catalogue."""
        return self.algorithm.cost(self.size, **self.parameters)

    def of(self, rank: int) -> list[Step]:
        """The steps of one rank, with plain tuples in them and without what is not to be done."""
        return [_plain(step) for step in self.generate(rank)]

    def generate(self, rank: Any) -> Iterator[Step]:
        """The steps as the algorithm yields them; `rank` may be the array of all ranks where it is regular."""
        rooted = {"root": self.root} if self.specification.rooted else {}
        return iter(self.algorithm.steps(rank, self.size, **rooted, **self.parameters))

    def __str__(self) -> str:
        rows = (f"rank {rank}: " + " | ".join(map(str, self.of(rank))) for rank in range(self.size))
        return "\n".join([f"{self.collective} {self.name}, {self.size} ranks, {self.parts} chunks", *rows])


def bind(
    collective: str, name: str, algorithm: Algorithm | Steps, size: int, root: int = 0, **parameters: Any
) -> Schedule:
    """The schedule of an algorithm between `size` ranks; ValueError for a size or parameter it does not know.

    algorithm: a row of the catalogue, or the bare function of a new one (as many chunks as ranks, no formula).
    """
    title = f"{collective} {name}"
    if isinstance(algorithm, Algorithm):
        row = algorithm
    else:
        promise = PROMISES[collective]
        row = custom(algorithm, parts=1 if promise.blocks or promise.pairs else size)
    if size < 1 or not row.sizes(size):
        why = (row.sizes.__doc__ or "").strip().rstrip(".")
        raise ValueError(f"{title}: size={size}: not possible between so many ranks; {why[:1].lower()}{why[1:]}")
    if not 0 <= root < size:
        raise ValueError(f"{title}: root={root}: allowed: 0 to {size - 1}")
    unknown = set(parameters) - set(row.parameters)
    if unknown:
        allowed = ", ".join(row.parameters) or "none"
        raise ValueError(f"{title}: {', '.join(sorted(unknown))}: not a parameter of it; allowed: {allowed}")
    for key, value in parameters.items():
        least = min(1, row.parameters[key])  # 0 where that is the default: left to the algorithm
        if value < least:
            raise ValueError(f"{title}: {key}={value}: allowed: whole numbers from {least}")
    rooted = ("root",) if PROMISES[collective].rooted else ()
    if refusal := _refusal(row.steps, (*rooted, *row.parameters)):
        raise ValueError(f"{title}: {refusal}")
    return Schedule(collective, name, size, row, {**row.parameters, **parameters}, root)


@lru_cache(maxsize=256)
def _refusal(steps: Steps, more: tuple[str, ...]) -> str:
    """Why this function cannot be called with rank, size and `more`; empty: it can."""
    try:
        inspect.signature(steps).bind(0, 1, **dict.fromkeys(more))
    except TypeError as error:
        name = getattr(steps, "__name__", "it")
        return f"{name}({', '.join(('rank', 'size', *more))}) must be possible: {error}"
    return ""


def custom(steps: Steps, parts: int, copies: int = 1) -> Algorithm:
    """A row for a function that is in no table: `parts` chunks per vector (or block), cost unknown."""

    def unknown(size: int) -> Cost:
        return Cost(float("nan"), float("nan"), float("nan"))

    return Algorithm(steps, unknown, parts=lambda size: parts, copies=lambda size: copies)


def span(first: Any, count: int) -> Any:
    """The chunks first, first + 1, ..., so many; of all ranks at once, shape (count, ranks)."""
    return np.add.outer(np.arange(count), first)


def chunk_list(chunks: Iterable[int]) -> str:
    """Chunks as text: runs of three and more as 4-7, the rest one by one."""
    runs: list[list[int]] = []
    for chunk in chunks:
        if runs and chunk == runs[-1][1] + 1:
            runs[-1][1] = chunk
        else:
            runs.append([chunk, chunk])
    texts = []
    for first, last in runs:
        texts.append(f"{first}-{last}" if last > first + 1 else ",".join(map(str, range(first, last + 1))))
    return ",".join(texts)


def _plain(step: Step) -> Step:
    return Step(
        tuple(Send(int(s.peer), _numbers(s.chunks)) for s in step.sends if s.when),
        tuple(Receive(int(r.peer), _numbers(r.chunks), r.reduce) for r in step.receives if r.when),
        tuple(Fold(int(f.into), _numbers(f.chunks)) for f in step.folds),
    )


def _numbers(chunks: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(chunk) for chunk in chunks if chunk != NONE)
