"""Memory shared by the ranks of one node: segments of MPI-3 shared windows, sub-allocated.

    segment 0:   part of rank 0  | block | block |   block   |      free      |
                 part of rank 1  | block | block |   block   |      free      |       every rank maps all parts
                 ...                ^ the same offset in every part

`allocate` is collective with the same arguments on every rank, so a block has one offset on all ranks and a view of
it needs no exchange of addresses. Pages cost memory when they are touched, not when a segment is made.

When the last array in a block dies, the block is marked on that rank; nothing else happens, so arrays may die at any
time. When a segment is full, the ranks agree on the blocks that are dead on all of them and use those again. `close`
unmaps all segments; one with living arrays on any rank stays mapped until the process ends, so that no array ever
points to nowhere.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.transport import Segment

SEGMENT_BYTES = 64 << 20
ALIGNMENT = 4096  # a page: no two ranks share a cache line, and a slice of the owner begins on his page
# Arrays begin here in their first page. NumPy's own long arrays begin at byte 16 of a page (malloc); a copy between two
# addresses that differ by 1 to 63 bytes modulo a page is the slow case of x86's string copy (256 KiB: 120 us, not 10).
SKEW = 2048
KNOWN_PARTS = 4096
MOST_RANGES = 64  # that `ranges` tells one by one

# (segment number, offset in bytes): where an array begins in the part of its rank.
Place = tuple[int, int]


def _root(array: Array) -> object:
    """What owns the memory; NumPy keeps chains of views short."""
    root: object = array.base
    return root.base if isinstance(root, np.ndarray) else root


class Block:
    """The owner of a piece of shared memory, at the root of the `base` chain of every array that lies in it."""

    def __init__(self, arena: "Arena", segment: int, offset: int, nbytes: int, at: int) -> None:
        self.arena = arena
        self.segment = segment
        self.offset = offset
        self.nbytes = nbytes
        self.address = at
        self._dead = arena.dead
        self._key = (segment, offset)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (at, False)}

    def __del__(self) -> None:
        self._dead.add(self._key)  # nothing else: this may run inside any other code


def at_home(array: Array) -> bool:
    """Whether an array is contiguous and comes from `allocate`: not what peers see of it, nor a stranger's view."""
    return isinstance(_root(array), Block) and array.flags.c_contiguous


class _Kept:
    """Memory of a peer, with what keeps its place from being used for something else."""

    def __init__(self, octets: Array, keeper: Array) -> None:
        self.__array_interface__ = octets.__array_interface__
        self._keeper = keeper


def with_keeper(array: Array, keeper: Array) -> Array:
    """The flat array of a peer, safe for as long as somebody has it: its place is that of `keeper`, which is mine."""
    return np.asarray(_Kept(array.view(np.uint8), keeper)).view(array.dtype)


