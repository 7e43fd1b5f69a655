"""What the ranks of a node have come to, in words: who came to something else, and who does not come at all.

    rank 0   │ #56 all_reduce │ #57 all_reduce │     each rank reads the records of the others (`records.py`)
    rank 1   │ #56 all_reduce │ #57 broadcast  │     another signature: CollectiveMismatch
    rank 2   │ #56 all_reduce │                      ARRIVED = 56 after the time limit: CollectiveTimeout

Ranks that share no memory write letters instead (`desync.py`).
"""

from collections.abc import Sequence

from dtrain.collectives import records
from dtrain.collectives.flags import Flags, Peers
from dtrain.collectives.progress import Progress
from dtrain.collectives.records import SIGNATURE, slot
from dtrain.collectives.waiting import ARRIVED, CollectiveMismatch, CollectiveTimeout


class Reports:
    """One rank's view of the records of all ranks."""

    def __init__(
        self,
        rank: int,
        flags: Flags,
        texts: Sequence[memoryview],
        traced: int,
        world: Sequence[int],
        together: Progress,
    ) -> None:
        """texts: where all ranks have them, up to collective `traced`; world: the numbers of the ranks in the world."""
        self._rank = rank
        self._flags = flags
        self._texts = texts
        self._traced = traced
        self._world = world
        self._together = together

    def check(self, number: int, peers: Peers | None = None) -> None:
        """CollectiveMismatch if a peer (default: any) has come to something else under this number. Never waits."""
        mine, at = self._flags.mine, slot(number)
        if mine[at] != number:
            return  # so long ago that the record is overwritten
        for rank, words in self._flags.peers if peers is None else peers:
            if words[ARRIVED] >= number and words[at + SIGNATURE] != mine[at + SIGNATURE] and words[at] == number:
                raise self.mismatch(rank, number)

    def mismatch(self, rank: int, number: int) -> CollectiveMismatch:
        """What to raise when a peer came to something else under this number."""
        return CollectiveMismatch(
            f"the ranks do not do the same: rank {self._rank} came to {self._describe(self._rank, number)}, "
            f"rank {rank} to {self._describe(rank, number)}"
        )

    def timeout(self, index: int, goal: int, waited: float) -> CollectiveTimeout:
        """What to raise when flags of peers are not at their goal after `waited` seconds."""
        late = [(rank, words) for rank, words in self._flags.peers if words[index] < goal]
        lines = [
            f"rank {self._rank} of {len(self._flags.words)} waited {waited:.0f} s for "
            f"{', '.join(f'rank {rank}' for rank, _ in late)} in {self._describe(self._rank, goal)}"
        ]
        for rank, words in late:
            last = words[ARRIVED]
            what = self._describe(rank, last) if last else "no collective of this communicator"
            lines.append(f"rank {rank} last came to {what}")
        told = self._together.tell([self._world[rank] for rank, _ in late])
        return CollectiveTimeout("\n".join([*lines, *told]))

    def _describe(self, rank: int, number: int) -> str:
        what = records.describe(self._flags.words[rank], number)
        return what + records.read_text(self._texts[rank], number) * (number <= self._traced)
