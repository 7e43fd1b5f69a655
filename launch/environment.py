"""What the launcher and the machine say about this process, before MPI and NumPy are imported.

Two uses: errors are told by one rank even when MPI is not up yet, and BLAS gets its share of the cores. BLAS libraries
read their number of threads when NumPy loads them, so `set_blas_threads` comes first in the program.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UserError

GIVEN = dict(os.environ)
"""The variables that this process was started with: what it starts makes its own choice of threads."""


@dataclass(frozen=True)
class Job:
    """This process as its launcher sees it; without a launcher one rank of one."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Ranks on this node."""


# Launcher, and its variables for rank, size and ranks on this node. The first whose rank is set counts: mpirun inside a
# SLURM job sets its own, and a batch script (no step) is not a rank of anything.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("Hydra (MPICH, Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("SLURM (srun)", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",  # Accelerate on macOS
    "BLIS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
)


def job(variables: Mapping[str, str] = os.environ) -> Job:
    """Return what the launcher's variables say."""
    for launcher, rank, size, local_size in _LAUNCHERS:
        if rank in variables and size in variables:
            local = variables.get(local_size, variables[size])
            if launcher.startswith("SLURM"):
                local = _slurm_tasks(local, int(variables.get("SLURM_NODEID", "0")))
            return Job(launcher, int(variables[rank]), int(variables[size]), int(local))
    return Job()


def _slurm_tasks(listed: str, node: int) -> str:
    """Tasks on one node: `4(x2),3` is 4, 4, 3."""
    tasks: list[str] = []
    for part in listed.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [count] * int(times or 1)
    return tasks[min(node, len(tasks) - 1)]


def cores() -> int:
    """Return how many cores this process may use: affinity mask and container quota; at least 1."""
    count = len(_mask(0) or ()) or os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit: another system, or the word "max"
        pass
    return max(1, count)


def threads_per_core() -> int:
    """Return how many of the cores above are one: 2 where the processor runs two threads on each."""
    try:
        return 1 + int(Path("/sys/devices/system/cpu/smt/active").read_text())
    except (OSError, ValueError):  # another system
        return 1


def own_cores() -> bool:
    """Did the launcher give this rank cores of its own (its mask is smaller than its parent's)?"""
    mine, parent = _mask(0), _mask(os.getppid())
    return mine is not None and parent is not None and mine < parent


def _mask(process: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(process)  # not on macOS
    except (AttributeError, OSError):
        return None


def blas_threads() -> int:
    """Return this rank's share of the cores: its own if the launcher gave it some, else divided by the node's ranks."""
    return cores() if own_cores() else max(1, cores() // job().local_size)


def set_blas_threads() -> None:
    """Set the number of threads of every BLAS, unless the user did; must come before NumPy is imported."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(
        blas_threads()
    )  # OpenBLAS would prefer its own variable to OMP's
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, threads)


def check_world(size: int) -> None:
    """Refuse a world of `size` ranks where the launcher started another number: UserError."""
    told = job()
    if told.size != size:
        raise UserError(
            f"{told.launcher} started {told.size} processes, but the MPI library of this Python sees {size}: mpirun "
            f"belongs to another MPI than mpi4py uses. Use the mpirun beside {sys.executable}, or see: dtrain doctor"
        )