class Arena:
    """The shared memory of one rank and what its peers have at the same places."""

    def __init__(self, rank: int, share: Callable[[int], Segment], agree: Callable[[Array], Array]) -> None:
        """`share` makes a segment; `agree` the element-wise minimum over ranks of a uint8 array. Both collective."""
        self._rank = rank
        self._share = share
        self._agree = agree
        self._segments: list[Segment] = []
        self._free: list[list[tuple[int, int]]] = []  # per segment: (offset, nbytes), ascending
        self._taken: dict[tuple[int, int], int] = {}  # (segment, offset) -> nbytes, in the order of allocation
        self.dead: set[tuple[int, int]] = set()
        self.ranges = np.zeros(1 + 2 * MOST_RANGES, np.int64)
        """For machine code: how many, and where my part of each segment begins and ends."""
        self._views: dict[tuple[int, np.dtype[Any]], list[Array]] = {}
        self._parts: dict[tuple[Place, int, np.dtype[Any]], list[Array]] = {}  # the same buckets come every step

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Collective: a new array of undefined content, at the same place on every rank."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = -(-(nbytes + SKEW) // ALIGNMENT) * ALIGNMENT
        place = self._fit(size)
        if place is None:
            self._reuse()
            place = self._fit(size)
        if place is None:
            length = max(SEGMENT_BYTES, size)
            self._segments.append(self._share(length))
            self._free.append([(0, length)])
            self._tell_range()
            place = self._fit(size)
            assert place is not None
        segment, offset = place
        self._taken[place] = size
        part = np.frombuffer(self._segments[segment].parts[self._rank], np.uint8)
        block = Block(self, segment, offset, size, address(part) + offset)
        return np.asarray(block)[SKEW : SKEW + nbytes].view(dtype).reshape(shape)

    def at_death(self, array: Array, do: Callable[[], object]) -> None:
        """`do` when the block in which this array lies dies on this rank."""
        root = _root(array)
        assert isinstance(root, Block)
        weakref.finalize(root, do).atexit = False

    def place(self, array: Array) -> Place | None:
        """Where a C-contiguous array lies, or None when it is not in this arena."""
        root = _root(array)
        if not isinstance(root, Block) or root.arena is not self or not array.flags.c_contiguous:
            return None
        return root.segment, address(array) - root.address + root.offset

    def parts(self, place: Place, count: int, dtype: np.dtype[Any]) -> list[Array]:
        """The arrays (count,) of all ranks at one place, in rank order."""
        key = (place, count, dtype)
        known = self._parts.get(key)
        if known is not None:
            return known
        segment, offset = place
        views = self._segment_views(segment, dtype)
        start = offset // dtype.itemsize
        if len(self._parts) >= KNOWN_PARTS:
            self._parts.clear()
        parts = self._parts[key] = [view[start : start + count] for view in views]
        return parts

    def part(self, rank: int, place: Place, count: int, dtype: np.dtype[Any]) -> Array:
        """The array (count,) of one rank at a place."""
        start = place[1] // dtype.itemsize
        return self._segment_views(place[0], dtype)[rank][start : start + count]

    def _segment_views(self, segment: int, dtype: np.dtype[Any]) -> list[Array]:
        """All parts of a segment as arrays of `dtype`, as long as they can be."""
        views = self._views.get((segment, dtype))
        if views is None:
            views = []
            for part in self._segments[segment].parts:
                octets = np.frombuffer(part, np.uint8)
                views.append(octets[: len(octets) // dtype.itemsize * dtype.itemsize].view(dtype))
            self._views[segment, dtype] = views
        return views

    def _tell_range(self) -> None:
        known = len(self._segments)
        if known <= MOST_RANGES:
            part = np.frombuffer(self._segments[-1].parts[self._rank], np.uint8)
            self.ranges[2 * known - 1 : 2 * known + 1] = address(part), address(part) + part.nbytes
            self.ranges[0] = known
        else:
            self.ranges[:3] = 1, 0, np.iinfo(np.int64).max  # anything may lie there

    def close(self) -> None:
        """Collective: unmap every segment in which no array is alive on any rank."""
        self._views.clear()
        self._parts.clear()
        if not self._segments:
            return
        living = {segment for segment, offset in self._taken if (segment, offset) not in self.dead}
        empty = np.array([segment not in living for segment in range(len(self._segments))], np.uint8)
        for segment, free in zip(self._segments, self._agree(empty), strict=True):
            if free:
                segment.free()
        self._segments.clear()
        self._free.clear()

    def _fit(self, size: int) -> Place | None:
        """The first free range that is long enough, taken; the same decision on every rank."""
        for segment, ranges in enumerate(self._free):
            for position, (offset, length) in enumerate(ranges):
                if length >= size:
                    ranges[position : position + 1] = [(offset + size, length - size)] if length > size else []
                    return segment, offset
        return None

    def _reuse(self) -> None:
        """Collective: give back the blocks that are dead on all ranks."""
        if not self._taken:
            return
        blocks = list(self._taken)
        mine = np.array([block in self.dead for block in blocks], np.uint8)
        for block, dead in zip(blocks, self._agree(mine), strict=True):
            if dead:
                self.dead.discard(block)
                segment, offset = block
                self._free[segment].append((offset, self._taken.pop(block)))
        for segment, ranges in enumerate(self._free):
            merged: list[tuple[int, int]] = []
            for offset, length in sorted(ranges):
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = (merged[-1][0], merged[-1][1] + length)
                else:
                    merged.append((offset, length))
            self._free[segment] = merged
