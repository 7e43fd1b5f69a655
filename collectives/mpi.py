"""The transport over MPI. The only file of dtrain that imports mpi4py.

Thread level: below MPI_THREAD_MULTIPLE, MPICH uses shared-memory collectives of its own. They are the faster ones up
to 64 KiB, but that is what `staged` does here; beyond they are slower (all_reduce of 4 MiB on 2 ranks: 3.8 ms,
against 1.5 ms under MULTIPLE), and with more ranks than cores they spin while the rank they wait for has no core (8
ranks on 2 busy cores, 256 KiB: 1600 ms against 17 ms). So MULTIPLE is asked for. Open MPI shows no difference.
MPI4PY_RC_THREAD_LEVEL overrules it.

Only buffers travel, never pickles: the upper-case methods of mpi4py. What is moved but not computed with stands in
`native.py`.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, cast

import mpi4py
import numpy as np

if "mpi4py.MPI" not in sys.modules and "MPI4PY_RC_THREAD_LEVEL" not in os.environ:
    mpi4py.rc.thread_level = "multiple"
# Windows are shared memory only; Open MPI's wheel complains, on every rank, of a component for other ones.
os.environ.setdefault("OMPI_MCA_osc", "^ucx")
from mpi4py import MPI

from dtrain.collectives.dtypes import Array, starts
from dtrain.collectives.leftovers import remove_names
from dtrain.collectives.native import Moves, octets
from dtrain.collectives.waiting import NAPS, YIELD_SECONDS, cores
from dtrain.collectives.work import Finished, Request

# Native reductions used per kind of dtype. Not here, and therefore done by `exchange`: float16 (MPI has none that is
# portable), max and min of floats (MPI may drop a NaN, NumPy never does), max and min of complex numbers (MPI has
# none).
_ARITHMETIC = {"sum": MPI.SUM, "prod": MPI.PROD}
_ORDERED = {**_ARITHMETIC, "max": MPI.MAX, "min": MPI.MIN}
_LOGICAL = {"sum": MPI.BOR, "max": MPI.BOR, "prod": MPI.BAND, "min": MPI.BAND}
_OPERATIONS: dict[str, dict[str, MPI.Op]] = {
    "i": _ORDERED,
    "u": _ORDERED,
    "f": _ARITHMETIC,
    "c": _ARITHMETIC,
    "b": _LOGICAL,
}


class _Requests:
    """One or more MPI requests as one; keeps the buffers alive until they are done."""

    def __init__(self, requests: list[MPI.Request], *buffers: Any) -> None:
        self._requests = requests
        self._buffers = buffers

    def test(self) -> bool:
        return bool(MPI.Request.Testall(self._requests))

    def wait(self) -> None:
        MPI.Request.Waitall(self._requests)


class SharedSegment:
    """Memory of an MPI-3 shared window: `parts[r]` is the part of rank r, mapped into this process."""

    def __init__(self, comm: MPI.Intracomm, nbytes: int) -> None:
        self._window = MPI.Win.Allocate_shared(nbytes, 1, MPI.INFO_NULL, comm)
        self._window.Lock_all(
            MPI.MODE_NOCHECK
        )  # one passive epoch for the whole life: plain loads and stores, and Sync
        self.parts = [memoryview(cast(Any, self._window.Shared_query(rank)[0])).cast("B") for rank in range(comm.size)]
        self.fence: Callable[[], None] = self._window.Sync

    def free(self) -> None:
        """Collective: unmap. No array that lies here may be touched afterwards."""
        self.parts = []
        self._window.Unlock_all()
        self._window.Free()


class Post:
    """Letters on a communicator of their own."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.heard = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._comm = comm.Dup()
        self._under_way: list[tuple[MPI.Request, bytes]] = []

    def send(self, rank: int, text: bytes) -> None:
        self._under_way = [(request, kept) for request, kept in self._under_way if not request.Test()]
        self._under_way.append((self._comm.Isend(text, rank, 0), text))

    def receive(self) -> list[tuple[int, bytes]]:
        came = []
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, 0, status):
            text = bytearray(status.Get_count(MPI.BYTE))
            self._comm.Recv(text, status.Get_source(), 0)
            came.append((status.Get_source(), bytes(text)))
        return came

    def rest(self, waited: float) -> None:
        time.sleep(0 if waited < YIELD_SECONDS else NAPS[waited > 20e-3])


