"""Blocks that change places with those of a process, by the kernel: here with this process itself."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import cross_memory, parts
from dtrain.collectives.cross_memory import PIECE
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.machine_reading import DONE
from dtrain.collectives.parts import Part

PAGE = mmap.PAGESIZE
NONE, READ, BOTH = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
code = machine_code()
pytestmark = pytest.mark.skipif(
    not cross_memory.reaches(*cross_memory.identity()), reason="process_vm_readv is forbidden here"
)
by_machine = pytest.mark.skipif(code is None or "trades" not in code.parts, reason="no machine code for it")


def in_machine_code(part: Part, target: Array) -> int:
    assert code is not None and part.action is not None
    words = np.array(part.action, np.int64)
    words[3] = address(target)
    return code.do(address(words), 0)


def in_python(part: Part, target: Array) -> int:
    part.python(target, target)
    return 0


@pytest.mark.parametrize("do", [pytest.param(in_machine_code, marks=by_machine), in_python])
@pytest.mark.parametrize("nbytes", [0, 1, 1000, PIECE - 1, PIECE, 3 * PIECE + 77])
@pytest.mark.parametrize("shift", [0, 1, 63, 100])
def test_two_blocks_change_places(do: Any, nbytes: int, shift: int) -> None:
    """One with the process, one within it; nothing beside them is touched, and it can be done again."""
    here = np.random.default_rng(nbytes).integers(0, 256, 2 * nbytes + 500, np.uint8)
    there = np.random.default_rng(shift).integers(0, 256, 2 * nbytes + 500, np.uint8)
    mine, theirs = here.copy(), there.copy()
    rows = [
        (os.getpid(), address(theirs), shift, 20, nbytes),
        (0, address(theirs), shift + nbytes + 50, 99 + nbytes, nbytes),
    ]
    part = parts.trades(rows)
    for turn in range(2):
        assert do(part, mine) == 0
        for _, _, begin, to, _ in rows:
            other, own = (there, here) if turn == 0 else (here, there)
            first, second = (begin, to) if turn == 0 else (to, begin)
            assert np.array_equal(mine[to : to + nbytes], other[first : first + nbytes])
            assert np.array_equal(theirs[begin : begin + nbytes], own[second : second + nbytes])
    assert np.array_equal(mine, here) and np.array_equal(theirs, there), "written beside the blocks"


@pytest.fixture
def room() -> Iterator[tuple[Array, Any]]:
    """Pages for four pieces, and what sets their protection: (first byte, bytes, protection)."""
    pages = mmap.mmap(-1, 4 * PIECE)
    octets = np.frombuffer(pages, np.uint8)

    def protect(begin: int, nbytes: int, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address(octets) + begin), ctypes.c_size_t(nbytes), protection) == 0

    yield octets, protect
    protect(0, 4 * PIECE, BOTH)


@by_machine
@pytest.mark.parametrize("protection", [NONE, READ], ids=["neither", "no write"])
@pytest.mark.parametrize("good", [0, 3 * PAGE, 2 * PIECE, 2 * PIECE + 5 * PAGE])
@pytest.mark.parametrize("again", [in_machine_code, in_python])
def test_what_fails_goes_on_from_there(room: tuple[Array, Any], protection: int, good: int, again: Any) -> None:
    """No byte changes places twice, wherever it stopped; and what fails again says why."""
    octets, protect = room
    octets[...] = there = np.random.default_rng(1).integers(0, 256, octets.size, np.uint8)
    here = np.random.default_rng(2).integers(0, 256, octets.size + 10, np.uint8)
    mine, middle = here.copy(), octets.size - PIECE - 100
    rows = [
        (os.getpid(), address(octets), middle, 10 + middle, PIECE + 100),
        (os.getpid(), address(octets), 0, 10, middle),
    ]
    part = parts.trades(rows if good else rows[1:])
    table = part.tables[0]
    protect(good, middle // PAGE * PAGE - good if good else octets.size, protection)
    rows_before = table.copy()
    assert in_machine_code(part, mine) > 0
    protect(0, octets.size, READ)
    done = slice(10, 10 + table[-1, DONE]), slice(0, table[-1, DONE])
    assert good - PIECE < done[1].stop <= good
    assert np.array_equal(mine[done[0]], there[done[1]]) and np.array_equal(octets[done[1]], here[done[0]])
    rest = slice(done[0].stop, 10 + middle), slice(done[1].stop, middle)
    assert np.array_equal(mine[rest[0]], here[rest[0]]) and np.array_equal(octets[rest[1]], there[rest[1]])
    protect(0, octets.size, BOTH)
    assert again(part, mine) == 0
    both = slice(10, 10 + middle), slice(0, middle)
    assert np.array_equal(mine[both[0]], there[both[1]]) and np.array_equal(octets[both[1]], here[both[0]])
    assert np.array_equal(table, rows_before), "the next one begins at the beginning"


def test_what_cannot_change_places_is_told(room: tuple[Array, Any]) -> None:
    octets, protect = room
    part = parts.trades([(os.getpid(), address(octets), 0, 0, 8)])
    protect(0, octets.size, READ)
    mine = np.arange(8, dtype=np.uint8)
    with pytest.raises(OSError, match=r"process_vm_writev of 8 bytes.*without it: DTRAIN_CMA=off"):
        part.python(mine, mine)
    assert np.array_equal(mine, np.arange(8)) and not part.tables[0][:, DONE].any()
