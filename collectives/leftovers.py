"""Files in /dev/shm that would stay when a job is killed: taken away early, while they are in use.

MPICH maps one file /dev/shm/mpich_shm_* per job in MPI_Init and removes it in MPI_Finalize, which a job that ends by
MPI_Abort or by a signal never reaches: 1 MiB and more stay for good, for each such job. A name is needed only to map a
file; once all ranks of the node have mapped it, it can go, and the memory goes with the last process. (The windows
of MPICH need nothing: it removes their names at once. Open MPI's files are left to its mpirun.)
"""

import os
from pathlib import Path

START_UP_FILE = "/dev/shm/mpich_shm_"


def mapped() -> set[str]:
    """The start-up files that this process has mapped and that still have a name; empty where there is no /proc."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    columns = (line.split(maxsplit=5) for line in maps.read_text().splitlines() if START_UP_FILE in line)
    return {row[5] for row in columns if row[5].startswith(START_UP_FILE) and not row[5].endswith(" (deleted)")}


def remove_names() -> None:
    """Take the names away. Only after all ranks of this node have returned from MPI_Init."""
    for path in mapped():
        try:
            os.unlink(path)
        except OSError:  # another rank was first, or the file is another user's: then it is not ours to remove
            continue
