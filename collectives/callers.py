"""Which collective a thread is in, and which line of the user's program called it: read from the stack.

    train.py:57           total = comm.all_reduce(x, op="max")      the user's line: the last outside this package
    reductions.py         def all_reduce(self, array, op, ...)      the collective: the first inside; its arguments
    native.py             self._comm.Allreduce(...)

Reading costs some microseconds and nothing is paid before, so reports name lines without being asked to.
"""

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_HERE = os.path.dirname(__file__) + os.sep
_THREADS = os.sep + "threads.py"
_SHOWN = ("op", "root", "destination", "source", "tag", "counts", "out_counts", "color", "algorithm")


class Caller:
    """A thread's place: `line` of the user's program, and the collective it is in, if any."""

    def __init__(self, frame: FrameType | None) -> None:
        self.innermost = frame
        self.inner: list[FrameType] = []
        """The frames up to that of the collective, the innermost first."""
        inside, user, passed = False, frame, []
        for each in _outwards(frame):  # no further than needed: below a test runner the stack is deep
            if _ours(each):
                inside = True
            elif inside:
                user = each
                break
            passed.append(each)
        else:
            user = None if inside else frame
        if inside:
            self.inner = passed
        self.line = f"{_short(user.f_code.co_filename)}:{user.f_lineno}" if user else "?"

    @property
    def frame(self) -> FrameType | None:
        """Of the collective."""
        return self.inner[-1] if self.inner else None

    @property
    def arguments(self) -> str:
        """What the collective was called with, as far as it fits in words."""
        frame = self.frame
        if frame is None:
            return ""
        given, words = frame.f_locals, []
        array = given.get("array") if given.get("array") is not None else given.get("out")
        work = given.get("self") if frame.f_code.co_name in ("wait", "done") else given.get("work")
        words += [" ".join(map(str, getattr(work, "what", ())))] if getattr(work, "what", ()) else []
        if array is not None and hasattr(array, "dtype") and hasattr(array, "shape"):
            words.append(f"{array.dtype} {array.shape}")
        wanted = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        words += [f"{name}={given[name]}" for name in wanted if name in _SHOWN and _says(given.get(name))]
        return ", ".join(words)

    @property
    def group(self) -> str:
        """The name of the communicator, but of the world's."""
        owner = None if self.frame is None else self.frame.f_locals.get("self")
        name = getattr(owner, "name", "")
        return "" if name == "world" or not hasattr(owner, "split") else str(name)

    @property
    def ranks(self) -> list[int]:
        """Of the world: the ranks of the communicator, where that can be told."""
        owner = None if self.frame is None else self.frame.f_locals.get("self")
        return list(getattr(getattr(owner, "transport", None), "world_ranks", ()))

    @property
    def call(self) -> str:
        """The collective with its arguments, and on which communicator."""
        name = "?" if self.frame is None else self.frame.f_code.co_name
        return f"{name}({self.arguments})" + (f" on {self.group}" if self.group else "")

    def __str__(self) -> str:
        return f"in no collective, at {self.line}" if self.frame is None else f"in {self.call} at {self.line}"


def _ours(frame: FrameType) -> bool:
    """A frame of this package; a thread that is a rank (`threads.py`) begins in one, which is no collective."""
    path = frame.f_code.co_filename
    return path.startswith(_HERE) and not path.endswith(_THREADS)


def _says(value: Any) -> bool:
    return value is not None and not hasattr(value, "dtype") and value != "auto" and len(str(value)) <= 60


def here() -> Caller:
    """Of this thread."""
    return Caller(sys._getframe(1))


def of(thread: int) -> Caller:
    """Of another thread, by its number."""
    return Caller(sys._current_frames().get(thread))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while isinstance(frame, FrameType):  # of a thread that runs, the last ones may be gone
        yield frame
        frame = frame.f_back


def _short(path: str) -> str:
    """A path below the working directory without it."""
    start = os.getcwd() + os.sep
    return path[len(start) :] if path.startswith(start) else path
