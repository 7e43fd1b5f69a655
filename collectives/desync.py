"""Do all ranks do the same? Compared before anything blocks, where the ranks share no memory to compare records in.

    rank 0   all_reduce #7 sum 1000 float32, train.py:57   ──►  ranks 1, 2
    rank 1   broadcast  #7 root 0, train.py:61             ──►  ranks 0, 2        CollectiveMismatch on all three

Each rank writes what it is about to do to the others, waits for theirs, and compares. The texts travel on a
communicator of their own (`Post`), so they meet no collective, whatever went wrong. Always for the first CHECKED
collectives of a communicator, where such mistakes show; for all with DTRAIN_DEBUG=1. Up to FULL ranks everybody writes
to everybody; with more, each rank to those 1, 2, 4, ... away: one of them finds the mistake and ends all.
On one node the records in shared memory do the same (`reports.py`), for every collective, at no cost.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dtrain.collectives import callers
from dtrain.collectives.waiting import CHECKED, CollectiveMismatch, CollectiveTimeout, debugging

if TYPE_CHECKING:
    from dtrain.collectives.call import Call
    from dtrain.collectives.progress import Progress
    from dtrain.collectives.transport import Post, Transport

FULL = 32


class Letters:
    """What came by post and was not read yet. Several threads of a rank may ask."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self._lock = threading.Lock()
        self._found: dict[str, dict[int, Any]] = defaultdict(dict)

    def send(self, ranks: Iterable[int], subject: str, content: Any) -> None:
        """To these ranks of the world; never waits."""
        text = json.dumps([subject, content]).encode()
        for rank in ranks:
            self.post.send(rank, text)

    def collect(self) -> None:
        """Fetch what has come; never waits."""
        with self._lock:
            for rank, text in self.post.receive():
                subject, content = _opened(text)
                self._found[subject][rank] = content

    def read(self, subject: str) -> dict[int, Any]:
        """The letters about a subject so far, by sender."""
        return self._found.get(subject, {})

    def take(self, subject: str) -> dict[int, Any]:
        """`read`, and forget them."""
        with self._lock:
            return self._found.pop(subject, {})


@lru_cache(64)
def _opened(text: bytes) -> Any:
    """[subject, content]; nobody changes them. Where all is well the ranks' letters are the same: one is read."""
    return json.loads(text)


class Desync:
    """The check of one communicator."""

    def __init__(self, transport: Transport, letters: Letters, progress: Progress, key: str, timeout: float) -> None:
        """`key`: the same on all ranks of the communicator and of no other."""
        self._rank, self._size = transport.rank, transport.size
        self._world = transport.world_ranks
        self._letters = letters
        self._progress = progress
        self._key = key
        self._timeout = timeout
        self._number = 0
        self.last = CHECKED if not debugging() else 1 << 62
        if self._size <= FULL:
            self._peers = [rank for rank in range(self._size) if rank != self._rank]
        else:
            steps = [1 << power for power in range((self._size - 1).bit_length())]
            ways = {(self._rank + sign * step) % self._size for step in steps for sign in (1, -1)}
            self._peers = sorted(ways - {self._rank})

    def check(self, name: str, algorithm: str, call: Call | None = None) -> None:
        """Return when all ranks have come to the same; CollectiveMismatch or CollectiveTimeout otherwise."""
        self._number += 1
        if self._number > self.last:
            return
        caller = callers.here()
        words = [algorithm, caller.arguments, f"on {caller.group}" if caller.group else ""]
        what = f"{name} #{self._number} ({', '.join(filter(None, words))}) at {caller.line}"
        del caller  # its frames, this one among them, would live on in a circle, and with them the arrays they name
        mine: list[Any] = [signature(name, algorithm, call), what]
        subject = f"{self._key}#{self._number}"
        self._letters.send([self._world[peer] for peer in self._peers], subject, mine)
        missing = set(self._peers)
        began = time.monotonic()
        while missing:
            self._letters.collect()
            came = self._letters.read(subject)
            for peer in sorted(missing):
                other = came.get(self._world[peer])
                if other is None:
                    continue
                missing.remove(peer)
                if other[0] != mine[0]:
                    raise CollectiveMismatch(
                        f"the ranks do not do the same: rank {self._rank} came to {mine[1]}, rank {peer} to {other[1]}"
                    )
            if missing:
                self._progress.poll()
                waited = time.monotonic() - began
                if waited > self._timeout:
                    raise self._late(what, sorted(missing), waited)
                self._letters.post.rest(waited)
        self._letters.take(subject)

    def _late(self, what: str, missing: list[int], waited: float) -> CollectiveTimeout:
        names = ", ".join(f"rank {rank}" for rank in missing)
        lines = [f"rank {self._rank} of {self._size} waited {waited:.0f} s for {names} in {what}"]
        return CollectiveTimeout("\n".join([*lines, *self._progress.tell([self._world[rank] for rank in missing])]))


def signature(name: str, algorithm: str, call: Call | None) -> list[Any]:
    """What must be equal on all ranks."""
    if call is None:
        return [name, algorithm]
    array = call.target if name in ("broadcast", "scatter") else call.source
    told: list[Any] = [name, algorithm, call.op, str(array.dtype)]
    if name in ("broadcast", "reduce", "gather", "scatter"):
        told.append(call.root)
    if name in ("broadcast", "reduce", "all_reduce"):
        told.append(array.size)
    elif name != "all_to_all" or call.alike:  # uneven blocks are known to two ranks only
        told.append(list(call.counts))
    return told
