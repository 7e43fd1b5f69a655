"""Memory for large temporaries that is used again, rather than given back to the system.

Fresh pages cost more than the arithmetic on them: every array above malloc's mmap threshold is mapped, faulted in
page by page and unmapped again. A step allocates the same sizes again and again, so blocks are kept by size. (Measured
on the temporaries of a small GPT's step: 16 ms, np.empty 79 ms, np.empty after mallopt forbids mmap and trimming 22 ms.)

    empty(shape, dtype) ──► view ──.base──► _Block (owner)     last view dies ──► _Block.__del__ ──► free list

NumPy keeps the owner alive as the base of every view, since it is of another type than ndarray. Sizes are rounded up to
a quarter of a power of two. Lists of Python are the free lists: their pop and append are atomic, so ranks that are
threads need no lock, and `__del__` may run anywhere. Invariant: a block is in a free list or under a view, never both.
"""

import math
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.kernels.address import address

SMALL = 128 * 1024  # bytes; below, malloc does not go to the system
LINE = 64  # bytes of a cache line; blocks begin at one
KEEP = 2  # the pool may hold this many times the peak of what was in use, before it starts anew


class _Account:
    """Bytes taken from the system, in use, and the most in use. Counted without a lock, so only nearly right."""

    made = used = peak = 0


_free: dict[int, list[Array]] = {}


class _Block(np.ndarray[Any, Any]):
    """The owner of a block of memory; gives it back to its free list in the end."""

    def __del__(self, free: dict[int, list[Array]] = _free, account: type[_Account] = _Account) -> None:
        # Defaults, because globals may be gone when the interpreter ends.
        memory = self.base
        if memory is not None:  # None: a temporary made by NumPy, not by us
            account.used -= memory.nbytes
            free[memory.nbytes].append(memory)


def empty(shape: Any, dtype: Any) -> Array:
    """An uninitialised C-contiguous array; its memory comes back to the pool when the last view of it dies."""
    dtype = np.dtype(dtype)
    size = (shape if isinstance(shape, int) else math.prod(shape)) * dtype.itemsize
    if size < SMALL:
        return np.empty(shape, dtype)
    rounded = _round_up(size)
    try:
        memory = _free[rounded].pop()
    except (KeyError, IndexError):
        memory = _make(rounded)
    _Account.used += rounded
    _Account.peak = max(_Account.peak, _Account.used)
    return np.ndarray(shape, dtype, _Block(rounded, np.uint8, memory))


def held() -> int:
    """Bytes in the free lists."""
    return sum(size * len(blocks) for size, blocks in list(_free.items()))


def clear() -> None:
    """Give all free blocks back to the system."""
    for blocks in list(_free.values()):
        while blocks:
            _Account.made -= blocks.pop().nbytes
    _Account.peak = _Account.used


def _make(size: int) -> Array:
    _Account.used = max(0, _Account.made - held())  # exact again, whatever the races did to the count
    if _Account.made + size > KEEP * max(_Account.peak, _Account.used + size):
        clear()
    _free.setdefault(size, [])
    _Account.made += size
    memory = np.empty(size + LINE, np.uint8)
    offset = -address(memory) % LINE
    return memory[offset : offset + size]


def _round_up(size: int) -> int:
    quarter = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter
