"""The collectives on CuPy arrays: over NCCL where every rank has a GPU of its own, else through pinned host memory.

    comm.all_reduce(cupy array) ─► comm.gpu ─┬─ NCCL's own
                                             ├─ a schedule of the catalogue over NCCL's messages
                                             └─ GPU ─► pinned memory ─► the collective for NumPy arrays ─► GPU

Arrays and `out=` follow the rules for NumPy arrays, results are CuPy arrays. A call returns when its work is enqueued
on the current CuPy stream, as every function of CuPy does; the staged ways wait for the stream. Which of the two it
is, all ranks find out together at the first collective of a communicator; rank 0 says in one line why NCCL is not used.
float16 and bfloat16 are added by NCCL in their own precision; ask for a schedule (`algorithm="ring"`) for sums in
float32. CuPy is not looked for, and nothing paid, where all arrays are NumPy's.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.collectives import volumes
from dtrain.collectives.call import Call
from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import dtype_from_name, operation
from dtrain.collectives.forms import check_rank, elements, rows_brought, rows_per_rank

if TYPE_CHECKING:
    from dtrain.collectives.choices import Own
    from dtrain.collectives.communicator import Communicator
    from dtrain.collectives.nccl import Connection

NCCL = "nccl"  # among the names of algorithms
ON_GPU = "gpu"  # where root's array of a scatter lies


def on_gpu(array: object) -> bool:
    """Whether this is a CuPy array. Ask only after `type(array) is not np.ndarray`: that is free, this is not quite."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
    """A new CuPy array of undefined content on the current GPU."""
    from dtrain.collectives import nccl

    return nccl.empty(shape, dtype)


_said: set[str] = set()  # one line per process is enough


