"""Arrays on GPUs, streams and events, made of NumPy: the part of `fake_cupy.py` below its NCCL.

    rank (thread) ── use(gpu) ──►  arrays in the memory of that GPU; pointers are looked up among living allocations

Streams are lazy where it matters: what is given to a stream other than the null stream runs when somebody waits for it
(an event, `synchronize`, a copy to the host), so a missing wait shows as missing data.
"""

import bisect
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

TYPES = dict(enumerate(["i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]))
DTYPES = {code: np.dtype(word) for code, word in TYPES.items()} | {9: np.dtype(ml_dtypes.bfloat16)}
OPS = [np.add, np.multiply, np.maximum, np.minimum]
local = threading.local()
starts: list[int] = []  # of all living allocations, ascending
allocations: "weakref.WeakValueDictionary[int, _Allocation]" = weakref.WeakValueDictionary()  # start -> itself
lock = threading.RLock()  # an allocation may die anywhere


def use(gpu: int) -> None:
    """The calling thread is a rank whose current GPU is this one."""
    local.gpu, local.stream, local.group = gpu, Stream.null, None


class _Allocation:
    def __init__(self, octets: Any) -> None:
        self.octets, self.gpu = octets, local.gpu
        self.start = octets.__array_interface__["data"][0]
        with lock:
            bisect.insort(starts, self.start)
            allocations[self.start] = self
            weakref.finalize(self, _forget, self.start).atexit = False


def _forget(start: int) -> None:
    with lock:
        del starts[bisect.bisect_left(starts, start)]


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
        assert isinstance(value, ndarray | int | float | complex), "only CuPy arrays and numbers can be assigned"
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
        local.stream.synchronize()
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
    local.stream.synchronize()
    return array._values.copy()


def ascontiguousarray(array: ndarray) -> ndarray:
    return array if array.flags.c_contiguous else array.copy()


def ufunc(function: Any) -> Callable[..., ndarray]:
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
        self._before.append(local.stream)
        local.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        local.stream = self._before.pop()

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
    stream: Stream = local.stream
    return stream


def _launch(run: Callable[[], None]) -> None:
    get_current_stream().give(run)


class Device:
    def __init__(self) -> None:
        self.id = local.gpu
        self.pci_bus_id = f"0000:{local.gpu:02x}:00.0"


def alloc_pinned_memory(nbytes: int) -> Any:
    assert type(nbytes) is int and nbytes > 0
    return memoryview(bytearray(-(-nbytes // 512) * 512))  # longer than asked for, as the real ones are
