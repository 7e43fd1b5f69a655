"""How a rank waits for a number in shared memory to grow: spin, yield, nap, and at last report.

    spin     a few hundred looks, only if every rank of the node has a core of its own
    yield    sched_yield between looks, for the first millisecond: with more ranks than cores, the late one can run.
             (Spinning without it costs scheduler ticks: 8-24 ms were measured where 41 us are possible.)
    nap      sleeps of 50 to 200 us, so that a long wait costs no power; where ranks share cores longer ones (`nap`)
    report   after the time limit: who is waited for, in what, and what he last said

Numbers are int64, only ever grow, and each has one writer. x86 keeps the order of stores, so "data, then number"
needs no fence there; elsewhere `fence` is called on both sides.
"""

import os
import platform
import time
from collections.abc import Callable

# Words of each rank's part of the shared control segment, on cache lines of their own: see `flags.py`, `node.py`.
ARRIVED, REDUCED, BELL, IDENTITY, FREE = 0, 16, 32, 40, 48

SPINS = 400
# In machine code, with more ranks than cores: looks, then yields before sleep. The late ones mostly come after a few
# switches, which is cheaper than to sleep and to be woken (8 ranks on 2 cores, all_reduce of 256 KiB: 0.83 ms without
# a yield, 0.68 with 20, 0.53 with 60 and with 300).
CROWDED_TRIES = (0, 100)
TRIES = (2000, 100)  # the same where every rank has a core; one look takes about 20 ns
# The same for short calls: looks for as long as a switch takes. The system may put two ranks on one core all the same,
# and leave them there: all_reduce of 8 bytes in 80 us with 2000 looks, 13 with 100; else 2.5 with both.
SHORT_TRIES = (100, 200)
YIELD_SECONDS = 1e-3
NAPS = (50e-6, 200e-6)
LONGEST_NAP = 2e-3
DEFAULT_TIMEOUT = 300.0
CHECKED = 200  # collectives of each communicator that are always compared; with DTRAIN_DEBUG=1 all are
LIMIT = "the time limit is DTRAIN_TIMEOUT seconds (0: none)"

ORDERED_STORES = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

# Hands the core to another process that is ready; on systems without it, a sleep of nothing does the same.
hand_over: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class CollectiveTimeout(RuntimeError):
    """A rank did not come to a collective within the time limit."""


class CollectiveMismatch(RuntimeError):
    """Ranks came to the same point with different collectives or different arrays."""


def timeout_seconds(timeout: float | None = None) -> float:
    """The time limit: the argument, or the environment variable DTRAIN_TIMEOUT in seconds, or 300. 0 means no limit."""
    if timeout is None:
        text = os.environ.get("DTRAIN_TIMEOUT", "")
        try:
            timeout = float(text) if text else DEFAULT_TIMEOUT
        except ValueError:
            raise ValueError(f"DTRAIN_TIMEOUT={text!r}: allowed: a number of seconds, 0 for no limit") from None
    if not timeout >= 0:
        raise ValueError(f"timeout={timeout}: allowed: a number of seconds, 0 for no limit")
    return timeout or float("inf")


def debugging() -> bool:
    """Whether DTRAIN_DEBUG asks for checks that cost time."""
    word = os.environ.get("DTRAIN_DEBUG", "")
    if word not in ("", "0", "1"):
        raise ValueError(f"DTRAIN_DEBUG={word!r}: allowed: 0, 1")
    return word == "1"


def cores() -> set[int]:
    """The numbers of the cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def nap(waited: float) -> float:
    """Seconds to sleep after as many in vain, where ranks share cores: a sixteenth of them, so that it is found at most
    as much too late.

    Each look takes a core from those who are waited for. With naps of 50 to 200 us, 8 ranks of a pipeline on 2 cores
    woke 10,000 times per step and spent a fifth of both cores on it.
    """
    return min(LONGEST_NAP, max(NAPS[0], waited / 16))


class Patience:
    """The waiting policy of one rank: `crowded` when the node has more ranks than cores."""

    def __init__(self, crowded: bool, timeout: float) -> None:
        self.spins = 0 if crowded else SPINS
        self.timeout = timeout

    def wait(
        self,
        words: memoryview,
        index: int,
        goal: int,
        check: Callable[[], None] | None,
        report: Callable[[float], Exception],
        fence: Callable[[], None] | None,
    ) -> None:
        """Return when words[index] >= goal.

        `check` is called between the looks once spinning has not helped, and may raise; `report(seconds)` makes the
        exception after the time limit.
        """
        for _ in range(self.spins):
            if words[index] >= goal:
                return
        began = time.monotonic()
        naps = 0
        while words[index] < goal:
            if fence is not None:
                fence()
            if check is not None:
                check()
            waited = time.monotonic() - began
            if waited < YIELD_SECONDS:
                hand_over()
                continue
            if waited > self.timeout:
                raise report(waited)
            time.sleep(NAPS[naps > 100])
            naps += 1
