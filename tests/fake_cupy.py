"""A `cupy` with NCCL made of NumPy and threads: what dtrain uses of both, as strict as the real ones and stricter.

    rank (thread) ── use(gpu) ──►  arrays in the memory of that GPU, streams, events
                                   NCCL: every call is compared with those of the other ranks, then done

Streams are lazy where it matters: what is given to a stream other than the null stream runs when somebody waits for it
(an event, `synchronize`, a copy to the host), so a missing wait shows as missing data. Refused with an error, where the
real thing would hang, crash or deliver rubbish: pointers outside of an allocation or on another GPU, counts, types and
roots that differ, buffers that overlap otherwise than NCCL allows, messages that nobody receives, unknown streams,
arrays where NumPy arrays are expected, numbers that are no ints.
"""

import bisect
import itertools
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

WAIT = 20.0
TYPES = dict(enumerate(["i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]))
DTYPES = {code: np.dtype(word) for code, word in TYPES.items()} | {9: np.dtype(ml_dtypes.bfloat16)}
OPS = [np.add, np.multiply, np.maximum, np.minimum]
_local = threading.local()
_starts: list[int] = []  # of all living allocations, ascending
_allocations: "weakref.WeakValueDictionary[int, _Allocation]" = weakref.WeakValueDictionary()  # start -> itself
_lock = threading.RLock()  # an allocation may die anywhere


def use(gpu: int) -> None:
    """The calling thread is a rank whose current GPU is this one."""
    _local.gpu, _local.stream, _local.group = gpu, Stream.null, None


class _Allocation:
    def __init__(self, octets: Any) -> None:
        self.octets, self.gpu = octets, _local.gpu
        self.start = octets.__array_interface__["data"][0]
        with _lock:
            bisect.insort(_starts, self.start)
            _allocations[self.start] = self
            weakref.finalize(self, _forget, self.start).atexit = False


def _forget(start: int) -> None:
    with _lock:
        del _starts[bisect.bisect_left(_starts, start)]


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class ndarray:
    def __init__(self, values: Any, home: _Allocation) -> None:
        self._values, self._home = values, home

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    flags = property(lambda self: self._values.flags)
    data = property(lambda self: _Pointer(self._values.__array_interface__["data"][0]))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self._values[key], self._home)

    def __setitem__(self, key: Any, value: Any) -> None:
        assert isinstance(value, ndarray | int | float), "only CuPy arrays and numbers can be assigned"
        into, value = self._values, value._values if isinstance(value, ndarray) else value
        _launch(lambda: into.__setitem__(key, value))

    def reshape(self, *shape: Any) -> "ndarray":
        view = self._values.reshape(*shape)
        assert view.size == 0 or np.shares_memory(view, self._values), "only views are needed"
        return ndarray(view, self._home)

    def view(self, dtype: Any) -> "ndarray":
        return ndarray(self._values.view(dtype), self._home)

    def copy(self) -> "ndarray":
        return self.astype(self.dtype)

    def astype(self, dtype: Any) -> "ndarray":
        result = empty(self.shape, dtype)
        result[...] = self
        return result

    def get(self, out: Any) -> Any:
        """Blocking: behind everything on the current stream."""
        assert type(out) is np.ndarray and out.shape == self.shape and out.dtype == self.dtype
        assert out.flags.c_contiguous
        _local.stream.synchronize()
        np.copyto(out, self._values)
        return out

    def set(self, values: Any) -> None:
        """Later, on the current stream: the host's memory must stay until then."""
        assert type(values) is np.ndarray and values.shape == self.shape and values.dtype == self.dtype
        into = self._values
        _launch(lambda: np.copyto(into, values))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    dtype = np.dtype(dtype)
    octets = np.full(max(1, int(np.prod(shape)) * dtype.itemsize), 0xA5, np.uint8)  # nobody may count on zeros
    count = int(np.prod(shape)) * dtype.itemsize
    return ndarray(octets[:count].view(dtype).reshape(shape), _Allocation(octets))


def asarray(values: Any, dtype: Any = None) -> ndarray:
    """For tests: an array on the current GPU, of any layout."""
    values = np.asarray(values, dtype)
    octets = np.empty(max(1, values.nbytes), np.uint8)
    home = _Allocation(octets)
    order = sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))
    whole = octets[: values.nbytes].view(values.dtype).reshape([values.shape[axis] for axis in order])
    result = whole.transpose(np.argsort(order)) if values.ndim else whole.reshape(())
    result[...] = values
    return ndarray(result, home)


