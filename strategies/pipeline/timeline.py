"""What a schedule does in time: checked, timed, and its memory counted, in one process.

    rank 0  │F0│F1│F2│F3│        │  B0  │  B1  │ …        a rank runs its program in order; an action starts when the
    rank 1     │F0│F1│F2│F3│  │  B0  │  B1  │             rank is free and what it needs has come:
                                                           F(s,m) after F(s-1,m);  B(s,m), I(s,m) after F(s,m) and
                                                           the same of stage s+1;  W(s,m) after I(s,m)

Messages wait for nobody (the engine receives ahead), so a schedule can hang only if its actions wait for one another
in a circle: then `Timeline` refuses it and names who waits for what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dtrain.strategies.pipeline.schedules import Action, Program, ScheduleError

SECONDS: dict[str, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""A backward costs two forwards: one for the gradient of the input, one for that of the weights."""


class Span(NamedTuple):
    """An action in time."""

    rank: int
    action: Action
    start: float
    stop: float


class Timeline:
    """The spans of all actions of a schedule; a ScheduleError says what is wrong with it."""

    def __init__(
        self, programs: Sequence[Program], seconds: Mapping[str, float] | None = None, transfer: float = 0.0
    ) -> None:
        """seconds: of an action of each kind (default: F 1, B 2, I 1, W 1); transfer: between stages on two ranks."""
        self.programs = programs
        self.ranks = len(programs)
        self.rank_of = check(programs)
        self.stages = len(self.rank_of)
        self.microbatches = 1 + max(action.microbatch for program in programs for action in program)
        self.spans = list(self._run(seconds or SECONDS, transfer))

    @property
    def length(self) -> float:
        """From the first start to the last stop."""
        return max(span.stop for span in self.spans)

    @property
    def bubble(self) -> float:
        """The share of the whole time (length x ranks) in which ranks have nothing to do."""
        return bubble(self.spans, self.ranks)

    @property
    def messages(self) -> int:
        """Activations and gradients that go from rank to rank."""
        ways = sum(a != b for a, b in zip(self.rank_of, self.rank_of[1:], strict=False))
        return 2 * self.microbatches * ways

    def in_flight(self) -> list[int]:
        """For each rank the most (stage, microbatch) pairs whose activations it holds at once."""
        return [peak_in_flight(program) for program in self.programs]

    def _run(self, seconds: Mapping[str, float], transfer: float) -> Iterator[Span]:
        stop: dict[Action, float] = {}
        free = [0.0] * self.ranks
        done = [0] * self.ranks
        while True:
            moved = False
            for rank, program in enumerate(self.programs):
                while done[rank] < len(program):
                    action = program[done[rank]]
                    before = list(needs(action, self.stages, stop))
                    if not all(other in stop for other in before):
                        break
                    ready = (stop[o] + (transfer if self.rank_of[o.stage] != rank else 0) for o in before)
                    start = max(free[rank], *ready, 0.0)
                    stop[action] = free[rank] = start + seconds[action.kind]
                    yield Span(rank, action, start, stop[action])
                    done[rank] += 1
                    moved = True
            if all(d == len(program) for d, program in zip(done, self.programs, strict=True)):
                return
            if not moved:
                raise ScheduleError("the ranks wait for one another: " + "; ".join(self._waiting(done, stop)))

    def _waiting(self, done: Sequence[int], stop: Mapping[Action, float]) -> Iterator[str]:
        for rank, program in enumerate(self.programs):
            if done[rank] < len(program):
                action = program[done[rank]]
                missing = next(other for other in needs(action, self.stages, stop) if other not in stop)
                yield f"rank {rank} at {action} (action {done[rank]}) waits for {missing} of rank " + str(
                    self.rank_of[missing.stage]
                )


def bubble(spans: Sequence[Span], ranks: int) -> float:
    """The share of the time from the first start to the last stop in which ranks do nothing; planned or measured."""
    length = max(span.stop for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.stop - span.start for span in spans) / (length * ranks)


def needs(action: Action, stages: int, known: Mapping[Action, float]) -> Iterator[Action]:
    """The actions that must be over before this one."""
    stage, kind, m = action
    if kind == "F":
        if stage > 0:
            yield Action(stage - 1, "F", m)
        return
    if kind == "W":
        yield Action(stage, "I", m)
        return
    yield Action(stage, "F", m)
    if stage < stages - 1:  # the stage after may split its backward or not
        whole = Action(stage + 1, "B", m)
        yield whole if whole in known else Action(stage + 1, "I", m) if Action(stage + 1, "I", m) in known else whole


def check(programs: Sequence[Program]) -> list[int]:
    """The rank of each stage; a ScheduleError names the rank, the place and the action of the first mistake."""
    seen, rank_of = _in_order(programs)
    if not seen:
        raise ScheduleError("an empty schedule")
    stages = 1 + max(rank_of)
    microbatches = 1 + max(action.microbatch for action in seen)
    for stage in range(stages):
        if stage not in rank_of:
            raise ScheduleError(f"stage {stage} of {stages} is on no rank")
        for m in range(microbatches):
            kinds = {kind for kind in SECONDS if Action(stage, kind, m) in seen}
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                raise ScheduleError(
                    f"rank {rank_of[stage]}, stage {stage}, microbatch {m}: "
                    f"has {' '.join(sorted(kinds)) or 'nothing'}; needed: F and B, or F, I and W"
                )
    idle = [rank for rank, program in enumerate(programs) if not program]
    if idle:
        raise ScheduleError(f"rank {idle[0]} has nothing to do")
    return [rank_of[stage] for stage in range(stages)]


def _in_order(programs: Sequence[Program]) -> tuple[set[Action], dict[int, int]]:
    """All actions, each once and after what it needs of its own stage; and the rank of each stage."""
    seen: dict[Action, int] = {}
    rank_of: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for place, action in enumerate(program):
            where = f"rank {rank}, action {place}: {action}"
            if action.kind not in SECONDS or action.stage < 0 or action.microbatch < 0:
                raise ScheduleError(f"{where}: allowed: <stage>F|B|I|W<microbatch>")
            if action in seen:
                raise ScheduleError(f"{where}: a second time (first on rank {seen[action]})")
            if rank_of.setdefault(action.stage, rank) != rank:
                raise ScheduleError(f"{where}: stage {action.stage} is on rank {rank_of[action.stage]}")
            for earlier in needs(action, 1 + action.stage, {}):
                if earlier.stage == action.stage and earlier not in seen:
                    raise ScheduleError(f"{where}: before {earlier}")
            other = {"B": "I", "I": "B"}.get(action.kind)
            if other is not None and action._replace(kind=other) in seen:
                raise ScheduleError(f"{where}: the backward of this microbatch is there already")
            seen[action] = rank
    return set(seen), rank_of


def peak_in_flight(program: Program) -> int:
    """The most (stage, microbatch) pairs between their F and their B (or W), when everything runs in this order."""
    now = most = 0
    for action in program:
        now += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
        most = max(most, now)
    return most
