"""CuPy arrays, continued: scans, the non-blocking twins, and messages between two ranks.

    NCCL      what the call does, enqueued on a stream of its own; `wait` lets the current stream wait for its event
    staged    a copy in pinned memory, the twin for NumPy arrays on it; `wait` brings the result to the GPU

Messages (`send`, `recv`) always go through host memory: NCCL pairs them by their order alone, it knows no tags.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.collectives import volumes
from dtrain.collectives.call import Call
from dtrain.collectives.device import DeviceCollectives
from dtrain.collectives.dtypes import neutral, operation
from dtrain.collectives.work import Request, Work

if TYPE_CHECKING:
    from dtrain.collectives.messages import Messages


class Device(DeviceCollectives):
    """What one communicator does with CuPy arrays."""

    def scan(self, array: Any, op: str, out: Any, algorithm: Any, inclusive: bool) -> Any:
        """As `Communicator.scan`, or `exscan`: NCCL has none, so always a schedule."""
        operation(op, np.dtype(array.dtype))
        name = "scan" if inclusive else "exscan"
        result = self._destination(out, array.shape, array.dtype)
        if self.hindrance is not None:
            host = self._nccl.to_host(array)
            return self._nccl.to_gpu(getattr(self._comm, name)(host, op, host, algorithm), result)
        source, target = self._pair(array, result, 0)
        call = Call(self._comm.transport, None, source, target, op)
        self._run(name, algorithm, call, None, "doubling", source.size, volumes.least_scan)
        if self._comm.rank == 0 and not inclusive:
            dtype = np.dtype(array.dtype)
            target[...] = np.asarray(neutral(op, dtype), dtype).item()
        return self._deliver(target, result)

    def scan_async(self, array: Any, op: str, out: Any, inclusive: bool) -> Work:
        """As `Communicator.scan_async`, or `exscan_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.scan(array, op, out, "auto", inclusive), array, out)
        result, host = self._destination(out, array.shape, array.dtype), self._nccl.to_host(array)
        start = self._comm.scan_async if inclusive else self._comm.exscan_async
        return self._later(start(host, op, host), lambda: result)

    def all_reduce_async(self, array: Any, op: str, out: Any) -> Work:
        """As `Communicator.all_reduce_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.all_reduce(array, op, out, "auto"), array, out)
        result = self._destination(out, array.shape, array.dtype)
        host = self._nccl.to_host(array)
        return self._later(self._comm.all_reduce_async(host, op, host), lambda: result)

    def reduce_scatter_async(self, array: Any, op: str, out: Any, counts: Sequence[int] | None) -> Work:
        """As `Communicator.reduce_scatter_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.reduce_scatter(array, op, out, "auto", counts), array, out)
        work = self._comm.reduce_scatter_async(self._nccl.to_host(array), op, counts=counts)
        return self._later_new(work, out, array.dtype)

    def all_gather_async(self, array: Any, out: Any, counts: Sequence[int] | None) -> Work:
        """As `Communicator.all_gather_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.all_gather(array, out, counts, "auto"), array, out)
        return self._later_new(self._comm.all_gather_async(self._nccl.to_host(array), None, counts), out, array.dtype)

    def all_to_all_async(
        self, array: Any, out: Any, counts: Sequence[int] | None, out_counts: Sequence[int] | None
    ) -> Work:
        """As `Communicator.all_to_all_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.all_to_all(array, out, counts, out_counts, "auto"), array, out)
        work = self._comm.all_to_all_async(self._nccl.to_host(array), None, counts, out_counts)
        return self._later_new(work, out, array.dtype)

    def broadcast_async(self, array: Any, root: int, out: Any) -> Work:
        """As `Communicator.broadcast_async`."""
        if self.hindrance is None:
            return self._start(lambda: self.broadcast(array, root, out, "auto"), array, out)
        result = self._destination(out, array.shape, array.dtype)
        host = self._nccl.to_host(array)
        return self._later(self._comm.broadcast_async(host, root, host), lambda: result)

    def reduce_async(self, array: Any, op: str, root: int, out: Any) -> Work:
        """As `Communicator.reduce_async`."""
        if self.hindrance is None:
            return self._start(lambda: self._or_nothing(self.reduce(array, op, root, out, "auto"), array), array, out)
        return self._later_new(self._comm.reduce_async(self._nccl.to_host(array), op, root), out, array.dtype)

    def gather_async(self, array: Any, root: int, out: Any, counts: Sequence[int] | None) -> Work:
        """As `Communicator.gather_async`."""
        if self.hindrance is None:
            run = lambda: self._or_nothing(self.gather(array, root, out, counts, "auto"), array)  # noqa: E731
            return self._start(run, array, out)
        work = self._comm.gather_async(self._nccl.to_host(array), root, None, counts)
        return self._later_new(work, out, array.dtype)

    def scatter_async(self, array: Any, root: int, out: Any, form: Sequence[Any]) -> Work:
        """As `Communicator.scatter_async`; form: see `scatter`."""
        if self.hindrance is None:
            return self._start(lambda: self.scatter(array, root, out, form), array, out)
        result = self.scatter(array, root, out, form)  # host to host; it could only be deferred there
        return Work(None, lambda: result)

    def _start(self, run: Callable[[], Any], *arrays: Any) -> Work:
        if self._connection is None:
            result = run()
            return Work(None, lambda: result)
        return self._connection.start(run, *arrays)

    def _later(self, work: Work, result: Callable[[], Any]) -> Work:
        return Work(Hosted(work), lambda: self._nccl.to_gpu(work.wait(), result()))

    def _later_new(self, work: Work, out: Any, dtype: Any) -> Work:
        """The result's shape is known from the host's at the wait; `out` is held against it then."""

        def result() -> Any:
            host = work.wait()
            # Where only root gets something, the others' result is empty and their `out` left alone.
            return self._destination(None if host.size == 0 else out, host.shape, np.dtype(dtype))

        return self._later(work, result)

    def _or_nothing(self, result: Any, array: Any) -> Any:
        return self._nccl.empty((0,), array.dtype) if result is None else result


class Hosted(Request):
    """The work on the host behind one on the GPU."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def test(self) -> bool:
        return self._work.done()

    def wait(self) -> None:
        self._work.wait()


def send_async(comm: "Messages", array: Any, destination: int, tag: int) -> Work:
    """`Communicator.send_async` of a copy in host memory."""
    from dtrain.collectives import nccl

    sending = comm.send_async(nccl.to_host(array), destination, tag)
    return Work(Hosted(sending), lambda: array)


def recv_async(comm: "Messages", out: Any, source: int, tag: int) -> Work:
    """`Communicator.recv_async` into host memory; the GPU gets it at the wait."""
    from dtrain.collectives import nccl

    receiving = comm.recv_async(nccl.pinned(out.shape, np.dtype(out.dtype)), source, tag)
    return Work(Hosted(receiving), lambda: nccl.to_gpu(receiving.wait(), out))
