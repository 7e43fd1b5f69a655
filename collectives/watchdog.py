"""What blocks for long is told of, and for too long, inside the MPI library too, ends with a report of where all are.

    every second     is a thread of this rank in the same call as a second ago? has another rank asked where I am?
    after 15 s       ask all ranks  ->  a warning of one of those who wait; again after twice as long
    after the limit  ask all ranks  ->  all write their files  ->  the report  ->  the job ends with exit code 1

The lowest rank that waits warns: the others have a little more patience, and who was asked has heard of it. A wait that
was warned of and came to an end was none to be warned of: from then on patience is twice as long.

The thread only reads: the stacks of the others say in which collective they are, with which arguments, since when, and
which line of the user's program called it. So a call pays nothing. Waits in shared memory and between nodes have
their own limits (`waiting.py`, `conveyor.py`), which know better who is late; they ask here what the others do.
Answers come while a rank computes or hangs; one that is dead or stopped does not answer, and that is said.
Where the files are: `hang_rank_NNNN.json` in the folder of the run, or in the working directory.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dtrain.collectives import callers
from dtrain.collectives.waiting import LIMIT, CollectiveTimeout

if TYPE_CHECKING:
    from dtrain.collectives.desync import Letters
    from dtrain.collectives.group import Group
    from dtrain.collectives.transport import Transport

EVERY = 1.0  # seconds
ANSWER = 3 * EVERY  # how long to wait for the others' answers
PATIENCE = 15.0  # before the first warning; half the limit, where that is less
STAGGER = (2 * EVERY, 30.0)  # more for each rank above 0, but no more
TOLD = 5  # ranks in a warning
_HERE = os.path.dirname(__file__) + os.sep
_OWN = ("waiting.py", "conveyor.py", "desync.py", "watchdog.py")  # whose waits end by limits of their own
_LIBRARY = ("native.py", "mpi.py", "progress.py")


class Warnings:
    """When a rank is to tell that it waits."""

    def __init__(self, patience: float, stagger: float) -> None:
        self._patience, self._stagger = patience, stagger
        self._next = patience + stagger
        self._waited = 0.0
        self._warned = False

    def due(self, waited: float) -> bool:
        """Whether to warn now. To be asked every second, with the seconds of the wait under way; 0.0: there is none."""
        if waited < self._waited:  # the wait before is over
            self._patience = max(self._patience, 2 * self._waited * self._warned)
            self._next, self._warned = self._patience + self._stagger, False
        self._waited = waited
        if waited < self._next:
            return False
        self._next, self._warned = 2 * waited, True
        return True

    def heard(self, waited: float) -> None:
        """Another rank has warned, and this one waits too."""
        self._next = max(self._next, 2 * waited + self._patience + self._stagger)
        self._warned = True


class Watchdog:
    """The thread of one rank, for all communicators of its world."""

    def __init__(
        self, transport: Transport, letters: Letters, timeout: float, groups: Callable[[], list[Group]]
    ) -> None:
        """`groups()`: the communicators, for their recent calls."""
        self.folder = os.getcwd()
        self._transport = transport
        self._letters = letters
        self._timeout = timeout
        self._groups = groups
        self._main = threading.get_ident()
        self._seen: dict[int, tuple[Hashable, float]] = {}  # thread -> which call it is in, since when
        self._warnings = Warnings(min(PATIENCE, timeout / 2), min(STAGGER[0] * transport.rank, STAGGER[1]))
        self._asked = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dtrain watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; until the end of the program."""
        self._thread.start()
        atexit.register(self.stop)  # after MPI's own end was registered, so it runs before

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._answer()
            late = self.look(time.monotonic())
            if late is not None:
                self._end(*late)
            waited = self.waited(time.monotonic())
            if self._warnings.due(waited):
                self._warn(waited)

    def look(self, now: float) -> tuple[int, float] | None:
        """The thread that is in one call of the MPI library for longer than the limit, and for how long.

        Only the innermost frame is looked at, and whether a collective was finished meanwhile: the frames around it may
        vanish while they are read, unless the thread really stands still. They are read when it has for long enough.
        """
        finished = max((group.counters.finished for group in self._groups()), default=0.0)
        seen: dict[int, tuple[Hashable, float]] = {}
        for thread, frame in sys._current_frames().items():
            file = frame.f_code.co_filename
            if thread == self._thread.ident or not file.startswith(_HERE):
                continue
            before = self._seen.get(thread)
            seen[thread] = before if before is not None and before[0] == finished else (finished, now)
        self._seen = seen
        for thread, (_, since) in seen.items():
            if now - since > self._timeout and self._is_in_library(thread):
                return thread, now - since
        return None

    def waited(self, now: float) -> float:
        """Seconds that the main thread is in the same call, as far as `look` has seen; 0.0: in none."""
        seen = self._seen.get(self._main)
        return 0.0 if seen is None else now - seen[1]

    def _is_in_library(self, thread: int) -> bool:
        files = {os.path.basename(each.f_code.co_filename) for each in callers.of(thread).inner}
        return not files.intersection(_OWN) and bool(files.intersection(_LIBRARY))

    def _end(self, thread: int, waited: float) -> None:
        rank, size = self._transport.rank, self._transport.size
        caller = callers.of(thread)
        others = [other for other in range(size) if other != rank]
        lines = [f"rank {rank} of {size} waited {waited:.0f} s {caller}", *self.tell(others)]
        if callers.of(thread).frame is not caller.frame:
            return  # it went on while the others were asked
        error = CollectiveTimeout("\n".join(lines)).with_traceback(None)
        stack = "".join(traceback.format_stack(caller.innermost))
        error.add_note(f"The stack of the thread that waits:\n{stack}")
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, self._thread)))
        sys.stderr.flush()
        self._transport.abort(1)

    def _warn(self, waited: float) -> None:
        """Say who is waited for, in what. Ranks of the communicator that are in another call come first."""
        caller = callers.of(self._main)
        answers = self.ask(files=False)
        if caller.frame is None or callers.of(self._main).frame is not caller.frame:
            return  # it went on while the others were asked
        rank, size = self._transport.rank, self._transport.size
        members = [other for other in caller.ranks or range(size) if other != rank]
        with_me = [other for other in members if answers.get(other, "").partition("; ")[0] == str(caller)]
        late = [other for other in members if other not in with_me]
        late += [other for other in range(size) if other not in (*members, *answers, rank)]
        late.sort(key=lambda other: other in answers)
        lines = [
            f"rank {rank} of {size} has waited {waited:.0f} s {caller}" + f"; {len(with_me)} others too" * bool(with_me)
        ]
        lines += self._places(late[:TOLD], answers)
        lines += [f"and {len(late) - TOLD} more ranks"] if len(late) > TOLD else []
        sys.stderr.write("".join(f"dtrain: waiting: {line}\n" for line in [*lines, LIMIT]))
        sys.stderr.flush()

    # Where everybody is

    def tell(self, ranks: Iterable[int]) -> list[str]:
        """Lines about these ranks of the world, and where the files of all are; makes all ranks write theirs."""
        lines = self._places(ranks, self.ask())
        where = os.path.join(self.folder, "hang_rank_*.json")
        return [*lines, f"what the ranks did last: {where}", LIMIT]

    def _places(self, ranks: Iterable[int], answers: Mapping[int, str]) -> list[str]:
        return [
            f"rank {rank} now: {answers[rank]}"
            if rank in answers
            else f"rank {rank} does not answer: it has ended, was stopped, or its machine is gone"
            for rank in ranks
            if self._letters.post.heard
        ]

    def ask(self, seconds: float = ANSWER, files: bool = True) -> dict[int, str]:
        """What the other ranks are doing, as they say within `seconds`; files: and all write theirs."""
        if files:
            self.dump()
        if not self._letters.post.heard:
            return {}
        self._asked += 1
        subject = f"answer {self._asked} to {self._transport.rank}"
        others = [rank for rank in range(self._transport.size) if rank != self._transport.rank]
        self._letters.send(others, "question", [subject, self.folder if files else ""])
        end = time.monotonic() + seconds
        while len(self._letters.read(subject)) < len(others) and time.monotonic() < end:
            self._letters.collect()
            if threading.current_thread() is self._thread:
                self._answer()
            time.sleep(0.02)
        return {rank: str(text) for rank, text in self._letters.take(subject).items()}

    def _answer(self) -> None:
        if not self._letters.post.heard:
            return
        self._letters.collect()
        for rank, (subject, folder) in self._letters.take("question").items():
            self._warnings.heard(self.waited(time.monotonic()))
            if folder:
                self.folder = folder if os.path.isdir(folder) else self.folder
                self.dump()
            self._letters.send([rank], subject, self.state())

    def state(self) -> str:
        """Where this rank's main thread is, and its last collective."""
        recent = self.recent()
        last = "it did no collective before"
        if recent:
            each = recent[-1]
            last = f"the last it finished: {each['collective']} by {each['algorithm']}, {each['bytes']} bytes, "
            last += f"on {each['communicator']}, {each['seconds_ago']:.1f} s ago"
        return f"{callers.of(self._main)}; {last}"

    def recent(self) -> list[dict[str, Any]]:
        """The recent calls on all communicators, the oldest first."""
        now = time.monotonic()
        rows = [(then, group.name, what) for group in self._groups() for then, what in list(group.counters.recent)]
        words = ("communicator", "collective", "algorithm", "bytes")
        return [
            {"seconds_ago": now - then, **dict(zip(words, (name, *what), strict=True))}
            for then, name, what in sorted(rows)
        ]

    def dump(self) -> None:
        """Write this rank's file."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        content = {
            "rank": self._transport.rank,
            "size": self._transport.size,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "now": str(callers.of(self._main)),
            "recent": self.recent(),
            "stacks": {
                names.get(thread, str(thread)): "".join(traceback.format_stack(frame)).splitlines()
                for thread, frame in sys._current_frames().items()
            },
        }
        folder = self.folder if os.path.isdir(self.folder) else os.getcwd()
        path = os.path.join(folder, f"hang_rank_{self._transport.rank:04}.json")
        try:
            with open(path, "w") as file:
                json.dump(content, file, indent=1)
        except OSError as error:  # the report itself must come through
            print(f"dtrain: {path}: {error.strerror}", file=sys.stderr)
