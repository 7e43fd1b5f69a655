"""Many collectives, works, objects and splits: memory, file descriptors, threads, mappings and /dev/shm stay flat.

DTRAIN_TEST_LEAKS=full runs 10,000 collectives and 200 splits and prints what was counted; otherwise fewer, for seconds.
"""

import gc
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dtrain.collectives import Communicator, leftovers, wait_all, watchdog


class State(NamedTuple):
    resident: int  # bytes
    descriptors: int
    threads: int
    mappings: int
    shared: int  # files in /dev/shm that this process has mapped and that have a name


def state(comm: Communicator) -> State:
    gc.collect()
    comm.barrier()
    lines = Path("/proc/self/maps").read_text().splitlines()
    named = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = len(os.listdir("/proc/self/task"))
    return State(resident, len(os.listdir("/proc/self/fd")), threads, len(lines), len(named))


FULL = os.environ.get("DTRAIN_TEST_LEAKS") == "full"


def compare(comm: Communicator, what: str, before: State, after: State, room: int) -> None:
    """Nothing has grown. Heap that comes and goes moves by some hundred KiB: `room` bytes of it are no leak."""
    if FULL and comm.rank == 0:
        print(f"\n{what}, {comm.size} ranks: before {before}, after {after}", file=sys.stderr, flush=True)
    assert after.resident - before.resident < room, (before, after)
    assert after.descriptors <= before.descriptors + 1 and after.shared <= before.shared, (before, after)
    assert after.threads <= before.threads and after.mappings <= before.mappings + 10, (before, after)


def many(comm: Communicator, collectives: int) -> None:
    """So many collectives of all kinds, blocking and started, on arrays from everywhere, some kept and some dropped."""
    home, whole = comm.empty(3000), comm.empty(3000 * comm.size)
    home[...], whole[...] = 0, 0
    private = np.zeros(3000 * comm.size, np.float32)
    long = np.zeros(70_000, np.float32)  # beyond the staging where MPI's own, or messages, are preferred
    algorithms = ["auto", "native", "exchange", "ring", "recursive_doubling"] if comm.size > 1 else ["auto"]
    done = turn = 0
    while done < collectives:
        works = [comm.all_reduce_async(home[at : at + 700], out=home[at : at + 700]) for at in (0, 800, 1600)]
        works += [comm.all_gather_async(home, out=whole), comm.reduce_scatter_async(private)]
        works += [comm.all_reduce_async(long[: 7 * turn % 70_000]), comm.barrier_async()]
        comm.all_reduce(np.ones((turn % 7, 3)))
        works += [comm.broadcast_async(private), comm.reduce_async(private), comm.gather_async(home)]
        works += [comm.all_to_all_async(whole), comm.scatter_async(private if comm.rank == 0 else None)]
        wait_all(works)
        comm.all_reduce(private, out=private, algorithm=algorithms[turn % len(algorithms)])
        comm.all_reduce(long, out=long)
        comm.all_reduce_shared(home)
        comm.reduce_scatter(whole)
        comm.all_to_all(whole)
        comm.all_to_all(private)
        comm.all_to_all(private, counts=[3000] * comm.size)
        comm.all_gather(home)
        comm.broadcast(home, out=home)
        comm.broadcast(private, out=private)
        comm.reduce(home, out=home if comm.rank == 0 else None)
        comm.gather(home)
        comm.scatter(whole if comm.rank == 0 else None)
        comm.barrier()
        done += len(works) + 16
        turn += 1
        if comm.size > 1 and turn % 10 == 0:
            right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            comm.sendrecv(home, right, np.empty_like(home), left)
            comm.all_gather_object({"turn": turn})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by means of /proc, which only Linux has")
def test_collectives_leak_nothing(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None
    some = 10_000 if FULL else 3000 // max(2, comm.size)
    many(part, some // 3)
    before = state(part)
    many(part, some)
    compare(part, f"{some} collectives", before, state(part), 3 << 20)
    part.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by means of /proc, which only Linux has")
def test_splits_leak_nothing(comm: Communicator) -> None:
    def turn() -> None:
        part = comm.split(comm.rank % 2, key=-comm.rank)
        assert part is not None
        many(part, 1)
        part.close()

    splits = 200 if FULL else 100 // max(2, comm.size)
    for _ in range(10):
        turn()
    before = state(comm)
    for _ in range(splits):
        turn()
    compare(comm, f"{splits} splits", before, state(comm), 6 << 20)


def test_what_watches_for_hangs_keeps_no_arrays(comm: Communicator) -> None:
    part = comm.split(0)
    assert part is not None

    def turn() -> None:
        home = part.empty(1000)
        if comm.rank == 1:
            time.sleep(1.2 * watchdog.EVERY)  # meanwhile the others are in a call of the MPI library, with this array
        part.transport.barrier()
        home[...] = 0

    turn()
    arena = part._arena()
    assert arena is None or set(arena._taken) <= arena.dead
    part.close()


def test_a_killed_job_would_leave_no_file(comm: Communicator) -> None:
    comm.barrier()
    assert leftovers.mapped() == set()


def test_shared_sums_die_with_their_arrays(comm: Communicator) -> None:
    """Not before: whoever still has one reads it, also when other arrays came and the communicator is gone."""
    part = comm.split(0)
    assert part is not None
    kept = []
    for turn in range(20):
        array = part.empty(1 << 20)
        array[...] = turn
        total = part.all_reduce_shared(array)
        if turn % 8 == 0:
            kept.append((turn, total[:: 1 << 10]))
        del array, total
    node = part.node
    if node is not None:
        assert len(node.arena._segments) == 1  # of 64 MiB; all of them together are 160
    part.close()
    for turn, view in kept:
        assert (view == turn * comm.size).all()
