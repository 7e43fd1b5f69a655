"""A pipeline's timeline, played: how long it takes, how many ranks work at each moment, what is in flight.

The timelines are those of `dtrain show pipeline`. Of many microbatches only the first and last are played.
"""

from __future__ import annotations

from functools import cache

from dtrain.strategies.pipeline.schedules import SCHEDULES, Program, programs
from dtrain.strategies.pipeline.timeline import Timeline, peak_in_flight


@cache
def pace(schedule: str, ranks: int, microbatches: int, backward: float, transfer: float) -> float:
    """Length of a schedule's timeline, in forwards of one stage; ScheduleError where it cannot be.

    Of many microbatches the middle is one pattern that repeats: then it is counted, not played.
    """
    played = _played(ranks, microbatches)
    seconds = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    length = Timeline(_programs(schedule, ranks, played), seconds, transfer).length
    each = SCHEDULES[schedule].chunks * (1 + backward)
    if schedule == "zb_v" and microbatches > played:  # its pattern waits where F, I and W differ
        each = (Timeline(_programs(schedule, ranks, played + ranks), seconds, transfer).length - length) / ranks
    return length + (microbatches - played) * each


@cache
def concurrency(
    schedule: str, ranks: int, microbatches: int, backward: float, transfer: float
) -> tuple[tuple[int, float], ...]:
    """(how many ranks work at once, for how long in all) of the timeline whose length `pace` tells."""
    seconds = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    played = _played(ranks, microbatches)
    timeline = Timeline(_programs(schedule, ranks, played), seconds, transfer)
    ends = [(span.start, 1) for span in timeline.spans] + [(span.stop, -1) for span in timeline.spans]
    times, working, before = [0.0] * (ranks + 2), 0, 0.0
    for moment, change in sorted(ends):
        times[working] += moment - before
        working, before = working + change, moment
    more = pace(schedule, ranks, microbatches, backward, transfer) - timeline.length
    if more > 0:  # of the middle only how many work on average is known: all, but for zb_v
        mean = (microbatches - played) * SCHEDULES[schedule].chunks * (1 + backward) * ranks / more
        fewer = min(ranks, int(mean))
        times[fewer] += more * (fewer + 1 - mean)
        times[fewer + 1] += more * (mean - fewer)
    return tuple((number, time) for number, time in enumerate(times) if time > 0)


@cache
def held(schedule: str, ranks: int, microbatches: int) -> tuple[int, ...]:
    """The most (stage, microbatch) pairs in flight, for each rank."""
    if schedule == "gpipe":
        return (microbatches,) * ranks
    return tuple(map(peak_in_flight, _programs(schedule, ranks, min(microbatches, 2 * ranks))))


def _played(ranks: int, microbatches: int) -> int:
    return microbatches if microbatches <= 2 * ranks else ranks + microbatches % ranks


@cache
def _programs(schedule: str, ranks: int, microbatches: int) -> list[Program]:
    return programs(schedule, ranks, microbatches)
