"""What is said of a schedule that is wrong."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.collectives.schedules.schedule import Schedule


class ScheduleError(ValueError):
    """A schedule that is wrong: where, what was expected, what was found."""

    def __init__(self, schedule: "Schedule", rank: int, step: int, chunk: int | None, text: str) -> None:
        self.collective, self.algorithm, self.size = schedule.collective, schedule.name, schedule.size
        self.rank, self.step, self.chunk = rank, step, chunk
        place = "" if chunk is None else f", chunk {chunk}"
        super().__init__(
            f"{self.collective} {self.algorithm} between {self.size} ranks: rank {rank}, step {step}{place}: {text}"
        )


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as words: "rank 3", "ranks 0-3,7", "no rank"."""
    from dtrain.collectives.schedules.schedule import chunk_list

    found = list(ranks)
    if not found:
        return "no rank"
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {chunk_list(found)}"
