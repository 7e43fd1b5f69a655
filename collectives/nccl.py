"""NCCL, streams and pinned memory: the only file of the collectives that imports CuPy.

    rank 0  ── get_unique_id() ──►  all ranks, as a small object over the communicator
    every   ── NcclCommunicator(size, id, rank) ──  one per Communicator, made at the first collective on CuPy arrays

NCCL wants one GPU per rank. What is moved travels as bytes, so every dtype is welcome; sums run in NCCL where it has
the type and the operation (`reduction`), else by our own schedules over its messages (`device_schedules.py`).
Invariant: everything is enqueued on the current CuPy stream, nothing waits on the host.

https://docs.nvidia.com/deeplearning/nccl/user-guide, https://docs.cupy.dev/en/stable/reference/generated/cupy.cuda.nccl
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np

from dtrain.collectives.dtypes import Array
from dtrain.collectives.work import Work

if TYPE_CHECKING:
    from dtrain.collectives.group import Group

try:
    from cupy.cuda import nccl
except ImportError:  # a CuPy that was built without it
    nccl = None

# CuPy's older NCCL modules have no name for bfloat16 (ncclDataType_t); NCCL itself knows it from 2.10 on.
_BFLOAT16, _BFLOAT16_SINCE = 9, 21000
_MESSAGES_SINCE = 2700  # ncclSend and ncclRecv; versions below 2.9 are written 2000 + ...

UFUNCS: dict[str, Any] = {
    "sum": cupy.add,
    "prod": cupy.multiply,
    "max": cupy.maximum,
    "min": cupy.minimum,
}


class Reduction(NamedTuple):
    """What NCCL is told about a reduction: data type, operation, and numbers per element (complex: 2)."""

    datatype: int
    op: int
    width: int = 1


def version() -> int:
    """The number of the NCCL library (2.19.3 is 21903); 0: CuPy has none, or one without messages."""
    if nccl is None or not getattr(nccl, "available", True):
        return 0
    found = int(nccl.get_version())
    return found if found >= _MESSAGES_SINCE else 0


def gpu() -> str:
    """The current GPU by its place on the bus, which is the same in all processes of a host."""
    return str(cupy.cuda.Device().pci_bus_id)


def gpus() -> tuple[int, str, int]:
    """How many this process sees, what the first one is called, and its bytes of memory."""
    count = int(cupy.cuda.runtime.getDeviceCount()) if cupy.cuda.is_available() else 0
    if not count:
        return 0, "", 0
    first = cupy.cuda.runtime.getDeviceProperties(0)
    return count, first["name"].decode(), int(first["totalGlobalMem"])


def hindrance(comm: "Group") -> str | None:
    """Collective: why NCCL cannot be used between these ranks, in words; None: it can. The same answer on all ranks."""
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, bus, number) in enumerate(comm.all_gather_object([comm.host, gpu(), version()])):  # type: ignore[attr-defined]
        if not number:
            return f"rank {rank} has no NCCL (CuPy {cupy.__version__})"
        if (host, bus) in owners:
            return f"ranks {owners[host, bus]} and {rank} share GPU {bus} of {host}"
        owners[host, bus] = rank
    return None


def reduction(dtype: np.dtype[Any], op: str) -> Reduction | None:
    """How NCCL does it; None: it cannot.

    Not by NCCL: max and min of floats (it may drop a NaN, we never do), products of complex numbers, 16-bit integers.
    """
    ops = {"sum": nccl.NCCL_SUM, "prod": nccl.NCCL_PROD, "max": nccl.NCCL_MAX, "min": nccl.NCCL_MIN}
    if dtype.kind == "b":  # bytes of 0 and 1: or is max, and is min
        return Reduction(nccl.NCCL_UINT8, ops["max" if op in ("sum", "max") else "min"])
    if dtype.kind == "c":
        real = nccl.NCCL_FLOAT32 if dtype.itemsize == 8 else nccl.NCCL_FLOAT64
        return Reduction(real, ops[op], 2) if op == "sum" else None
    if dtype.kind in "iu":
        whole = {
            "i1": nccl.NCCL_INT8,
            "u1": nccl.NCCL_UINT8,
            "i4": nccl.NCCL_INT32,
            "u4": nccl.NCCL_UINT32,
            "i8": nccl.NCCL_INT64,
            "u8": nccl.NCCL_UINT64,
        }
        datatype = whole.get(f"{dtype.kind}{dtype.itemsize}")
    elif op in ("max", "min"):
        return None
    elif dtype.name == "bfloat16":
        datatype = getattr(nccl, "NCCL_BFLOAT16", _BFLOAT16) if version() >= _BFLOAT16_SINCE else None
    else:
        floats = {"float16": nccl.NCCL_FLOAT16, "float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        datatype = floats.get(dtype.name)
    return None if datatype is None else Reduction(datatype, ops[op])


class Connection:
    """The NCCL communicator of one Communicator. Arrays are flat and contiguous, on this rank's GPU.

    The GPU that is current when it is made must be current in every call.
    """

    def __init__(self, comm: "Group") -> None:
        """Collective. Ends an idle NCCL communicator in `close` only: destroying one is collective too."""
        self.rank, self.size = comm.rank, comm.size
        name = list(nccl.get_unique_id()) if comm.rank == 0 else None
        self._nccl = nccl.NcclCommunicator(comm.size, tuple(comm.broadcast_object(name)), comm.rank)  # type: ignore[attr-defined]
        self._side = cupy.cuda.Stream(non_blocking=True)
        self._open: list[_Event] = []

    def close(self) -> None:
        """Collective: wait for what is under way and give the communicator back."""
        self._side.synchronize()
        cupy.cuda.get_current_stream().synchronize()
        self._open.clear()
        self._nccl.destroy()

    def all_reduce(self, source: Any, target: Any, how: Reduction) -> None:
        """Target (count,) = the sum over ranks of source (count,); target may be source."""
        count = source.size * how.width
        self._nccl.allReduce(source.data.ptr, target.data.ptr, count, how.datatype, how.op, _stream())

    def reduce_scatter(self, source: Any, target: Any, how: Reduction) -> None:
        """Target (count,) = block `rank` of the sum of source (count * size,)."""
        count = target.size * how.width
        self._nccl.reduceScatter(source.data.ptr, target.data.ptr, count, how.datatype, how.op, _stream())

    def reduce(self, source: Any, target: Any, how: Reduction, root: int) -> None:
        """Target on root = the sum of source; on the others target is source and is left alone."""
        count = source.size * how.width
        self._nccl.reduce(source.data.ptr, target.data.ptr, count, how.datatype, how.op, root, _stream())

    def broadcast(self, buffer: Any, root: int) -> None:
        """Buffer of every rank = buffer of root."""
        at = buffer.data.ptr
        self._nccl.broadcast(at, at, buffer.nbytes, nccl.NCCL_UINT8, root, _stream())

    def all_gather(self, source: Any, target: Any) -> None:
        """Target = the sources of all ranks, equally long, in rank order."""
        self._nccl.allGather(source.data.ptr, target.data.ptr, source.nbytes, nccl.NCCL_UINT8, _stream())

    def exchange(self, sends: Sequence[tuple[int, Any]], receives: Sequence[tuple[int, Any]]) -> None:
        """One group of messages (peer, array): all under way at once, so that no order of the ranks can block.

        Between two ranks they pair up in the order written; those of no bytes are left out on both sides.
        """
        stream = _stream()
        with _group():
            for peer, array in sends:
                if array.nbytes:
                    self._nccl.send(array.data.ptr, array.nbytes, nccl.NCCL_UINT8, peer, stream)
            for peer, array in receives:
                if array.nbytes:
                    self._nccl.recv(array.data.ptr, array.nbytes, nccl.NCCL_UINT8, peer, stream)

    def start(self, run: Callable[[], Any], *arrays: Any) -> Work:
        """`run` on a stream of its own, behind what the current one has been given so far.

        `Work.wait` lets the then current stream wait, not the host. The arrays are kept until it is over: CuPy would
        hand out their memory again, for it sees only the stream that asked for it.
        """
        self._side.wait_event(cupy.cuda.get_current_stream().record())
        with self._side:
            result = run()
        event = _Event(self._side.record(cupy.cuda.Event(disable_timing=True)), (*arrays, result))
        self._open = [other for other in self._open if not other.test()]
        self._open.append(event)
        return Work(event, lambda: result)


class _Event:
    """The request of a work on a stream."""

    def __init__(self, event: Any, arrays: tuple[Any, ...]) -> None:
        self._event = event
        self._arrays = arrays

    def test(self) -> bool:
        return bool(self._event.done)

    def wait(self) -> None:
        cupy.cuda.get_current_stream().wait_event(self._event)


@contextlib.contextmanager
def _group() -> Iterator[None]:
    """NCCL calls that begin together; the group ends also where one of them is refused."""
    nccl.groupStart()
    try:
        yield
    finally:
        nccl.groupEnd()


def _stream() -> int:
    return int(cupy.cuda.get_current_stream().ptr)


# Memory


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
    """Undefined content on the current GPU."""
    return cupy.empty(tuple(shape), dtype)


def contiguous(array: Any) -> Any:
    """The array as (count,); a copy only where it must be."""
    return cupy.ascontiguousarray(array).reshape(-1)


def overlap(one: Any, other: Any) -> bool:
    """Whether two flat arrays have memory in common."""
    begin, start = int(one.data.ptr), int(other.data.ptr)
    return begin < start + int(other.nbytes) and start < begin + int(one.nbytes)


def pinned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """A NumPy array in memory that the GPU copies from and to directly; CuPy keeps a pool of it."""
    count = math.prod(shape)
    if not count:
        return np.empty(tuple(shape), dtype)
    octets = np.frombuffer(cupy.cuda.alloc_pinned_memory(count * dtype.itemsize), np.uint8, count * dtype.itemsize)
    return octets.view(dtype).reshape(tuple(shape))


def to_host(array: Any) -> Array:
    """A copy in pinned memory, after everything on the current stream."""
    host = pinned(array.shape, np.dtype(array.dtype))
    if host.size:
        contiguous(array).view(np.uint8).get(out=host.reshape(-1).view(np.uint8))
    return host


def to_gpu(host: Array, array: Any) -> Any:
    """Array, any layout, with the content of the host's; returns when the host's memory may be changed again."""
    if host.size:
        whole = array if array.flags.c_contiguous else cupy.empty(array.shape, array.dtype)
        whole.reshape(-1).view(np.uint8).set(host.reshape(-1).view(np.uint8))
        if whole is not array:
            array[...] = whole
        cupy.cuda.get_current_stream().synchronize()
    return array
