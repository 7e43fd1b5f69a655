"""Do all ranks do the same? Compared before anything blocks, where the ranks share no memory to compare records in.

    rank 0   #7: all_reduce native sum float32 1000   ──►  ranks 1, 2
    rank 1   #7: broadcast native float32 0 1000      ──►  ranks 0, 2        CollectiveMismatch on all three

Each rank writes what it is about to do to the others, waits for theirs, and compares. Only where they differ the stacks
are read, and second letters tell the lines. Letters travel on a communicator of their own (`Post`), so they meet no
collective, whatever went wrong. Always for the first CHECKED collectives of a communicator, where such mistakes show;
for all with DTRAIN_DEBUG=1. Up to FULL ranks everybody writes to everybody; with more, each rank to those 1, 2, 4, ...
away: one of them finds the mistake and ends all. Threads of one process need no letters: all see all (`say`).
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
ANSWER = 3.0  # seconds: how long to wait for the line of the other rank


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
        self._say = transport.say
        self._letters = letters
        self._progress = progress
        self._key = key
        self._timeout = timeout
        self._number = 0
        self.last = CHECKED if not debugging() else 1 << 62
        if self._size <= FULL:
            peers = set(range(self._size)) - {self._rank}
        else:
            steps = [1 << power for power in range((self._size - 1).bit_length())]
            ways = {(self._rank + sign * step) % self._size for step in steps for sign in (1, -1)}
            peers = ways - {self._rank}
        self._peers = {peer: transport.world_ranks[peer] for peer in sorted(peers)}

    def check(self, name: str, algorithm: str, call: Call | None = None) -> None:
        """Return when all ranks have come to the same; CollectiveMismatch or CollectiveTimeout otherwise."""
        self._number += 1
        if self._number > self.last:
            return
        mine = signature(name, algorithm, call)
        if self._say is not None:
            came = self._say(mine)
            if came.count(mine) < self._size:  # all see it
                words, peer = self._say(self._told(name, algorithm)), [other == mine for other in came].index(False)
                raise self._mismatch(words[self._rank], peer, words[peer])
            return
        subject = f"{self._key}#{self._number}"
        self._letters.send(self._peers.values(), subject, mine)
        began = time.monotonic()
        while True:
            self._letters.collect()
            read = self._letters.read(subject)
            if any(other != mine for other in tuple(read.values())):
                raise self._mismatch(*self._explained(self._told(name, algorithm), subject, mine))
            if len(read) == len(self._peers):
                break
            self._progress.poll()
            waited = time.monotonic() - began
            if waited > self._timeout:
                raise self._late(self._told(name, algorithm), subject, waited)
            self._letters.post.rest(waited)
        self._letters.take(subject)

    def _told(self, name: str, algorithm: str) -> str:
        """What this rank has come to, and where."""
        caller = callers.here()
        words = [algorithm, caller.arguments, f"on {caller.group}" if caller.group else ""]
        return f"{name} #{self._number} ({', '.join(filter(None, words))}) at {caller.line}"

    def _mismatch(self, what: str, peer: int, other: str) -> CollectiveMismatch:
        return CollectiveMismatch(
            f"the ranks do not do the same: rank {self._rank} came to {what}, rank {peer} to {other}"
        )

    def _explained(self, what: str, subject: str, mine: str) -> tuple[str, int, str]:
        """What this rank came to, who to something else, and what: both find it, so both tell the other the line."""
        came, words = self._letters.read(subject), f"{subject} in words"
        self._letters.send(self._peers.values(), words, what)
        peer, world = next((peer, world) for peer, world in self._peers.items() if came.get(world, mine) != mine)
        began = time.monotonic()
        while world not in self._letters.read(words) and (waited := time.monotonic() - began) < ANSWER:
            self._letters.post.rest(waited)
            self._letters.collect()
        return what, peer, self._letters.read(words).get(world, came[world])  # who is dead: by his first letter

    def _late(self, what: str, subject: str, waited: float) -> CollectiveTimeout:
        came = self._letters.read(subject)
        missing = {peer: world for peer, world in self._peers.items() if world not in came}
        names = ", ".join(f"rank {peer}" for peer in missing)
        lines = [f"rank {self._rank} of {self._size} waited {waited:.0f} s for {names} in {what}"]
        return CollectiveTimeout("\n".join([*lines, *self._progress.tell(list(missing.values()))]))


def signature(name: str, algorithm: str, call: Call | None) -> str:
    """What must be equal on all ranks."""
    if call is None:
        return f"{name} {algorithm}"
    array = call.target if name in ("broadcast", "scatter") else call.source
    told = f"{name} {algorithm} {call.op} {_dtype(array.dtype)}"
    if name in ("broadcast", "reduce", "gather", "scatter"):
        told += f" {call.root}"
    if name in ("broadcast", "reduce", "all_reduce"):
        return f"{told} {array.size}"
    if name != "all_to_all" or call.alike:  # uneven blocks are known to two ranks only
        return f"{told} {[*call.counts]}"
    return told


_dtype = lru_cache(64)(str)  # NumPy makes the name anew each time