def asnumpy(array: ndarray) -> Any:
    _local.stream.synchronize()
    return array._values.copy()


def ascontiguousarray(array: ndarray) -> ndarray:
    return array if array.flags.c_contiguous else array.copy()


def _ufunc(function: Any) -> Callable[..., ndarray]:
    def apply(one: ndarray, other: ndarray, out: ndarray | None = None) -> ndarray:
        assert isinstance(one, ndarray) and isinstance(other, ndarray)
        result = empty(one.shape, np.result_type(one.dtype, other.dtype)) if out is None else out
        x, y, into = one._values, other._values, result._values

        def run() -> None:
            with np.errstate(all="ignore"):
                function(x, y, out=into)

        _launch(run)
        return result

    return apply


# Streams and events


class Stream:
    null: "Stream"
    known: ClassVar[dict[int, "Stream"]] = {}

    def __init__(self, non_blocking: bool = False, lazy: bool = True) -> None:
        self._work: list[Callable[[], None]] = []
        self._lazy, self.ptr = lazy, 1000 + len(Stream.known) if lazy else 0
        Stream.known[self.ptr] = self
        self._before: list[Stream] = []

    def __enter__(self) -> "Stream":
        self._before.append(_local.stream)
        _local.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        _local.stream = self._before.pop()

    def give(self, run: Callable[[], None]) -> None:
        if self._lazy:
            self._work.append(run)
        else:
            run()

    def synchronize(self) -> None:
        while self._work:
            self._work.pop(0)()

    def record(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.stream, event.passed = self, False
        self.give(event.pass_)
        return event

    def wait_event(self, event: "Event") -> None:
        self.give(event.synchronize)


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.passed = True

    def pass_(self) -> None:
        self.passed = True

    done = property(lambda self: self.passed)

    def synchronize(self) -> None:
        while not self.passed:
            assert self.stream is not None
            self.stream._work.pop(0)()


Stream.null = Stream(lazy=False)


def get_current_stream() -> Stream:
    stream: Stream = _local.stream
    return stream


def _launch(run: Callable[[], None]) -> None:
    get_current_stream().give(run)


class Device:
    def __init__(self) -> None:
        self.id = _local.gpu
        self.pci_bus_id = f"0000:{_local.gpu:02x}:00.0"


def alloc_pinned_memory(nbytes: int) -> Any:
    assert type(nbytes) is int and nbytes > 0
    return memoryview(bytearray(-(-nbytes // 512) * 512))  # longer than asked for, as the real ones are


# NCCL


class NcclError(RuntimeError):
    pass


class _Room:
    """What the ranks of one NCCL communicator share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.table: list[Any] = [None] * size
        # All of them now: two threads that ask a defaultdict for a missing one at the same time may get two.
        self.mail: dict[tuple[int, int], queue.Queue[Any]] = {
            pair: queue.Queue() for pair in itertools.product(range(size), repeat=2)
        }
        self.gpus: set[int] = set()
        self.ranks: set[int] = set()


_rooms: dict[tuple[int, ...], _Room] = {}


def get_version() -> int:
    return 21903


def get_unique_id() -> tuple[int, ...]:
    with _lock:
        number = len(_rooms) + 1
        name = tuple([-128, 127, number % 100, number // 100] + [0] * 124)
        _rooms[name] = None  # type: ignore[assignment]
    return name


def groupStart() -> None:
    if _local.group is not None:
        raise NcclError("groups are not nested here")
    _local.group = []


def groupEnd() -> None:
    group, _local.group = _local.group, None
    if group is None:
        raise NcclError("groupEnd without groupStart")
    if group:
        communicators = {id(entry[0]) for entry in group}
        streams = {entry[-1] for entry in group}
        if len(communicators) > 1 or len(streams) > 1:
            raise NcclError("one communicator and one stream per group are enough here")
        entries = [entry[1:-1] for entry in group]
        Stream.known[streams.pop()].give(lambda: group[0][0]._messages(entries))


class NcclCommunicator:
    def __init__(self, ndev: int, commId: tuple[int, ...], rank: int) -> None:
        assert type(ndev) is int and type(rank) is int and type(commId) is tuple and len(commId) == 128
        if commId not in _rooms:
            raise NcclError("no such unique id")
        with _lock:
            room = _rooms[commId] = _rooms[commId] or _Room(ndev)
            if room.size != ndev or rank in room.ranks or not 0 <= rank < ndev:
                raise NcclError(f"rank {rank} of {ndev}: there are {room.ranks} of {room.size} already")
            if _local.gpu in room.gpus:
                raise NcclError(f"Duplicate GPU detected: rank {rank} on GPU {_local.gpu}")
            room.ranks.add(rank)
            room.gpus.add(_local.gpu)
        self._room, self._rank, self._gpu = room, rank, _local.gpu
        self._alive = True
        room.barrier.wait(WAIT)

    def destroy(self) -> None:
        self._alive = False

    # Collectives: (name, what must be equal on all ranks), my memory, what to do with the memory of all

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, op, stream)
        source, target = self._memory(sendbuf, count, datatype), self._memory(recvbuf, count, datatype)
        _disjoint_or(source, target, sendbuf == recvbuf)
        total = lambda all_: _sum(op, all_)  # noqa: E731
        self._give(stream, ("allReduce", count, datatype, op), source, target, total)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, op, root, stream)
        source = self._memory(sendbuf, count, datatype)
        target = self._memory(recvbuf, count, datatype) if self._rank == root else None
        if target is not None:
            _disjoint_or(source, target, sendbuf == recvbuf)
        total = lambda all_: _sum(op, all_)  # noqa: E731
        self._give(stream, ("reduce", count, datatype, op, root), source, target, total)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, recvcount, datatype, op, stream)
        source = self._memory(sendbuf, recvcount * self._room.size, datatype)
        target = self._memory(recvbuf, recvcount, datatype)
        mine = slice(self._rank * recvcount, (self._rank + 1) * recvcount)
        _disjoint_or(source, target, recvbuf == sendbuf + self._rank * target.nbytes)
        total = lambda all_: _sum(op, all_)[mine]  # noqa: E731
        self._give(stream, ("reduceScatter", recvcount, datatype, op), source, target, total)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._check(sendbuff, recvbuff, count, datatype, root, stream)
        source = self._memory(sendbuff, count, datatype) if self._rank == root else None
        target = self._memory(recvbuff, count, datatype)
        self._give(stream, ("broadcast", count, datatype, root), source, target, lambda all_: all_[root])

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._check(sendbuf, recvbuf, count, datatype, stream)
        source = self._memory(sendbuf, count, datatype)
        target = self._memory(recvbuf, count * self._room.size, datatype)
        _disjoint_or(source, target, sendbuf == recvbuf + self._rank * source.nbytes)
        self._give(stream, ("allGather", count, datatype), source, target, np.concatenate)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._message("send", sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._message("recv", recvbuf, count, datatype, peer, stream)

    def _message(self, kind: str, at: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._check(at, count, datatype, peer, stream)
        if peer == self._rank or not 0 <= peer < self._room.size or not count:
            raise NcclError(f"{kind} of {count} elements between {self._rank} and {peer}")
        entry = (kind, self._memory(at, count, datatype), datatype, peer)
        if _local.group is not None:
            _local.group.append((self, *entry, stream))
        else:
            Stream.known[stream].give(lambda: self._messages([entry]))

    def _messages(self, entries: list[Any]) -> None:
        leaving = [memory for kind, memory, *_ in entries if kind == "send"]
        landing = [memory for kind, memory, *_ in entries if kind == "recv"]
        for position, target in enumerate(landing):
            if any(np.shares_memory(target, other) for other in leaving + landing[:position]):
                raise NcclError("a message lands where another one of its group is")
        received = []
        for kind, memory, datatype, peer in entries:
            if kind == "send":
                taken = threading.Event()
                received.append(taken)
                self._room.mail[self._rank, peer].put((memory.copy(), datatype, taken))
        for kind, memory, datatype, peer in entries:
            if kind == "recv":
                content, other, taken = self._room.mail[peer, self._rank].get(timeout=WAIT)
                if other != datatype or len(content) != len(memory):
                    raise NcclError(f"{len(content)} elements of type {other} come, {len(memory)} of {datatype} wanted")
                np.copyto(memory, content)
                taken.set()
        if not all(taken.wait(WAIT) for taken in received):
            raise NcclError("a message that nobody receives")

    def _give(self, stream: int, same: Any, source: Any, target: Any, use_all: Callable[[Any], Any]) -> None:
        def run() -> None:
            room = self._room
            room.table[self._rank] = (same, source)
            room.barrier.wait(WAIT)
            words = {entry[0] for entry in room.table}
            result = use_all([entry[1] for entry in room.table]).copy() if len(words) == 1 else None
            room.barrier.wait(WAIT)
            if result is None:
                raise NcclError(f"the ranks do not do the same: {words}")
            if target is not None:
                np.copyto(target, result)

        Stream.known[stream].give(run)

    def _check(self, *numbers: Any) -> None:
        if not all(type(number) is int for number in numbers):
            raise TypeError(f"{numbers}: only ints")
        if not self._alive:
            raise NcclError("the communicator was destroyed")
        if _local.gpu != self._gpu:
            raise NcclError("another GPU is current than the one the communicator was made on")
        if numbers[-1] not in Stream.known:
            raise NcclError(f"no stream {numbers[-1]}")

    def _memory(self, at: int, count: int, datatype: int) -> Any:
        dtype = DTYPES[datatype]
        nbytes = count * dtype.itemsize
        with _lock:
            position = bisect.bisect_right(_starts, at) - 1
            home = _allocations.get(_starts[position]) if position >= 0 else None
        if home is not None and at + nbytes <= home.start + len(home.octets):
            if home.gpu != self._gpu:
                raise NcclError(f"memory of GPU {home.gpu}, the communicator is on {self._gpu}")
            return home.octets[at - home.start : at - home.start + nbytes].view(dtype)
        raise NcclError(f"{nbytes} bytes at {at}: outside of every allocation")


def _sum(op: int, arrays: list[Any]) -> Any:
    total = arrays[0].copy()
    with np.errstate(all="ignore"):
        for array in arrays[1:]:
            total = OPS[op](total, array)
    return total


def _disjoint_or(source: Any, target: Any, allowed: bool) -> None:
    if np.shares_memory(source, target) and not allowed:
        raise NcclError("the buffers overlap, and not as NCCL allows")


def _modules() -> dict[str, ModuleType]:
    root, cuda, nccl = ModuleType("cupy"), ModuleType("cupy.cuda"), ModuleType("cupy.cuda.nccl")
    here = globals()
    for name in ("ndarray", "empty", "asarray", "asnumpy", "ascontiguousarray"):
        setattr(root, name, here[name])
    for name, function in {"add": 0, "multiply": 1, "maximum": 2, "minimum": 3}.items():
        setattr(root, name, _ufunc(OPS[function]))
    for name in ("Stream", "Event", "Device", "get_current_stream", "alloc_pinned_memory"):
        setattr(cuda, name, here[name])
    for name in ("NcclCommunicator", "NcclError", "get_unique_id", "get_version", "groupStart", "groupEnd"):
        setattr(nccl, name, here[name])
    names = ["INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64"]
    for code, name in enumerate(names):
        setattr(nccl, f"NCCL_{name}", code)
    for code, name in enumerate(["SUM", "PROD", "MAX", "MIN"]):
        setattr(nccl, f"NCCL_{name}", code)
    cuda.is_available = lambda: True  # type: ignore[attr-defined]
    cuda.runtime = ModuleType("cupy.cuda.runtime")  # type: ignore[attr-defined]
    cuda.runtime.getDeviceCount = lambda: 2
    cuda.runtime.getDeviceProperties = lambda number: {"name": b"Fake GPU", "totalGlobalMem": 80 << 30}
    nccl.available = True  # type: ignore[attr-defined]
    root.__version__ = "13.0-fake"  # type: ignore[attr-defined]
    root.cuda, cuda.nccl = cuda, nccl  # type: ignore[attr-defined]
    return {"cupy": root, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl}


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`import cupy` gives this module; afterwards as before."""
    import dtrain.collectives

    ours = "dtrain.collectives.nccl"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, ours, raising=False)
        patch.delattr(dtrain.collectives, "nccl", raising=False)
        yield sys.modules["cupy"]
        sys.modules.pop(ours, None)
        vars(dtrain.collectives).pop("nccl", None)
