"""Many collectives, works, objects and splits: memory, file descriptors, mappings and /dev/shm stay flat."""

import gc
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dtrain.collectives import Communicator, leftovers, wait_all


class State(NamedTuple):
    resident: int  # bytes
    descriptors: int
    mappings: int
    shared: int  # files in /dev/shm that this process has mapped and that have a name


def state(comm: Communicator) -> State:
    gc.collect()
    comm.barrier()
    lines = Path("/proc/self/maps").read_text().splitlines()
    named = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return State(resident, len(os.listdir("/proc/self/fd")), len(lines), len(named))


def many(comm: Communicator, rounds: int) -> None:
    """16 collectives per round, on arrays from everywhere, some of them kept and some dropped."""
    home, whole = comm.empty(3000), comm.empty(3000 * comm.size)
    home[...], whole[...] = 1, 1
    private = np.ones(3000 * comm.size, np.float32)
    for turn in range(rounds):
        works = [comm.all_reduce_async(home[at : at + 700], "max", out=home[at : at + 700]) for at in (0, 800, 1600)]
        works.append(comm.all_gather_async(home, out=whole))
        comm.all_reduce(np.ones((turn % 7, 3)))
        wait_all(works)
        comm.all_reduce(private, out=private, op="max")
        comm.reduce_scatter(whole, "max")
        comm.all_to_all(whole)
        comm.all_to_all(private)
        comm.all_gather(home)
        comm.broadcast(home, out=home)
        comm.broadcast(private, out=private)
        comm.reduce(home, "max", out=home if comm.rank == 0 else None)
        comm.gather(home)
        comm.scatter(whole if comm.rank == 0 else None)
        comm.barrier()
        if comm.size > 1 and turn % 10 == 0:
            right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            comm.sendrecv(home, right, np.empty_like(home), left)
            comm.all_gather_object({"turn": turn})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by means of /proc, which only Linux has")
def test_collectives_leak_nothing(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    rounds = 240 // max(2, comm.size)
    many(part, rounds // 3)
    before = state(part)
    many(part, rounds)
    after = state(part)
    # Heap that comes and goes moves by some hundred KiB; a leak of one small array per collective would be MiB.
    assert after.resident - before.resident < (3 << 20), (before, after)
    assert after.descriptors <= before.descriptors + 1 and after.shared <= before.shared, (before, after)
    assert after.mappings <= before.mappings + 10, (before, after)
    part.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by means of /proc, which only Linux has")
def test_splits_leak_nothing(comm: Communicator) -> None:
    def turn() -> None:
        part = comm.split(comm.rank % 2, key=-comm.rank)
        assert part is not None
        many(part, 1)
        part.close()

    for _ in range(10):
        turn()
    before = state(comm)
    for _ in range(100 // max(2, comm.size)):
        turn()
    after = state(comm)
    assert after.resident - before.resident < (6 << 20), (before, after)
    assert after.descriptors <= before.descriptors + 1 and after.shared <= before.shared, (before, after)
    assert after.mappings <= before.mappings + 10, (before, after)


def test_a_killed_job_would_leave_no_file(comm: Communicator) -> None:
    comm.barrier()
    assert leftovers.mapped() == set()
