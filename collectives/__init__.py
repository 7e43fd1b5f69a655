"""Process groups and collective algorithms on plain arrays; imports nothing else of dtrain.

    from dtrain.collectives import world
    comm = world()                              # the ranks of mpirun; without mpirun one rank
    total = comm.all_reduce(np.ones(5))         # [size, size, ...] on every rank

Importing this does not start MPI: `world()` does.
"""

if __name__ == "collectives":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.collectives, not collectives")

from typing import TYPE_CHECKING, cast

from dtrain.collectives.communicator import Communicator
from dtrain.collectives.dtypes import Array
from dtrain.collectives.threads import run_threads
from dtrain.collectives.transport import Alone
from dtrain.collectives.work import Work, wait_all

if TYPE_CHECKING:
    from dtrain.collectives.transport import Transport

__all__ = ["Array", "Communicator", "Work", "run_threads", "single", "wait_all", "world"]


def world(tuned: bool = True) -> Communicator:
    """The communicator of all ranks that mpirun started. The first call initialises MPI.

    tuned: what was measured on this machine (`tuning.py`), if anything was, decides what `auto` is.
    """
    from dtrain import __version__
    from dtrain.collectives import mpi, tuning
    from dtrain.collectives.background import Background, wanted
    from dtrain.collectives.desync import Letters
    from dtrain.collectives.progress import Progress
    from dtrain.collectives.waiting import timeout_seconds
    from dtrain.collectives.watchdog import Watchdog

    found = (lambda: tuning.pack(tuning.find(mpi.library, __version__))) if tuned else bytes
    transport, brought = mpi.world_transport(found)
    progress = Progress()
    if wanted(transport):
        progress.background = Background(progress)
    if transport.size > 1:
        progress.letters = Letters(transport.post())
        progress.watchdog = Watchdog(transport, progress.letters, timeout_seconds(), progress.groups)
        progress.watchdog.start()
    comm = Communicator(transport, progress=progress)
    comm.tune(tuning.unpack(brought))
    return comm


def single() -> Communicator:
    """A communicator of this process alone, without MPI."""
    return Communicator(cast("Transport", Alone()))