class DeviceCollectives:
    """What one communicator does with CuPy arrays."""

    def __init__(self, comm: "Communicator") -> None:
        """Collective."""
        from dtrain.collectives import nccl

        self._comm = comm
        self._nccl = nccl
        self._connection: Connection | None = None
        self.hindrance = nccl.hindrance(comm) if comm.size > 1 else None
        if comm.size > 1 and self.hindrance is None:
            self._connection = nccl.Connection(comm)
        elif self.hindrance is not None and comm.rank == 0 and not _said:
            _said.add(self.hindrance)
            print(f"dtrain: CuPy arrays travel through host memory: {self.hindrance}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Collective: give NCCL's communicator back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def all_reduce(self, array: Any, op: str, out: Any, algorithm: Any) -> Any:
        """As `Communicator.all_reduce`."""
        how, result = self._reduction(array, op), self._destination(out, array.shape, array.dtype)
        if self.hindrance is not None:
            host = self._nccl.to_host(array)
            return self._nccl.to_gpu(self._comm.all_reduce(host, op, host, algorithm), result)
        source, target = self._pair(array, result, 0)
        own = how and (lambda nccl: nccl.all_reduce(source, target, how))
        call = Call(self._comm.transport, None, source, target, op)
        self._run("all_reduce", algorithm, call, own, "ring", source.size, volumes.least_all_reduce)
        return self._deliver(target, result)

    def reduce_scatter(self, array: Any, op: str, out: Any, algorithm: Any, counts: Sequence[int] | None) -> Any:
        """As `Communicator.reduce_scatter`."""
        array = as_rows(array)
        how = self._reduction(array, op)
        rows = rows_per_rank("counts", counts, len(array), self._comm.size)
        result = self._destination(out, (rows[self._comm.rank], *array.shape[1:]), array.dtype)
        if self.hindrance is not None:
            run = lambda host, into: self._comm.reduce_scatter(host, op, into, algorithm, rows)  # noqa: E731
            return self._through_host(run, array, result)
        lengths = elements(rows, array.shape)
        source, target = self._pair(array, result, -sum(lengths[: self._comm.rank]))
        own = how and len(set(lengths)) == 1 and (lambda nccl: nccl.reduce_scatter(source, target, how))
        call = Call(self._comm.transport, None, source, target, op, lengths)
        self._run("reduce_scatter", algorithm, call, own or None, "ring", lengths, volumes.least_reduce_scatter)
        return self._deliver(target, result)

    def reduce(self, array: Any, op: str, root: int, out: Any, algorithm: Any) -> Any:
        """As `Communicator.reduce`."""
        how = self._reduction(array, op)
        check_rank("root", root, self._comm.size)
        at_root = self._comm.rank == root
        result = self._destination(out, array.shape, array.dtype) if at_root else None
        if self.hindrance is not None:
            host = self._nccl.to_host(array)
            total = self._comm.reduce(host, op, root, host if at_root else None, algorithm)
            return None if total is None else self._nccl.to_gpu(total, result)
        source, target = self._pair(array, result, 0)
        own = how and (lambda nccl: nccl.reduce(source, target if at_root else source, how, root))
        call = Call(self._comm.transport, None, source, target, op, root=root)
        self._run("reduce", algorithm, call, own, "binomial", source.size, volumes.least_reduce)
        return self._deliver(target, result) if at_root else None

    def all_gather(self, array: Any, out: Any, counts: Sequence[int] | None, algorithm: Any) -> Any:
        """As `Communicator.all_gather`."""
        array = as_rows(array)
        rows = rows_brought(array, counts, self._comm.rank, self._comm.size)
        result = self._destination(out, (sum(rows), *array.shape[1:]), array.dtype)
        if self.hindrance is not None:
            run = lambda host, into: self._comm.all_gather(host, into, rows, algorithm)  # noqa: E731
            return self._through_host(run, array, result)
        lengths = elements(rows, array.shape)
        source, target = self._pair(array, result, sum(lengths[: self._comm.rank]))
        own = (lambda nccl: nccl.all_gather(source, target)) if len(set(lengths)) == 1 else None
        call = Call(self._comm.transport, None, source, target, counts=lengths)
        self._run("all_gather", algorithm, call, own, "direct", lengths, volumes.least_all_gather)
        return self._deliver(target, result)

    def all_to_all(
        self, array: Any, out: Any, counts: Sequence[int] | None, out_counts: Sequence[int] | None, algorithm: Any
    ) -> Any:
        """As `Communicator.all_to_all`."""
        comm, array = self._comm, as_rows(array)
        rows = rows_per_rank("counts", counts, len(array), comm.size)
        if out_counts is not None:
            received = rows_per_rank("out_counts", out_counts, None, comm.size)
        elif counts is None:
            received = [rows[comm.rank]] * comm.size
        else:
            received = comm.all_to_all(np.array(rows, np.int64)).tolist()
        result = self._destination(out, (sum(received), *array.shape[1:]), array.dtype)
        alike = counts is None and out_counts is None
        if self.hindrance is not None:
            mine, theirs = (None, None) if alike else (rows, received)
            run = lambda host, into: comm.all_to_all(host, into, mine, theirs, algorithm)  # noqa: E731
            return self._through_host(run, array, result)
        source, target = self._pair(array, result)
        lengths, incoming = elements(rows, array.shape), elements(received, array.shape)
        call = Call(comm.transport, None, source, target, counts=lengths, out_counts=incoming)

        def own(nccl: "Connection") -> None:
            sends, receives = _blocks(source, lengths), _blocks(target, incoming)
            receives[comm.rank][...] = sends[comm.rank]
            others = [(comm.rank + shift) % comm.size for shift in range(1, comm.size)]
            nccl.exchange([(peer, sends[peer]) for peer in others], [(peer, receives[peer]) for peer in others])

        # Where this rank does not know the counts of the others: NCCL's own, even if it has nothing to move itself.
        everyone = [lengths] * comm.size if alike else None
        empty = alike and not source.size
        self._run("all_to_all", algorithm, call, own, "", everyone, volumes.all_to_all, empty=empty)
        return self._deliver(target, result)

    def broadcast(self, array: Any, root: int, out: Any, algorithm: Any) -> Any:
        """As `Communicator.broadcast`."""
        check_rank("root", root, self._comm.size)
        result = self._destination(out, array.shape, array.dtype)
        at_root = self._comm.rank == root
        if self.hindrance is not None:
            shape = result.shape
            host = self._nccl.to_host(array) if at_root else self._nccl.pinned(shape, np.dtype(result.dtype))
            return self._nccl.to_gpu(self._comm.broadcast(host, root, host, algorithm), result)
        target = self._target(result)
        if at_root:
            source, target = self._pair(array, result, 0)
            if source is not target:
                target[...] = source
        call = Call(self._comm.transport, None, target, target, root=root)
        own = lambda nccl: nccl.broadcast(target, root)  # noqa: E731
        self._run("broadcast", algorithm, call, own, "binomial", target.size, volumes.least_broadcast)
        return self._deliver(target, result)

    def gather(self, array: Any, root: int, out: Any, counts: Sequence[int] | None, algorithm: Any) -> Any:
        """As `Communicator.gather`."""
        array = as_rows(array)
        check_rank("root", root, self._comm.size)
        rows = rows_brought(array, counts, self._comm.rank, self._comm.size)
        at_root = self._comm.rank == root
        result = self._destination(out, (sum(rows), *array.shape[1:]), array.dtype) if at_root else None
        if self.hindrance is not None:
            host = self._nccl.to_host(array)
            into = None if result is None else self._nccl.pinned(result.shape, np.dtype(result.dtype))
            whole = self._comm.gather(host, root, into, rows, algorithm)
            return None if whole is None else self._nccl.to_gpu(whole, result)
        lengths = elements(rows, array.shape)
        source, target = self._pair(array, result, sum(lengths[: self._comm.rank]))
        call = Call(self._comm.transport, None, source, target, counts=lengths, root=root)
        empty = not sum(lengths)
        self._run("gather", algorithm, call, None, "direct", lengths, volumes.least_gather, empty)
        return self._deliver(target, result) if at_root else None

    def scatter(self, array: Any, root: int, out: Any, form: Sequence[Any]) -> Any:
        """My rows of root's array; form: the rows of all ranks, the shape of one, the dtype's name, as root told."""
        rows, width, dtype = form[0], form[1], dtype_from_name(form[2])
        result = self._destination(out, (rows[self._comm.rank], *width), dtype)
        at_root = self._comm.rank == root
        if self.hindrance is not None:
            host = self._nccl.to_host(array) if at_root else None
            into = self._nccl.pinned(result.shape, dtype)
            return self._nccl.to_gpu(self._comm.scatter(host, root, into, rows), result)
        lengths = elements(rows, (0, *width))
        given = as_rows(array) if at_root else self._nccl.empty((0,), dtype)
        source, target = self._pair(given, result)
        call = Call(self._comm.transport, None, source, target, counts=lengths, root=root)
        empty = not sum(lengths)
        self._run("scatter", "auto", call, None, "direct", lengths, volumes.least_scatter, empty)
        return self._deliver(target, result)

    # How a call is done

    def _run(
        self,
        collective: str,
        algorithm: "str | Own",
        call: Call,
        own: "Callable[[Connection], None] | None",
        default: str,
        counts: Any,
        volume: Callable[[Call], Volume],
        empty: bool | None = None,
    ) -> None:
        """NCCL's own way if there is one and no other was asked for, else a schedule (counts None: there is none)."""
        from dtrain.collectives import choices, device_schedules
        from dtrain.collectives.schedules.catalogue import ALGORITHMS

        table = ALGORITHMS[collective] if counts is not None else {}
        possible = [name for name, row in table.items() if row.sizes(self._comm.size)]
        if isinstance(algorithm, str) and algorithm.partition(":")[0] not in ("auto", own and NCCL, *possible):
            allowed = ", ".join(["auto", *([NCCL] if own else []), *possible])
            raise ValueError(
                f"algorithm={algorithm!r}: not possible for {call.op or collective} of {call.source.dtype} on "
                f"{self._comm.size} GPUs; allowed: {allowed}"
            )
        if (not (call.source.size or call.target.size)) if empty is None else empty:
            return
        connection = self._connection
        if connection is None:  # one rank
            if call.target is not call.source:
                call.target[...] = call.source
            return
        nbytes = max(int(call.source.nbytes), int(call.target.nbytes))
        if own is not None and isinstance(algorithm, str) and algorithm in ("auto", NCCL):
            own(connection)
            self._comm.counters.add(collective, NCCL, nbytes, volume(call))
            return
        choice = choices.find(collective, default if algorithm == "auto" else algorithm)
        schedule = self._comm._messages().schedule(call, choice)
        source = call.source
        if collective == "broadcast" and not call.at_root:
            source = source[:0]  # what a schedule is given lies on root alone
        ufunc = self._nccl.UFUNCS[call.op or "sum"]
        cost = device_schedules.execute(connection, schedule, source, call.target, counts, ufunc, self._nccl.empty)
        self._comm.counters.add(collective, choice.text, nbytes, cost)

    def _through_host(self, run: Callable[[Any, Any], Any], array: Any, result: Any) -> Any:
        into = self._nccl.pinned(result.shape, np.dtype(result.dtype))
        return self._nccl.to_gpu(run(self._nccl.to_host(array), into), result)

    # Arrays

    def _reduction(self, array: Any, op: str) -> Any:
        """NCCL's words for it, if it has any, after a check."""
        operation(op, np.dtype(array.dtype))
        return self._nccl.reduction(np.dtype(array.dtype), op) if self._connection is not None else None

    def _destination(self, out: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """`out` after a check, or a new array on the GPU."""
        if out is None:
            return self._nccl.empty(shape, dtype)
        if not on_gpu(out):
            kind = f"{type(out).__module__}.{type(out).__name__}"
            raise ValueError(f"out is a {kind}; allowed: a CuPy array of shape {shape} and dtype {dtype}, as the input")
        if out.shape != shape:
            raise ValueError(f"out has shape {out.shape}; allowed: {shape}")
        if out.dtype != dtype:
            raise ValueError(f"out has dtype {out.dtype}; allowed: {dtype}")
        return out

    def _pair(self, array: Any, result: Any, own: int | None = None) -> tuple[Any, Any]:
        """Both flat: disjoint; the same object; or the source exactly `own` elements behind the target's beginning."""
        source = self._nccl.contiguous(array)
        target = self._nccl.empty((0,), array.dtype) if result is None else self._target(result)
        if not (source.size and target.size and self._nccl.overlap(source, target)):
            return source, target
        if own is not None and source.data.ptr == target.data.ptr + own * source.itemsize:
            return (target, target) if own == 0 and source.size == target.size else (source, target)
        return source.copy(), target

    def _target(self, result: Any) -> Any:
        return result.reshape(-1) if _is_flat(result) else self._nccl.empty((result.size,), result.dtype)

    def _deliver(self, target: Any, result: Any) -> Any:
        if not _is_flat(result):
            result[...] = target.reshape(result.shape)
        return result


def as_rows(array: Any) -> Any:
    """A CuPy array with a first dim: a single number becomes (1,)."""
    return array.reshape(1) if array.ndim == 0 else array


def _is_flat(array: Any) -> bool:
    return bool(array.flags.c_contiguous)


def _blocks(array: Any, lengths: Sequence[int]) -> list[Any]:
    """The consecutive parts of a flat array."""
    stops = np.cumsum(lengths).tolist()
    return [array[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
