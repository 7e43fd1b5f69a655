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


def world() -> Communicator:
    """The communicator of all ranks that mpirun started. The first call initialises MPI."""
    from dtrain.collectives.background import Background, wanted
    from dtrain.collectives.mpi import world_transport
    from dtrain.collectives.progress import Progress

    transport = world_transport()
    progress = Progress()
    if wanted(transport):
        progress.background = Background(progress)
    return Communicator(transport, progress=progress)


def single() -> Communicator:
    """A communicator of this process alone, without MPI."""
    return Communicator(cast("Transport", Alone()))
