"""What a plan chooses, and for what: degrees and options of one layout, and the job that it is for."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.config.rules import divisors
from dtrain.launch.plan.machine import Machine
from dtrain.launch.plan.profile import Profile
from dtrain.strategies.pipeline.schedules import SCHEDULES


@dataclass(frozen=True)
class Layout:
    """What is chosen."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    data_parallel: str = "ddp"
    sequence: bool = False
    schedule: str = "1f1b"
    micro_batch: int = 1
    recompute: bool = False
    cp: int = 1
    ep: int = 1
    context: str = "ring"
    tensor: str = "1d"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the ranks of tp: as square as can be, or one row."""
        if self.tensor == "1d":
            return 1, self.tp
        rows = max(rows for rows in divisors(self.tp) if rows * rows <= self.tp)
        return rows, self.tp // rows

    @property
    def options(self) -> list[str]:
        """What a table calls the rest."""
        names = [self.context] * (self.cp > 1) + ["summa"] * (self.tensor == "2d")
        return names + ["sequence"] * self.sequence + ["recompute"] * self.recompute

    @property
    def data(self) -> int:
        """Ranks that have samples of their own."""
        return self.dp * self.ep

    @property
    def sharers(self) -> int:
        """Ranks over which ZeRO cuts: they hold the same parameters and have other tokens."""
        return self.dp * self.cp

    @property
    def chunks(self) -> int:
        """Stages per rank."""
        return SCHEDULES[self.schedule].chunks if self.pp > 1 else 1


@dataclass(frozen=True)
class Job:
    """What is to be done, on what."""

    profile: Profile
    machine: Machine
    ranks: int
    global_batch: int
    optimizer: str
