"""The communicator: the ranks that work together, and the collectives between them on plain NumPy arrays.

One rule for all collectives: arrays go in unchanged and a new array comes out, unless `out=` says where the result goes;
`out=array` works in place. Any dtype of NumPy and ml_dtypes, any length, contiguous or not. Every reduction is a SUM unless
asked ("max", "min", "prod"). Results have equal bits on all ranks and from run to run.

This file checks the arguments and brings arrays into flat contiguous form; `algorithms.py` says who computes, the transport
moves. All methods are collective calls (all ranks, same order, same arguments) unless they say otherwise.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from dtrain.collectives import exchange
from dtrain.collectives.algorithms import ALL_REDUCE, REDUCE_SCATTER, choose
from dtrain.collectives.dtypes import Array, cut, dtype_from_name, dtype_name, operation, starts
from dtrain.collectives.transport import Transport
from dtrain.collectives.work import Request, Work


class Communicator:
    """`size` ranks, of which this process is number `rank`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.hosts = transport.hosts
        self.host = transport.hosts[transport.rank]
        here = [rank for rank, node in enumerate(transport.nodes) if node == transport.nodes[transport.rank]]
        self.local_rank = here.index(transport.rank)
        self.local_size = len(here)
        self._deferred: deque[_Deferred] = deque()

    def __repr__(self) -> str:
        return f"<Communicator rank {self.rank} of {self.size} over {self.transport.name}>"

    # Groups

    def split(self, color: int | None, key: int | None = None) -> "Communicator | None":
        """The communicator of the ranks with my color, ordered by key (default: by rank); None where color is None."""
        if color is not None and color < 0:
            raise ValueError(f"color={color}: allowed: None or a number from 0")
        self._settle()
        part = self.transport.split(color, self.rank if key is None else key)
        return None if part is None else Communicator(part)

    def close(self) -> None:
        """Give everything back. Arrays of `empty` and works under way must not be used afterwards."""
        self.transport.close()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job at once with exit status `code`; not collective."""
        self.transport.abort(code)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self._settle()
        if self.size > 1:
            self.transport.barrier()

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """A new array of undefined content, in memory shared by the node where possible."""
        return np.empty(shape, dtype)

    # Reductions

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks of array (any shape), of the same shape and dtype, on every rank."""
        array = np.asarray(array)
        operation(op, array.dtype)
        result = _result(out, array.shape, array.dtype)
        self._settle()
        source, target = _source(array, result), _target(result)
        if len(source):
            choose(ALL_REDUCE, algorithm, self, source, target, op).run(self, source, target, op)
        return _deliver(target, result)

    def reduce_scatter(
        self,
        array: Any,
        op: str = "sum",
        out: Array | None = None,
        algorithm: str = "auto",
        counts: Sequence[int] | None = None,
    ) -> Array:
        """My block of the sum over ranks of array (n, ...), cut along the first dim: result (n_rank, ...).

        counts: the lengths of all blocks; by default n // size, and one more for the first n % size ranks.
        """
        array = _rows(array)
        operation(op, array.dtype)
        rows = self._counts("counts", counts, len(array))
        result = _result(out, (rows[self.rank], *array.shape[1:]), array.dtype)
        self._settle()
        source, target = _source(array, result, exact=False), _target(result)
        elements = _elements(rows, array.shape)
        if len(source):
            choose(REDUCE_SCATTER, algorithm, self, source, target, op).run(self, source, target, elements, op)
        return _deliver(target, result)

    def reduce(self, array: Any, op: str = "sum", root: int = 0, out: Array | None = None) -> Array | None:
        """The sum over ranks of array (any shape) on rank root; None on the others."""
        array = np.asarray(array)
        operation(op, array.dtype)
        self._check_rank("root", root)
        self._settle()
        if self.rank != root:
            source, result = _flat(array), None
        else:
            result = _result(out, array.shape, array.dtype)
            source = _source(array, result)
        target = None if result is None else _target(result)
        if self.size == 1 and target is not None:
            np.copyto(target, source)
        elif len(source) and self.transport.reduces(op, source):
            self.transport.reduce(source, target, op, root)
        elif len(source):
            exchange.reduce(self.transport, source, target, op, root)
        return None if result is None or target is None else _deliver(target, result)

    # Movement

    def all_gather(self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None) -> Array:
        """The arrays of all ranks, in rank order along dim 0: (n, ...) on each rank gives (n * size, ...).

        counts: the first dims of all ranks, where they differ.
        """
        array = _rows(array)
        rows = self._gathered(array, counts)
        result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
        self._settle()
        # In place: array is its own block of out. A copy first, so that every transport may write freely.
        source, target = _source(array, result, exact=False), _target(result)
        if len(target):
            if self.size == 1:
                np.copyto(target, source)
            else:
                self.transport.all_gather(source, target, _elements(rows, array.shape))
        return _deliver(target, result)

    def all_to_all(
        self,
        array: Any,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
    ) -> Array:
        """Block i of array (n, ...) goes to rank i; the result is what came, in rank order: (m, ...).

        counts: rows for each rank; by default n // size, and one more for the first n % size ranks (then n must be the same
        on all ranks). out_counts: rows from each rank; asked of the others when counts is given without it.
        """
        array = _rows(array)
        rows = self._counts("counts", counts, len(array))
        self._settle()
        if out_counts is not None:
            received = self._counts("out_counts", out_counts, None)
        elif counts is None:
            received = [rows[self.rank]] * self.size
        else:
            asked = np.array(rows, np.int64)
            received = self.all_to_all(asked).tolist()
        result = _result(out, (sum(received), *array.shape[1:]), array.dtype)
        source, target = _source(array, result, exact=False), _target(result)
        if self.size == 1:
            np.copyto(target, source)
        else:
            self.transport.all_to_all(source, target, _elements(rows, array.shape), _elements(received, array.shape))
        return _deliver(target, result)

    def broadcast(self, array: Any, root: int = 0, out: Array | None = None) -> Array:
        """The array of rank root on every rank; the others pass one of the same shape and dtype, its content is not read."""
        array = np.asarray(array)
        self._check_rank("root", root)
        result = _result(out, array.shape, array.dtype)
        self._settle()
        target = _target(result)
        if self.rank == root:
            np.copyto(target, _flat(array))
        if len(target) and self.size > 1:
            self.transport.broadcast(target, root)
        return _deliver(target, result)

    def gather(
        self, array: Any, root: int = 0, out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Array | None:
        """The arrays of all ranks along dim 0, as `all_gather`, on rank root; None on the others."""
        array = _rows(array)
        self._check_rank("root", root)
        rows = self._gathered(array, counts)
        self._settle()
        if self.rank != root:
            if sum(rows):
                self.transport.gather(_flat(array), None, _elements(rows, array.shape), root)
            return None
        result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
        source, target = _source(array, result, exact=False), _target(result)
        if self.size == 1:
            np.copyto(target, source)
        elif len(target) or sum(rows):
            self.transport.gather(source, target, _elements(rows, array.shape), root)
        return _deliver(target, result)

    def scatter(
        self, array: Any | None, root: int = 0, out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Array:
        """My block of the array (n, ...) of rank root, cut along dim 0 as in `reduce_scatter`; others may pass None."""
        self._check_rank("root", root)
        self._settle()
        if self.rank == root:
            array = _rows(array)
            rows = self._counts("counts", counts, len(array))
            form = [rows, list(array.shape[1:]), dtype_name(array.dtype)]
            self.broadcast_object(form, root)
        else:
            array = None
            form = self.broadcast_object(None, root)
        rows, shape, dtype = form[0], (0, *form[1]), dtype_from_name(form[2])
        result = _result(out, (rows[self.rank], *shape[1:]), dtype)
        target = _target(result)
        source = None if array is None else _source(array, result, exact=False)
        if self.size == 1 and source is not None:
            np.copyto(target, source)
        elif sum(rows):
            self.transport.scatter(source, target, _elements(rows, shape), root)
        return _deliver(target, result)

    # Between two ranks: only these two call

    def send(self, array: Any, destination: int, tag: int = 0) -> None:
        """Send array to rank destination; returns when array may be changed again."""
        self._check_pair("destination", destination, tag)
        self.transport.send(_flat(np.asarray(array)), destination, tag)

    def recv(self, out: Array, source: int, tag: int = 0) -> Array:
        """Receive into out, which has the shape and dtype of what rank source sends."""
        self._check_pair("source", source, tag)
        target = _target(_result(out, out.shape, out.dtype))
        self.transport.recv(target, source, tag)
        return _deliver(target, out)

    def sendrecv(self, array: Any, destination: int, out: Array, source: int, tag: int = 0) -> Array:
        """Send array to one rank while receiving out from another."""
        sending = self.send_async(array, destination, tag)
        self.recv(out, source, tag)
        sending.wait()
        return out

    # Non-blocking twins: the same arguments, a `Work` as the result

    def all_reduce_async(self, array: Any, op: str = "sum", out: Array | None = None) -> Work:
        """`all_reduce`, started: array and out are left alone until `wait`."""
        array = np.asarray(array)
        operation(op, array.dtype)
        result = _result(out, array.shape, array.dtype)
        source, target = _source(array, result), _target(result)
        if self.size == 1 or not len(source) or not self.transport.reduces(op, source):
            return self._defer(lambda: self.all_reduce(array, op, result), result)
        return Work(self.transport.start_all_reduce(source, target, op), lambda: _deliver(target, result))

    def reduce_scatter_async(
        self, array: Any, op: str = "sum", out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Work:
        """`reduce_scatter`, started."""
        array = _rows(array)
        operation(op, array.dtype)
        rows = self._counts("counts", counts, len(array))
        result = _result(out, (rows[self.rank], *array.shape[1:]), array.dtype)
        source, target = _source(array, result, exact=False), _target(result)
        if self.size == 1 or not len(source) or not self.transport.reduces(op, source):
            return self._defer(lambda: self.reduce_scatter(array, op, result, counts=rows), result)
        request = self.transport.start_reduce_scatter(source, target, _elements(rows, array.shape), op)
        return Work(request, lambda: _deliver(target, result))

    def all_gather_async(self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None) -> Work:
        """`all_gather`, started."""
        array = _rows(array)
        rows = self._gathered(array, counts)
        result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
        source, target = _source(array, result, exact=False), _target(result)
        if self.size == 1 or not len(target):
            return self._defer(lambda: self.all_gather(array, result, rows), result)
        request = self.transport.start_all_gather(source, target, _elements(rows, array.shape))
        return Work(request, lambda: _deliver(target, result))

    def broadcast_async(self, array: Any, root: int = 0, out: Array | None = None) -> Work:
        """`broadcast`, started."""
        array = np.asarray(array)
        self._check_rank("root", root)
        result = _result(out, array.shape, array.dtype)
        target = _target(result)
        if self.rank == root:
            np.copyto(target, _flat(array))
        request = self.transport.start_broadcast(target, root) if len(target) and self.size > 1 else None
        return Work(request, lambda: _deliver(target, result))

    def send_async(self, array: Any, destination: int, tag: int = 0) -> Work:
        """`send`, started: array is left alone until `wait`."""
        self._check_pair("destination", destination, tag)
        array = np.asarray(array)
        return Work(self.transport.start_send(_flat(array), destination, tag), lambda: array)

    def recv_async(self, out: Array, source: int, tag: int = 0) -> Work:
        """`recv`, started: out is left alone until `wait`."""
        self._check_pair("source", source, tag)
        target = _target(_result(out, out.shape, out.dtype))
        return Work(self.transport.start_recv(target, source, tag), lambda: _deliver(target, out))

    # Small Python values: dict, list, str, int, float, bool, None; they travel as JSON

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order. Tuples come back as lists."""
        octets = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = self.all_gather(np.array([len(octets)], np.int64)).tolist()
        everyone = self.all_gather(octets, counts=lengths)
        blocks = zip(starts(lengths), lengths, strict=True)
        return [json.loads(everyone[start : start + length].tobytes()) for start, length in blocks]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The value of rank root, on every rank; what the others pass is not looked at."""
        octets = np.frombuffer(json.dumps(value if self.rank == root else None).encode(), np.uint8)
        length = int(self.broadcast(np.array([len(octets)], np.int64), root)[0])
        buffer = octets if self.rank == root else np.empty(length, np.uint8)
        return json.loads(self.broadcast(buffer, root).tobytes())

    # Checks

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{name}={rank}: not a rank of this communicator; allowed: 0 to {self.size - 1}")

    def _check_pair(self, name: str, rank: int, tag: int) -> None:
        self._check_rank(name, rank)
        if rank == self.rank:
            raise ValueError(f"{name}={rank}: that is this rank itself; copy the array instead")
        if not 0 <= tag < 32767:
            raise ValueError(f"tag={tag}: allowed: 0 to 32766")

    def _counts(self, name: str, counts: Sequence[int] | None, total: int | None) -> list[int]:
        """The rows per rank: `counts` checked, or `total` cut evenly."""
        if counts is None:
            return cut(total or 0, self.size)
        rows = [int(count) for count in counts]
        if len(rows) != self.size or min(rows) < 0 or (total is not None and sum(rows) != total):
            expected = "" if total is None else f" with the sum {total}"
            raise ValueError(f"{name}={rows}: allowed: {self.size} numbers from 0{expected}")
        return rows

    def _gathered(self, array: Array, counts: Sequence[int] | None) -> list[int]:
        """The rows that each rank brings."""
        rows = [len(array)] * self.size if counts is None else self._counts("counts", counts, None)
        if rows[self.rank] != len(array):
            raise ValueError(f"counts={rows}: this rank brings {len(array)} rows, not {rows[self.rank]}")
        return rows

    # Deferred work: what has no non-blocking form runs at the first wait, in the order of the start. A blocking collective runs
    # the open ones first, so that all ranks run all collectives in one order wherever they wait.

    def _defer(self, run: Callable[[], Array], result: Array) -> Work:
        deferred = _Deferred(run, self._deferred)
        self._deferred.append(deferred)
        return Work(deferred, lambda: result)

    def _settle(self) -> None:
        if self._deferred:
            self._deferred[-1].wait()


class _Deferred(Request):
    """A collective that runs when it is waited for, after those deferred before it."""

    def __init__(self, run: Callable[[], Array], queue: "deque[_Deferred]") -> None:
        self._run = run
        self._queue = queue
        self._finished = False

    def test(self) -> bool:
        return self._finished

    def wait(self) -> None:
        while not self._finished:
            # Taken out first: the collective inside settles the queue, and must not meet itself.
            pending = list(self._queue)
            self._queue.clear()
            for position, deferred in enumerate(pending):
                deferred._run()
                deferred._finished = True
                if deferred is self:
                    self._queue.extend(pending[position + 1 :])
                    break


# Arrays in and out of flat contiguous form


def _rows(array: Any) -> Array:
    """An array with a first dim: a single number becomes (1,)."""
    array = np.asarray(array)
    return array.reshape(1) if array.ndim == 0 else array


def _elements(rows: Sequence[int], shape: tuple[int, ...]) -> list[int]:
    """Rows per rank as elements per rank."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    return [count * width for count in rows]


def _result(out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`out` after a check, or a new array."""
    if dtype.hasobject:
        raise ValueError(f"dtype={dtype}: Python objects cannot travel; use broadcast_object or all_gather_object")
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise ValueError(f"out is a {type(out).__name__}; allowed: a NumPy array of shape {shape} and dtype {dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; allowed: {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}; allowed: {dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; allowed: a writable array")
    return out


def _flat(array: Array) -> Array:
    """Array as (count,), contiguous, in the machine's byte order; a copy only where it must be."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array).reshape(-1)


def _source(array: Array, result: Array, exact: bool = True) -> Array:
    """Array flat; a copy where it overlaps the result otherwise than by being the same memory (exact) or at all (not)."""
    flat = _flat(array)
    if array is result and exact:
        return _target(result) if result.flags.c_contiguous and result.dtype.isnative else flat
    return flat.copy() if np.may_share_memory(flat, result) else flat


def _target(result: Array) -> Array:
    """Where a transport may write the result: the result itself, flat, or a stand-in that `_deliver` copies."""
    if result.flags.c_contiguous and result.dtype.isnative:
        return result.reshape(-1)
    return np.empty(result.size, result.dtype.newbyteorder("="))


def _deliver(target: Array, result: Array) -> Array:
    """The result, after copying a stand-in into it."""
    if target.base is not result and target is not result and not np.may_share_memory(target, result):
        np.copyto(result, target.reshape(result.shape))
    return result
