"""What a communicator has done: calls, steps and bytes per collective and algorithm.

    comm.counters.reset();  training step;  print(comm.counters.table())

    collective      algorithm   calls   steps         sent     received
    all_reduce      window         12      24      6291456      6291456

Bytes are those of this rank, by the formula of the algorithm (`volumes.py`), not measured. `sent` is what the rank put
into messages, into other ranks' memory, or where other ranks fetch it (staging); `received` what it took from
messages or read from other ranks' memory. A step is one synchronisation or one round of messages. Cost: one dict
look-up and four additions per call.
"""

from typing import NamedTuple


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


class Counters:
    """The sums since the beginning or the last `reset`."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], list[int]] = {}
        self.last: tuple[str, str, int] | None = None

    def add(self, collective: str, algorithm: str, nbytes: int, volume: Volume) -> None:
        """Count one call."""
        self.last = (collective, algorithm, nbytes)
        sums = self._sums.get((collective, algorithm))
        if sums is None:
            sums = self._sums[collective, algorithm] = [0, 0, 0, 0]
        sums[0] += 1
        sums[1] += volume[0]
        sums[2] += volume[1]
        sums[3] += volume[2]

    def reset(self) -> None:
        """Begin again at zero."""
        self._sums.clear()

    def calls(self, collective: str, algorithm: str | None = None) -> int:
        """How often a collective ran, by one algorithm or by any."""
        return sum(sums[0] for key, sums in self._sums.items() if key[0] == collective and algorithm in (None, key[1]))

    def volume(self, collective: str | None = None, algorithm: str | None = None) -> Volume:
        """The sum over the collectives and algorithms asked for; None: all."""
        rows = [
            sums for key, sums in self._sums.items() if collective in (None, key[0]) and algorithm in (None, key[1])
        ]
        return Volume(*(sum(row[column] for row in rows) for column in (1, 2, 3)))

    def rows(self) -> list[dict[str, str | int]]:
        """One dict per collective and algorithm, sorted by name: for JSON."""
        words = ("calls", "steps", "sent", "received")
        return [
            {"collective": collective, "algorithm": algorithm, **dict(zip(words, sums, strict=True))}
            for (collective, algorithm), sums in sorted(self._sums.items())
        ]

    def table(self) -> str:
        """The rows as text, one line each under a heading; bytes in full."""
        lines = [f"{'collective':<17}{'algorithm':<11}{'calls':>9}{'steps':>9}{'sent':>16}{'received':>16}"]
        for (collective, algorithm), (calls, steps, sent, received) in sorted(self._sums.items()):
            lines.append(f"{collective:<17}{algorithm:<11}{calls:>9}{steps:>9}{sent:>16}{received:>16}")
        return "\n".join(lines)
