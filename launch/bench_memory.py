"""The memory in which `dtrain bench` has its arrays, and how fast all ranks together can read and write it.

    region 1   what goes in         one pair of regions per rank, made once; a size takes the front of both
    region 2   what comes out       (cold: pieces of more than twice the last-level cache take turns)

The triad x[:n/2] += x[n/2:] runs on the very memory of the collectives, on all ranks at once, at the same size: three
streams of n/2 bytes, none fetched in vain. What it reaches is the memory bandwidth there, of caches where n fits.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.collectives import Array, Communicator
from dtrain.collectives.caches import last_level_cache
from dtrain.errors import UserError

PAGE = 4096
TRIAD_BYTES = 4 << 20  # touched in one timing at least: the barriers around it must not count


def region_bytes(comm: Communicator, largest: int, cold: bool) -> int:
    """Bytes per rank of one region for sizes up to `largest`."""
    whole = -(-largest // PAGE) * PAGE + PAGE * comm.size  # at least an element for each rank
    if not cold:
        return whole
    return max(2 * whole, (-(-2 * last_level_cache() // (comm.local_size * PAGE)) + 1) * PAGE)


def check_room(comm: Communicator, largest: int, cold: bool, private: bool) -> None:
    """Refuse what this node has no memory for: UserError."""
    needed = comm.local_size * 2 * region_bytes(comm, largest, cold)
    free, where = _free(private or comm.size == 1)
    if needed > 0.8 * free:
        raise UserError(
            f"--sizes: up to {largest} bytes on {comm.local_size} ranks need {needed / 1e9:.1f} GB, and {where} has "
            f"{free / 1e9:.1f} GB free; take smaller ones"
        )


def _free(private: bool) -> tuple[float, str]:
    shared = Path("/dev/shm")  # where MPI libraries put shared windows on Linux
    if not private and shared.is_dir():
        return shutil.disk_usage(shared).free, str(shared)
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), "memory"
    except (ValueError, OSError):  # macOS does not tell
        return float("inf"), "memory"


class Memory:
    """The two regions of this rank, in the shared window or private."""

    def __init__(self, comm: Communicator, largest: int, dtype: np.dtype[Any], cold: bool, private: bool) -> None:
        """Collective. `largest`: the size in bytes of the longest arrays."""
        self._cold = cold
        self.dtype = dtype
        self._length = region_bytes(comm, largest, cold)
        # The first makes the shared memory, where there can be one: of one node, or of each of several.
        shared = not private and (comm.node is not None or comm.levels is not None)
        self.kind = "window" if shared else "private"
        make = comm.empty if shared else np.empty
        self._regions: list[Array] = [make(self._length, np.uint8) for _ in range(2)]
        for region in self._regions:
            region[...] = 1  # every page gets its memory now, near its rank

    def slots(self, count: int) -> list[tuple[Array, Array]]:
        """Pairs of arrays (count,): one pair; cold: all that fit into the regions, to be used in turn."""
        nbytes = max(1, count) * self.dtype.itemsize
        stride = -(-nbytes // PAGE) * PAGE
        starts = range(0, self._length - nbytes + 1, stride) if self._cold else (0,)
        source, target = self._regions
        return [(source[at : at + nbytes].view(self.dtype), target[at : at + nbytes].view(self.dtype)) for at in starts]


def triad(comm: Communicator, arrays: Sequence[Array]) -> float:
    """Bytes/s that all ranks together read and write in x[:n/2] += x[n/2:]; arrays, of n bytes each, take turns.

    Whole numbers: the bytes of small integers, taken as floats, are denormal and slow to add. Collective.
    """
    half = arrays[0].nbytes // 16
    numbers = [array.view(np.uint8)[: 16 * half].view(np.int64) for array in arrays]
    pairs = [(each[:half], each[half:]) for each in numbers]
    repeats = max(1, TRIAD_BYTES // (16 * half))
    np.add(*pairs[0], out=pairs[0][0])
    seconds = []
    for _ in range(2):
        comm.barrier()
        comm.barrier()
        before = time.perf_counter()
        for repeat in range(repeats):
            low, high = pairs[repeat % len(pairs)]
            np.add(low, high, out=low)
        comm.barrier()  # ranks that share a core run one after the other: the time ends with the last
        seconds.append(time.perf_counter() - before)
    slowest = comm.all_gather(np.array(seconds)).reshape(comm.size, -1).max(0)
    return float(comm.size * repeats * 24 * half / slowest.min())
