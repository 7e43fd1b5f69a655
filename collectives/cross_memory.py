"""One copy straight out of the memory of another process of this node, by the kernel: process_vm_readv of Linux (CMA),
or into it: process_vm_writev.

    identity   pid, an address, the random number that lies there      in the words of each rank (`node.py`)
    reaches    can I read the number of each peer at its address?      no: a filter of the container, kernel.yama, or
                                                                       process ids of another container

For arrays from anywhere what the window is for those of `comm.empty`: they are read where they lie. The place of such
an array is its address in a segment that no arena has. Staging takes two copies; but a call of the kernel costs some
microseconds, and what it writes goes through the caches. DTRAIN_CMA=off forbids it.

Source: S. Chakraborty, H. Subramoni, D. K. Panda, "Contention-Aware Kernel-Assisted MPI Collectives for
Multi-/Many-Core Systems", IEEE Cluster 2017.
"""

import ctypes
import os
import secrets
import sys
from functools import cache
from typing import Any

import numpy as np

from dtrain.collectives.arena import Place
from dtrain.collectives.dtypes import Array, address

PRIVATE = 0x7FFF  # the number of no segment; what lies at its byte n lies at address n of the process
WORDS = 3  # of an identity
PIECE = 128 * 1024  # bytes that wait aside while others take their place: they stay in the cache

_number = np.array([secrets.randbits(63)], np.int64)


def wanted() -> bool:
    """Whether DTRAIN_CMA allows it."""
    word = os.environ.get("DTRAIN_CMA", "on")
    if word not in ("on", "off"):
        raise ValueError(f"DTRAIN_CMA={word!r}: allowed: on, off")
    return word == "on"


def private(array: Array) -> Place:
    """The place of an array in the memory of this process alone."""
    return PRIVATE, address(array)


def identity() -> tuple[int, int, int]:
    """What the peers need to read from this process, and to be sure that it is this one."""
    return os.getpid(), address(_number), int(_number[0])


def reaches(pid: int, there: int, number: int) -> bool:
    """Whether the process with this identity can be read."""
    found = np.zeros(1, np.int64)
    try:
        read(pid, there, address(found), found.nbytes)
    except OSError:
        return False
    return bool(found[0] == number)


def read(pid: int, there: int, here: int, nbytes: int) -> None:
    """Copy bytes at the address `there` of a process to the address `here` of this one; OSError where that fails."""
    _move("process_vm_readv", pid, there, here, nbytes)


def write(pid: int, there: int, here: int, nbytes: int) -> None:
    """Copy bytes at the address `here` of this process to the address `there` of another; OSError where that fails."""
    _move("process_vm_writev", pid, there, here, nbytes)


def swap(pid: int, there: int, here: int, nbytes: int) -> None:
    """Bytes at the address `there` of a process and `here` of this one change places, piece by piece."""
    room = np.empty(min(nbytes, PIECE), np.uint8)
    for begin in range(0, nbytes, PIECE):
        part = min(PIECE, nbytes - begin)
        read(pid, there + begin, address(room), part)
        write(pid, there + begin, here + begin, part)
        ctypes.memmove(here + begin, address(room), part)


def _move(name: str, pid: int, there: int, here: int, nbytes: int) -> None:
    call, done = _call(name), 0
    if call is None:
        raise OSError(f"this system has no {name}")
    while done < nbytes:
        mine, theirs = _vector(here + done, nbytes - done), _vector(there + done, nbytes - done)
        moved = call(pid, mine, 1, theirs, 1, 0)
        if moved <= 0:
            code = ctypes.get_errno()
            what = f"{nbytes - done} bytes at {there + done:#x} of process {pid}"
            raise OSError(code, f"{os.strerror(code)}: {name} of {what}; without it: DTRAIN_CMA=off")
        done += moved


@cache
def _call(name: str) -> Any:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is not None:
        call.restype = ctypes.c_ssize_t
        words = ctypes.c_void_p, ctypes.c_ulong
        call.argtypes = (ctypes.c_int, *words, *words, ctypes.c_ulong)
    return call


def _vector(at: int, nbytes: int) -> Any:
    """A struct iovec."""
    return (ctypes.c_size_t * 2)(at, nbytes)
