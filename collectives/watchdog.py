"""What blocks for too long, inside the MPI library too, ends with a report; and all ranks say where they are.

    every second     is a thread of this rank in the same call of the MPI library as a second ago?
                     has another rank asked where I am?  ->  write my file, answer
    after the limit  ask all ranks  ->  write my file  ->  the report  ->  the job ends with exit code 1

The thread only reads: the stacks of the others say in which collective they are, with which arguments, since when, and
which line of the user's program called it. So a call pays nothing. Waits in shared memory and between nodes end by
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
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from dtrain.collectives import callers
from dtrain.collectives.waiting import LIMIT, CollectiveTimeout

if TYPE_CHECKING:
    from dtrain.collectives.desync import Letters
    from dtrain.collectives.group import Group
    from dtrain.collectives.transport import Transport

EVERY = 1.0  # seconds
ANSWER = 3 * EVERY  # how long to wait for the others' answers
_HERE = os.path.dirname(__file__) + os.sep
_OWN = ("waiting.py", "conveyor.py", "desync.py", "watchdog.py")  # whose waits end by limits of their own
_LIBRARY = ("native.py", "mpi.py", "progress.py")


class Watchdog:
    """The thread of one rank, for all communicators of its world."""

    def __init__(self, transport: Transport, letters: Letters, timeout: float, groups: Iterable[Group]) -> None:
        """`groups`: the communicators, for their recent calls."""
        self.folder = os.getcwd()
        self._transport = transport
        self._letters = letters
        self._timeout = timeout
        self._groups = groups
        self._main = threading.get_ident()
        self._seen: dict[int, tuple[Hashable, float]] = {}  # thread -> which call it is in, since when
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

    def look(self, now: float) -> tuple[int, float] | None:
        """The thread that is in one call of the MPI library for longer than the limit, and for how long.

        Only the innermost frame is looked at, and whether a collective was finished meanwhile: the frames around it may
        vanish while they are read, unless the thread really stands still. They are read when it has for long enough.
        """
        finished = max((group.counters.finished for group in self._groups), default=0.0)
        seen: dict[int, tuple[Hashable, float]] = {}
        for thread, frame in sys._current_frames().items():
            file = frame.f_code.co_filename
            if thread == self._thread.ident or not file.startswith(_HERE) or os.path.basename(file) in _OWN:
                continue
            before = self._seen.get(thread)
            seen[thread] = before if before is not None and before[0] == finished else (finished, now)
        self._seen = seen
        for thread, (_, since) in seen.items():
            if now - since > self._timeout and self._is_in_library(thread):
                return thread, now - since
        return None

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

    # Where everybody is

    def tell(self, ranks: Iterable[int]) -> list[str]:
        """Lines about these ranks of the world, and where the files of all are; makes all ranks write theirs."""
        answers = self.ask()
        lines = [
            f"rank {rank} now: {answers[rank]}"
            if rank in answers
            else f"rank {rank} does not answer: it has ended, was stopped, or its machine is gone"
            for rank in ranks
            if self._letters.post.heard
        ]
        where = os.path.join(self.folder, "hang_rank_*.json")
        return [*lines, f"what the ranks did last: {where}", LIMIT]

    def ask(self, seconds: float = ANSWER) -> dict[int, str]:
        """What the other ranks are doing, as they say within `seconds`."""
        self.dump()
        if not self._letters.post.heard:
            return {}
        self._asked += 1
        subject = f"answer {self._asked} to {self._transport.rank}"
        others = [rank for rank in range(self._transport.size) if rank != self._transport.rank]
        self._letters.send(others, "question", [subject, self.folder])
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
        rows = [(then, group.name, what) for group in list(self._groups) for then, what in list(group.counters.recent)]
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
