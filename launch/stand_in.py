"""A process that the launcher watches instead of a worker, so that the worker's death is not that of the job.

    mpirun ── stand-in (rank 1: waits) ── worker (rank 1: MPI, sockets, computes)      killed: the stand-in stays
           └─ stand-in (rank 3: waits) ── server                                       killed: so does its stand-in die

Launchers end a job when one of its processes is killed; to be asked not to (`mpirun -disable-auto-cleanup`) helps
little, MPICH 5's ends it all the same. What a launcher sees is the process that it has started. So that one forks
before MPI begins: the child becomes the rank, with the sockets and pipes of the launcher, which stay open in both. A
rank that leaves, leaves with its stand-in and the same exit code. One that a signal kills takes its stand-in along,
unless it is `replaceable`: then the others know by themselves, and who ends the job ends the stand-in, too.
"""

import os
import threading
import time
from typing import NoReturn

from dtrain.launch import failures


class Rank:
    """The process that is a rank now; its parent stands in for it."""

    def __init__(self, line: int) -> None:
        self._line = line

    def replaceable(self) -> None:
        """From now on the job goes on when this process is killed."""
        os.write(self._line, b"!")


def begin() -> Rank:
    """Return in a child of this process, which waits from now on; before MPI is initialised."""
    listening, line = os.pipe()
    child = os.fork()
    if child:
        os.close(line)
        _wait(child, listening)
    os.close(listening)
    threading.Thread(target=failures.end_with, args=(os.getppid(),), name="stand-in", daemon=True).start()
    return Rank(line)


def _wait(child: int, listening: int) -> NoReturn:
    """What the parent does."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    survives = bool(os.read(listening, 1))  # the child's word; nothing when it has died without one
    while survives:
        time.sleep(3600)  # the launcher ends this process, or goes and is followed (`failures.end_with`)
    number = os.WTERMSIG(status)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
