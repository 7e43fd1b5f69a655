"""What a communicator has done: calls, steps and bytes per collective, algorithm and purpose.

    comm.counters.reset();  training step;  print(comm.counters.table())

    collective       algorithm  purpose        calls    steps            sent        received
    all_reduce       window                       12       24         6291456         6291456
    all_reduce       staged     loss               1        1              16             112

Bytes are those of this rank, by the formula of the algorithm (`volumes.py`), not measured. `sent` is what the rank put
into messages, into other ranks' memory, or where other ranks fetch it (staging); `received` what it took from
messages or read from other ranks' memory. A step is one synchronisation or one round of messages.

A purpose keeps what is no part of the work apart: within `with comm.counters.purpose("loss"):` everything that this
communicator, its parent and those split from it do is counted under that name. Cost of counting: one dict look-up and
four additions per call; calls that are prepared have a `Tally`, one addition, and the rest is reckoned when somebody
reads. The purpose costs something only where it changes.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple
from weakref import WeakSet


class Volume(NamedTuple):
    """What one call costs this rank."""

    steps: int
    sent: int  # bytes
    received: int  # bytes


class Last(NamedTuple):
    """What ran last: which collective, by which algorithm, on how many bytes (of the longer of source and target)."""

    collective: str
    algorithm: str
    nbytes: int


class Key(NamedTuple):
    """One row."""

    collective: str
    algorithm: str
    purpose: str


RECENT = 128
WORDS = ("calls", "steps", "sent", "received")
Totals = dict[Key, tuple[int, ...]]  # in the order of WORDS
_Sums = dict[tuple[str, str], list[int]]


class _Family:
    """The counters of a world and of all that was split from it, which have one purpose at a time."""

    def __init__(self) -> None:
        self.members: WeakSet[Counters] = WeakSet()
        self.purpose = ""

    def turn(self, purpose: str) -> None:
        self.purpose = purpose
        for member in self.members:
            member.turn(purpose)


class Tally:
    """How often one prepared call ran since it was last added to the sums."""

    __slots__ = ("calls", "last", "volume")

    def __init__(self, last: tuple[str, str, int], volume: Volume) -> None:
        self.calls = 0
        self.last = last
        self.volume = volume


class Counters:
    """The sums since the beginning or the last `reset`."""

    def __init__(self) -> None:
        self._by_purpose: dict[str, _Sums] = {}
        self._sums: _Sums = {}
        self.volume_of_last = Volume(0, 0, 0)  # that was added one by one
        self.recent: deque[tuple[float, tuple[str, str, int]]] = deque(maxlen=RECENT)
        """When and what, for the report of a job that hangs."""
        self._tallies: list[Tally] = []
        self._family = _Family()
        self.follow(self)

    @property
    def last(self) -> tuple[str, str, int] | None:
        """Collective, algorithm and bytes of the last call."""
        return self.recent[-1][1] if self.recent else None

    @property
    def finished(self) -> float:
        """When (`monotonic`) this communicator last finished or started a call; 0.0: never."""
        return self.recent[-1][0] if self.recent else 0.0

    def follow(self, parent: "Counters") -> None:
        """Count for the purposes of `parent` from now on, and it for mine."""
        self._family = parent._family
        self._family.members.add(self)
        self.turn(self._family.purpose)

    def turn(self, purpose: str) -> None:
        """Count under this name from now on."""
        self._gather()
        self._sums = self._by_purpose.setdefault(purpose, {})

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Within, all communicators of this family count under `name`; inside another purpose nothing changes."""
        if self._family.purpose:
            yield
            return
        self._family.turn(name)
        try:
            yield
        finally:
            self._family.turn("")

    def add(self, collective: str, algorithm: str, nbytes: int, volume: Volume) -> None:
        """Count one call."""
        last = (collective, algorithm, nbytes)
        self.volume_of_last = volume
        self.recent.append((monotonic(), last))
        self._add(last, 1, volume)

    def _add(self, what: tuple[str, str, int], calls: int, volume: Volume) -> None:
        sums = self._sums.get(what[:2])
        if sums is None:
            sums = self._sums[what[:2]] = [0, 0, 0, 0]
        sums[0] += calls
        sums[1] += calls * volume[0]
        sums[2] += calls * volume[1]
        sums[3] += calls * volume[2]

    def tally(self, collective: str, algorithm: str, nbytes: int, volume: Volume) -> Tally:
        """For a call that is prepared, which does `calls += 1` and `recent.append((monotonic(), last))` itself."""
        made = Tally((collective, algorithm, nbytes), volume)
        self._tallies.append(made)
        return made

    def _gather(self) -> None:
        """Add the tallies to the sums of the purpose they were counted for."""
        for tally in self._tallies:
            if tally.calls:
                self._add(tally.last, tally.calls, tally.volume)
                tally.calls = 0

    def forget(self) -> None:
        """No call is prepared any more."""
        self._gather()
        self._tallies.clear()

    def reset(self) -> None:
        """Begin again at zero."""
        self._gather()
        for sums in self._by_purpose.values():
            sums.clear()

    def totals(self) -> Totals:
        """All sums, sorted by name."""
        self._gather()
        found: Totals = {
            Key(*names, purpose): tuple(sums)
            for purpose, rows in self._by_purpose.items()
            for names, sums in rows.items()
        }
        return dict(sorted(found.items()))

    def calls(self, collective: str, algorithm: str | None = None, purpose: str | None = None) -> int:
        """How often a collective ran, by one algorithm or by any, for one purpose or for any."""
        return sum(row[0] for key, row in self.totals().items() if _matches(key, collective, algorithm, purpose))

    def volume(self, collective: str | None = None, algorithm: str | None = None, purpose: str | None = None) -> Volume:
        """The sum over the collectives, algorithms and purposes asked for; None: all."""
        rows = [row for key, row in self.totals().items() if _matches(key, collective, algorithm, purpose)]
        return Volume(*(sum(row[column] for row in rows) for column in (1, 2, 3)))

    def rows(self) -> list[dict[str, str | int]]:
        """One dict per collective, algorithm and purpose, sorted by name: for JSON."""
        return [{**key._asdict(), **dict(zip(WORDS, row, strict=True))} for key, row in self.totals().items()]

    def table(self) -> str:
        """The rows as text, one line each under a heading; bytes in full."""
        return table(self.totals())


def _matches(key: Key, *wanted: str | None) -> bool:
    return all(want in (None, have) for want, have in zip(wanted, key, strict=True))


def table(totals: Mapping[Key, Iterable[int]]) -> str:
    """Totals as text."""
    wide = max([11, *(len(algorithm) + 1 for _, algorithm, _ in totals)])
    lines = [
        f"{'collective':<17}{'algorithm':<{wide}}{'purpose':<11}{'calls':>9}{'steps':>9}{'sent':>16}{'received':>16}"
    ]
    for (collective, algorithm, purpose), (calls, steps, sent, received) in totals.items():
        lines.append(f"{collective:<17}{algorithm:<{wide}}{purpose:<11}{calls:>9}{steps:>9}{sent:>16}{received:>16}")
    return "\n".join(lines)