class Transport(Moves):
    """The collectives of the MPI library on one of its communicators."""

    name = "mpi"
    shares = True
    say = None

    def __init__(
        self, comm: MPI.Intracomm, nodes: list[int], names: dict[int, str], crowded: bool, world_ranks: list[int]
    ) -> None:
        self.rank = comm.rank
        self.size = comm.size
        self.nodes = nodes
        self.world_ranks = world_ranks
        self.hosts = [names[node] for node in nodes]
        self._comm = comm
        self.crowded = crowded
        self.threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._names = names  # node -> host name
        self._closed = False

    def together(self, requests: list[Any], *buffers: Any) -> Request:
        return _Requests(requests, *buffers)

    # Between two ranks: bytes

    def send(self, source: Array, destination: int, tag: int) -> None:
        for piece in self.pieces(octets(source)):
            self._comm.Send(piece, destination, tag)

    def recv(self, target: Array, source: int, tag: int) -> None:
        for piece in self.pieces(octets(target)):
            status = MPI.Status()
            self._comm.Recv(piece, source, tag, status)
            if status.Get_count(MPI.BYTE) != len(piece):
                came = status.Get_count(MPI.BYTE)
                raise ValueError(f"recv from rank {source}, tag {tag}: {came} bytes came, out= has {len(piece)}")

    # Reductions: typed

    def reduces(self, op: str, source: Array) -> bool:
        return op in _OPERATIONS.get(source.dtype.kind, {}) and source.dtype.char != "e"

    def all_reduce(self, source: Array, target: Array, op: str) -> None:
        source, target, operator = _typed(source, target, op)
        for origin, part in self._both(source, target):
            self._comm.Allreduce(origin, part, operator)

    def reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> None:
        source, target, operator = _typed(source, target, op)
        if source.nbytes <= self.limit:
            # Target and source may overlap when the caller works in place; MPI forbids that, even of no elements.
            apart = target.size and not np.may_share_memory(source, target)
            into = target if apart else np.empty_like(target)
            self._comm.Reduce_scatter(source, into, list(counts), operator)
            if into is not target:
                np.copyto(target, into)
            return
        for root, (start, count) in enumerate(zip(starts(counts), counts, strict=True)):
            block = source[start : start + count]
            self._reduce(block, target if root == self.rank else None, operator, root)

    def reduce(self, source: Array, target: Array | None, op: str, root: int) -> None:
        if target is None:
            source, _, operator = _typed(source, source, op)
        else:
            source, target, operator = _typed(source, target, op)
        self._reduce(source, target, operator, root)

    def _reduce(self, source: Array, target: Array | None, operator: MPI.Op, root: int) -> None:
        step = max(1, self.limit // source.itemsize)
        for start in range(0, len(source), step):
            part = source[start : start + step]
            into = None if target is None else target[start : start + step]
            if into is not None and np.may_share_memory(part, into):
                part = part.copy()
            self._comm.Reduce(part, into, operator, root)

    def scan(self, source: Array, target: Array, op: str, inclusive: bool) -> None:
        source, target, operator = _typed(source, target, op)
        call = self._comm.Scan if inclusive else self._comm.Exscan
        for origin, part in self._both(source, target):
            call(origin, part, operator)

    def _both(self, source: Array, target: Array) -> Iterator[tuple[Any, Array]]:
        """Source and target in pieces of what one call can carry."""
        in_place = _same(source, target)
        step = max(1, self.limit // source.itemsize)
        for start in range(0, len(source), step):
            yield MPI.IN_PLACE if in_place else source[start : start + step], target[start : start + step]

    # Non-blocking

    def start_all_reduce(self, source: Array, target: Array, op: str) -> Request:
        source, target, operator = _typed(source, target, op)
        requests = [self._comm.Iallreduce(origin, part, operator) for origin, part in self._both(source, target)]
        return self.together(requests, source, target)

    def start_scan(self, source: Array, target: Array, op: str, inclusive: bool) -> Request:
        source, target, operator = _typed(source, target, op)
        call = self._comm.Iscan if inclusive else self._comm.Iexscan
        requests = [call(origin, part, operator) for origin, part in self._both(source, target)]
        return self.together(requests, source, target)

    def start_reduce_scatter(self, source: Array, target: Array, counts: Sequence[int], op: str) -> Request:
        if source.nbytes > self.limit:
            self.reduce_scatter(source, target, counts, op)
            return Finished()
        source, target, operator = _typed(source, target, op)
        if not target.size:  # MPI forbids that the arrays overlap, even where one of them is empty
            target = np.empty_like(target)
        elif np.may_share_memory(source, target):
            source = source.copy()
        request = self._comm.Ireduce_scatter(source, target, list(counts), operator)
        return self.together([request], source, target)

    def start_reduce(self, source: Array, target: Array | None, op: str, root: int) -> Request:
        if source.nbytes > self.limit:
            self.reduce(source, target, op, root)
            return Finished()
        origin, into, operator = _typed(source, source if target is None else target, op)
        if target is not None and np.may_share_memory(source, target):
            origin = origin.copy()
        request = self._comm.Ireduce(origin, None if target is None else into, operator, root)
        return self.together([request], origin, into)

    # Life

    def split(self, color: int | None, key: int) -> "Transport | None":
        comm = self._comm.Split(MPI.UNDEFINED if color is None else color, key)
        if comm == MPI.COMM_NULL:
            return None
        rows = np.empty((comm.size, 2), np.int64)
        comm.Allgather(np.array([self.nodes[self.rank], self.world_ranks[self.rank]], np.int64), rows)
        nodes, ranks = rows.T.tolist()
        return Transport(cast(MPI.Intracomm, comm), nodes, self._names, self.crowded, ranks)

    def post(self) -> Post:
        return Post(self._comm)

    def share(self, nbytes: int) -> SharedSegment:
        return SharedSegment(self._comm, nbytes)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._comm.Free()

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)  # the whole job, whatever part of it this communicator is
        os._exit(code)


def _typed(source: Array, target: Array, op: str) -> tuple[Array, Array, MPI.Op]:
    """The arrays and the MPI operation; truth values travel as bytes of 0 and 1 under bitwise operations."""
    operator = _OPERATIONS[source.dtype.kind][op]
    if source.dtype.kind == "b":
        return source.view(np.uint8), target.view(np.uint8), operator
    return source, target, operator


def _same(source: Array, target: Array) -> bool:
    return source is target or source.__array_interface__["data"][0] == target.__array_interface__["data"][0]


def world_transport(bring: Callable[[], bytes] = bytes) -> tuple[Transport, bytes]:
    """The transport between all ranks of the job, and what rank 0 brings for all; the first call initialises MPI."""
    comm = MPI.COMM_WORLD
    # Who shares memory with me, what is that machine called, and which of its cores may we use? All in rows of one
    # length.
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leader = np.array([comm.rank], np.int64)
    shared.Bcast(leader, 0)
    shared.Free()
    name, mask = MPI.Get_processor_name().encode(), sum(1 << core for core in cores())
    brought = bring() if comm.rank == 0 else b""
    lengths = np.array([len(name), (mask.bit_length() + 7) // 8, len(brought)], np.int64)
    comm.Allreduce(MPI.IN_PLACE, lengths, MPI.MAX)
    width, mask_bytes, brought_bytes = lengths.tolist()
    row = int(leader[0]).to_bytes(8, "little") + mask.to_bytes(mask_bytes, "little") + name.ljust(width)
    everyone = np.empty((comm.size, len(row)), np.uint8)
    comm.Allgather(np.frombuffer(row, np.uint8), everyone)
    remove_names()  # the exchange shows that all ranks have left MPI_Init
    rows = [other.tobytes() for other in everyone]
    nodes = [int.from_bytes(other[:8], "little") for other in rows]
    names = {node: other[8 + mask_bytes :].decode().rstrip() for node, other in zip(nodes, rows, strict=True)}
    here = [other for other, node in zip(rows, nodes, strict=True) if node == int(leader[0])]
    usable = 0
    for other in here:
        usable |= int.from_bytes(other[8 : 8 + mask_bytes], "little")
    crowded = len(here) > usable.bit_count()
    if brought_bytes:
        content = np.frombuffer(brought.ljust(brought_bytes), np.uint8).copy()
        comm.Bcast(content, 0)
        brought = content.tobytes()
    # A duplicate, so that messages of other libraries on COMM_WORLD never meet ours.
    return Transport(comm.Dup(), nodes, names, crowded, list(range(comm.size))), brought


# The end of a failed job: these need no communicator, and harm none, because only they use COMM_WORLD itself.


def position() -> tuple[int, int]:
    """Rank and size in the whole job."""
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


def everyone(seconds: float) -> bool:
    """Whether all ranks of the job call this within `seconds`; at most once in a process."""
    request = MPI.COMM_WORLD.Ibarrier()
    end = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def abort(code: int) -> NoReturn:
    """End all ranks of the job."""
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def library() -> str:
    """One line about the MPI library and the thread level it runs at."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    first_line = MPI.Get_library_version().splitlines()[0].strip()
    return f"{first_line}, thread level {levels[MPI.Query_thread()]}"
