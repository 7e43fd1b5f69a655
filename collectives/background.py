"""A thread that moves started works on while its rank computes.

    main thread    all_reduce_async ── backward ─────────── backward ──── wait
    this thread        wake  . . slice . . . test . test .   sleep
                             └ the peers have come: compute this rank's slice, or ask the MPI library once

NumPy's loops and MPI's calls release the interpreter's lock, so this thread computes and moves messages beside the
kernels of the main one. It sleeps on an event while nothing is open, and naps between its looks otherwise; it only ever
tests, so it can be stopped at any time: at the end of the program it is, before MPI ends.

When it is on (DTRAIN_PROGRESS=thread|none|auto): `auto` takes it between nodes, unless there are more ranks than cores.
Measured over a link of 1 Gbit/s, 4 MiB while a rank computes for 50 ms: the wait after it takes 0.05 ms, not 32. Within
a node it only costs: where every core has a rank that computes, nothing moves beside (2 ranks on 2 cores: 3 to 40 % on
top). There the ranks publish and go: each computes its slice when it next starts, tests or waits for something.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.collectives.progress import Progress
    from dtrain.collectives.transport import Transport

NAPS = (50e-6, 200e-6)  # seconds; the first doubles up to the second while nothing happens


class Background:
    """The thread of one rank; it starts with the first work that is started."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._event = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dtrain progress", daemon=True)
            self._thread.start()
            atexit.register(self.stop)  # after MPI's own end was registered, so it runs before
        if not self._event.is_set():
            self._event.set()

    def is_me(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread; works still open go on in the waits of the main one."""
        self._stopping = True
        self._event.set()
        if self._thread is not None and not self.is_me():
            self._thread.join(5.0)

    def _run(self) -> None:
        progress = self._progress
        try:
            while not self._stopping:
                self._event.wait()
                self._event.clear()
                nap = NAPS[0]
                while progress.busy() and not self._stopping:
                    progress.poll()
                    time.sleep(nap)
                    nap = NAPS[0] if self._event.is_set() else min(2 * nap, NAPS[1])
                    self._event.clear()
        except BaseException as failure:
            progress.failure = failure


def wanted(transport: Transport) -> bool:
    """Whether this rank gets the thread."""
    word = os.environ.get("DTRAIN_PROGRESS", "") or "auto"
    if word not in ("thread", "none", "auto"):
        raise ValueError(f"DTRAIN_PROGRESS={word!r}: allowed: thread, none, auto")
    if word == "none" or transport.size == 1 or not transport.threaded:
        return False
    return word == "thread" or (len(set(transport.nodes)) > 1 and not transport.crowded)
