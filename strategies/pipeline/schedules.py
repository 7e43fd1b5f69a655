"""Pipeline schedules as data: in which order a rank runs the forwards and backwards of its stages.

    (rank, ranks, microbatches, chunks) -> [Action, …]          1f1b, 2 ranks, 3 microbatches
                                                                rank 0   0F0 0F1 0B0 0F2 0B1 0B2
                                                                rank 1   1F0 1B0 1F1 1B1 1F2 1B2

An action is written <stage><kind><microbatch>, as in PyTorch's schedule CSVs. Kinds: F forward; B the whole backward;
or its two halves, I the gradient of the input (which the stage before waits for) and W those of the weights (for which
nobody waits). A model is cut into ranks x chunks stages; stage s runs on rank s % ranks ("loop") or on the way back as
well ("V": 0 1 2 2 1 0). Nothing else is in a schedule: messages follow from the order of the stages (`timeline.py`
checks and times it, `engine.py` runs it).

Invariant: every stage sees F of every microbatch once, and B, or I and then W, once; backwards go in the order of the
microbatches, so that gradients add up in the order of one process without a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Program = list["Action"]


class Action(NamedTuple):
    """One forward or backward of one microbatch through one stage."""

    stage: int
    kind: str
    """F, B, I or W."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class ScheduleError(ValueError):
    """A schedule that cannot run, or not with these numbers."""


def naive(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """One microbatch at a time, forward and back: only one rank ever works.

    Bubble (share of the whole) 1 - 1/p; one microbatch in flight. Plain model parallelism: the baseline.
    """
    return [action for m in range(microbatches) for action in (Action(rank, "F", m), Action(rank, "B", m))]


def gpipe(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """All forwards, then all backwards.

    Bubble (p-1)/(m+p-1); m microbatches in flight. Huang et al., GPipe, arXiv:1811.06965.
    """
    return [Action(rank, kind, m) for kind in "FB" for m in range(microbatches)]


def one_forward_one_backward(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """After p - rank - 1 forwards one forward and one backward in turn: the bubble of GPipe, less memory.

    Bubble (p-1)/(m+p-1); min(m, p - rank) in flight. PipeDream-Flush: Narayanan et al., arXiv:2006.09503.
    """
    warmup = min(ranks - rank - 1, microbatches)
    return _alternate(
        [Action(rank, "F", m) for m in range(microbatches)], [Action(rank, "B", m) for m in range(microbatches)], warmup
    )


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """1F1B where every rank has several small stages: v chunks divide the bubble by v, and send v times as much.

    Bubble (p-1)/(v m + p-1). Microbatches go through the chunks in groups of p. Narayanan et al., arXiv:2104.04473,
    section 2.2.
    """
    if microbatches % ranks:
        lower = microbatches // ranks * ranks
        near = f"{lower} or {lower + ranks}" if lower else f"{ranks}"
        here = f"interleaved: {microbatches} microbatches on {ranks} ranks"
        raise ScheduleError(f"{here}; allowed: multiples of the ranks, such as {near}")

    def order(kind: str) -> Program:
        turns = range(chunks) if kind == "F" else range(chunks - 1, -1, -1)
        return [
            Action(chunk * ranks + rank, kind, first + m)
            for first in range(0, microbatches, ranks)
            for chunk in turns
            for m in range(ranks)
        ]

    warmup = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, chunks * microbatches)
    return _alternate(order("F"), order("B"), warmup)


def zero_bubble_h1(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """1F1B with the backward in halves: weight gradients fill what was a bubble, with no more in flight than p.

    Bubble (p-1)(tF + tI - tW) instead of (p-1)(tF + tB). Qi et al., Zero bubble pipeline parallelism,
    arXiv:2401.10241, section 3 (ZB-H1).
    """
    forwards = [Action(rank, "F", m) for m in range(microbatches)]
    inputs = [Action(rank, "I", m) for m in range(microbatches)]
    program = forwards[: min(ranks - rank, microbatches)]
    weights = 0  # done so far; they stay `rank` microbatches behind, so that late ranks have some left at the end
    for m, action in enumerate(inputs):
        program.append(action)
        if m - weights >= rank:
            program.append(Action(rank, "W", weights))
            weights += 1
        program += forwards[m + ranks - rank : m + ranks - rank + 1]
    return program + [Action(rank, "W", m) for m in range(weights, microbatches)]


def zero_bubble_v(rank: int, ranks: int, microbatches: int, chunks: int) -> Program:
    """Two stages per rank on a V: rank 0 has the first and the last, and the loss needs no way back to it.

    Where F, I and W take equally long, a rank waits for its first forward and for its last backward only; the memory is
    that of 1F1B. Made by the rule of `greedy`, which from 8 ranks on waits a little more.
    Qi et al., arXiv:2401.10241, section 6 (ZB-V).
    """
    from dtrain.strategies.pipeline.greedy import v_shaped

    return v_shaped(ranks, microbatches)[rank]


def _alternate(forwards: Program, backwards: Program, warmup: int) -> Program:
    """`warmup` forwards, then one forward and one backward in turn, then the rest of the backwards."""
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


class Row(NamedTuple):
    """A schedule, and what is known about it."""

    program: Callable[[int, int, int, int], Program]
    chunks: int = 1
    """Stages per rank, by default."""
    several: bool = False
    """Whether other numbers of stages per rank than the default make sense."""
    split: bool = False
    """Whether the backward comes in halves."""


SCHEDULES: dict[str, Row] = {
    "naive": Row(naive),
    "gpipe": Row(gpipe),
    "1f1b": Row(one_forward_one_backward),
    "interleaved": Row(interleaved, chunks=2, several=True),
    "zb_h1": Row(zero_bubble_h1, split=True),
    "zb_v": Row(zero_bubble_v, chunks=2, split=True),
}


def programs(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> list[Program]:
    """The program of every rank. name: a row of SCHEDULES, or FILE.csv, or FILE.py:FUNCTION (as the rows).

    chunks: stages per rank; None: what the schedule is made for. ScheduleError (a ValueError) for what cannot be.
    """
    for what, number in (("ranks", ranks), ("microbatches", microbatches), ("chunks", 1 if chunks is None else chunks)):
        if number < 1:
            raise ScheduleError(f"{what}={number}: allowed: numbers from 1")
    if name.endswith(".csv") or ".py:" in name:
        from dtrain.strategies.pipeline.user import from_file

        return from_file(name, ranks, microbatches, chunks or 1)
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule {name}: allowed: {', '.join(SCHEDULES)}, FILE.csv or FILE.py:FUNCTION")
    row = SCHEDULES[name]
    if chunks not in (None, row.chunks) and not row.several:
        raise ScheduleError(f"schedule {name}: chunks={chunks}; allowed: {row.chunks}")
    return [row.program(rank, ranks, microbatches, chunks or row.chunks) for rank in range(ranks)]
