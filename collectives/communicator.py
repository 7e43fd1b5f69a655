"""The communicator: the ranks that work together, and the collectives between them on plain NumPy arrays.

One rule for all collectives: arrays go in unchanged and a new array comes out, unless `out=` says where the result
goes; `out=array` works in place. Any dtype of NumPy and ml_dtypes, any length, contiguous or not. Every reduction is
a SUM unless asked ("max", "min", "prod"). Results have equal bits on all ranks and from run to run.

This file checks the arguments and brings arrays into flat contiguous form; `algorithms.py` says who computes, the
transport moves. All methods are collective calls (all ranks, same order, same arguments) unless they say otherwise.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from dtrain.collectives import algorithms, staged, window, window_moves
from dtrain.collectives.algorithms import Call
from dtrain.collectives.arena import Place
from dtrain.collectives.dtypes import Array, address, cut, dtype_from_name, dtype_name, operation, starts
from dtrain.collectives.node import Node
from dtrain.collectives.progress import Progress
from dtrain.collectives.transport import Transport
from dtrain.collectives.waiting import Patience, timeout_seconds
from dtrain.collectives.work import Request, Work


class Communicator:
    """`size` ranks, of which this process is number `rank`."""

    def __init__(self, transport: Transport, timeout: float | None = None, progress: Progress | None = None) -> None:
        """`timeout`: seconds after which a wait in shared memory ends with a report; see `timeout_seconds`.

        `progress`: of the communicator from which this one was split.
        """
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.hosts = transport.hosts
        self.host = transport.hosts[transport.rank]
        here = [rank for rank, node in enumerate(transport.nodes) if node == transport.nodes[transport.rank]]
        self.local_rank = here.index(transport.rank)
        self.local_size = len(here)
        self._timeout = timeout_seconds(timeout)
        # Several nodes: the MPI library does it all. Windows and network together will be one more algorithm.
        self._shares = transport.shares and 1 < self.size == self.local_size
        self._node: Node | None = None
        self._progress = progress or Progress()
        self._deferred: deque[_Deferred] = deque()
        self._shared_results: dict[tuple[Place | None, int, np.dtype[Any]], tuple[Array, Array]] = {}

    def __repr__(self) -> str:
        return f"<Communicator rank {self.rank} of {self.size} over {self.transport.name}>"

    @property
    def node(self) -> Node | None:
        """The shared memory of this communicator, if all its ranks are on one node. The first access is collective."""
        if self._node is None and self._shares:
            self._node = Node(self.transport, Patience(self.transport.crowded, self._timeout), self._progress)
        return self._node

    # Groups

    def split(self, color: int | None, key: int | None = None) -> "Communicator | None":
        """The communicator of the ranks with my color, ordered by key (default: by rank); None where color is None."""
        if color is not None and color < 0:
            raise ValueError(f"color={color}: allowed: None or a number from 0")
        self._settle()
        part = self.transport.split(color, self.rank if key is None else key)
        return None if part is None else Communicator(part, self._timeout, self._progress)

    def close(self) -> None:
        """Give all memory and handles back; the communicator is not used afterwards.

        Drop the arrays of `empty` before: their memory goes only when no rank has any of them any more.
        """
        self._settle()
        self._shared_results.clear()
        if self._node is not None:
            self._node.close()
            self._node = None
        self._shares = False
        self.transport.close()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job at once with exit status `code`; not collective."""
        self.transport.abort(code)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self._settle()
        if self.node is not None:
            staged.barrier(self.node)
        elif self.size > 1:
            self.transport.barrier()

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """A new array of undefined content, in the node's shared memory if possible: the home of what is reduced often.

        Every rank gets its own array; the peers see it, so that reductions of it (or of slices: the same slice on all
        ranks) need no copy. The array may die at any time, on each rank for itself; its memory is used again when it
        is dead on all.
        """
        form = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in form):
            raise ValueError(f"shape={shape}: allowed: lengths from 0")
        if np.dtype(dtype).hasobject:
            raise ValueError(f"dtype={dtype}: Python objects cannot travel")
        if self.node is None:
            return np.empty(form, dtype)
        self._settle()
        return self.node.arena.allocate(form, np.dtype(dtype))

    # Reductions

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks of array (any shape), of the same shape and dtype, on every rank."""
        array = np.asarray(array)
        operation(op, array.dtype)
        result = _result(out, array.shape, array.dtype)
        self._settle()
        place = self._sum_place(array)
        source, target = _pair(array, result, place is not None)
        if len(source):
            call = Call(self.transport, self.node, source, target, op, place=place, in_place=source is target)
            algorithms.run(algorithms.ALL_REDUCE, algorithm, call)
        return _deliver(target, result)

    def all_reduce_shared(self, array: Any, op: str = "sum") -> Array:
        """`all_reduce` into one read-only result that all ranks of the node share: the least memory traffic there is.

        The result is valid until this rank calls this again with the same array; or, for arrays that do not come from
        `empty`, with one of the same size and dtype. Several nodes: an ordinary array, read-only as well.
        """
        array = np.asarray(array)
        operation(op, array.dtype)
        self._settle()
        node = self.node
        source = _flat(array)
        if node is None or not len(source):
            result = self.all_reduce(array, op)
            result.flags.writeable = False
            return result
        place = self._sum_place(source)
        key = (place, source.size, source.dtype)
        if key not in self._shared_results:
            home = node.arena.allocate((source.size,), source.dtype)
            result = node.arena.allocate((source.size,), source.dtype)
            self._shared_results[key] = (source if place is not None else home, result)
        home, result = self._shared_results[key]
        if place is None:
            np.copyto(home, source)
            place = self._sum_place(home)
        at = self._sum_place(result)
        assert place is not None and at is not None
        shared = node.arena.parts(at, source.size, source.dtype)[0]
        window.start_all_reduce_shared(node, home, place, op, shared).wait()
        view = shared.reshape(array.shape)
        view.flags.writeable = False
        return view

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
        elements = _elements(rows, array.shape)
        source, target = self._block_pair(array, result, elements)
        if len(source):
            call = Call(self.transport, self.node, source, target, op, elements, place=self._sum_place(source))
            algorithms.run(algorithms.REDUCE_SCATTER, algorithm, call)
        return _deliver(target, result)

    def reduce(
        self, array: Any, op: str = "sum", root: int = 0, out: Array | None = None, algorithm: str = "auto"
    ) -> Array | None:
        """The sum over ranks of array (any shape) on rank root; None on the others."""
        array = np.asarray(array)
        operation(op, array.dtype)
        self._check_rank("root", root)
        self._settle()
        place = self._sum_place(array)
        if self.rank == root:
            result = _result(out, array.shape, array.dtype)
            source, target = _pair(array, result, place is not None)
        else:
            source, target = _flat(array), _NOTHING
        if len(source):
            call = Call(self.transport, self.node, source, target, op, root=root, place=place)
            call.target_place = self._sum_place(target)
            algorithms.run(algorithms.REDUCE, algorithm, call)
        return _deliver(target, result) if self.rank == root else None

    # Movement

    def all_gather(
        self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None, algorithm: str = "auto"
    ) -> Array:
        """The arrays of all ranks, in rank order along dim 0: (n, ...) on each rank gives (n * size, ...).

        counts: the first dims of all ranks, where they differ.
        """
        array = _rows(array)
        rows = self._gathered(array, counts)
        result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
        self._settle()
        place, counts = self._place(array), _elements(rows, array.shape)
        source, target = _apart(array, result, place is not None, sum(counts[: self.rank]))
        if len(target):
            call = Call(self.transport, self.node, source, target, counts=counts, place=place)
            algorithms.run(algorithms.ALL_GATHER, algorithm, call)
        return _deliver(target, result)

    def all_to_all(
        self,
        array: Any,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array:
        """Block i of array (n, ...) goes to rank i; the result is what came, in rank order: (m, ...).

        counts: rows for each rank; by default n // size, and one more for the first n % size ranks (then n must be
        the same on all ranks). out_counts: rows from each rank; asked of the others when counts is given without it.
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
        place = self._place(array)
        source, target = _apart(array, result, place is not None)
        call = Call(self.transport, self.node, source, target, counts=_elements(rows, array.shape), place=place)
        call.out_counts = _elements(received, array.shape)
        call.alike = counts is None and out_counts is None
        if not call.alike or len(source):
            algorithms.run(algorithms.ALL_TO_ALL, algorithm, call)
        return _deliver(target, result)

    def broadcast(self, array: Any, root: int = 0, out: Array | None = None, algorithm: str = "auto") -> Array:
        """The array of rank root on every rank; the others pass one of its shape and dtype to be ignored."""
        array = np.asarray(array)
        self._check_rank("root", root)
        result = _result(out, array.shape, array.dtype)
        self._settle()
        target = self._sent(array, result, root)
        if len(target):
            call = Call(self.transport, self.node, target, target, root=root, place=self._place(target))
            algorithms.run(algorithms.BROADCAST, algorithm, call)
        return _deliver(target, result)

    def gather(
        self,
        array: Any,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array | None:
        """The arrays of all ranks along dim 0, as `all_gather`, on rank root; None on the others."""
        array = _rows(array)
        self._check_rank("root", root)
        rows = self._gathered(array, counts)
        self._settle()
        place, counts = self._place(array), _elements(rows, array.shape)
        if self.rank == root:
            result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
            source, target = _apart(array, result, place is not None, sum(counts[: self.rank]))
        else:
            source, target = _flat(array), _NOTHING
        if sum(rows):
            call = Call(self.transport, self.node, source, target, counts=counts, root=root, place=place)
            call.target_place = self._place(target)
            algorithms.run(algorithms.GATHER, algorithm, call)
        return _deliver(target, result) if self.rank == root else None

    def scatter(
        self, array: Any | None, root: int = 0, out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Array:
        """My block of the array (n, ...) of rank root, cut along dim 0 as in `reduce_scatter`; others may pass None."""
        self._check_rank("root", root)
        self._settle()
        form: list[Any] | None = None
        if self.rank == root:
            array = _rows(array)
            place = self._place(array)
            form = [self._counts("counts", counts, len(array)), list(array.shape[1:]), dtype_name(array.dtype), place]
        rows, width, name, place = self.broadcast_object(form, root)
        result = _result(out, (rows[self.rank], *width), dtype_from_name(name))
        if self.rank == root:
            source, target = _apart(_rows(array), result, place is not None)
        else:
            source, target = _NOTHING, _target(result)
        if sum(rows):
            elements = _elements(rows, (0, *width))
            call = Call(self.transport, self.node, source, target, counts=elements, root=root)
            call.place = None if place is None else (place[0], place[1])
            algorithms.run(algorithms.SCATTER, "auto", call)
        return _deliver(target, result)

    # Between two ranks: only these two call

    def send(self, array: Any, destination: int, tag: int = 0) -> None:
        """Send array to rank destination; returns when array may be changed again."""
        self._check_pair("destination", destination, tag)
        array = np.asarray(array)
        if self._progress.busy():
            self.send_async(array, destination, tag).wait()
        else:
            self.transport.send(_flat(array), destination, tag)

    def recv(self, out: Array, source: int, tag: int = 0) -> Array:
        """Receive into out, which has the shape and dtype of what rank source sends."""
        self._check_pair("source", source, tag)
        if self._progress.busy():
            return self.recv_async(out, source, tag).wait()
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
        place = self._sum_place(array)
        source, target = _pair(array, result, place is not None)
        if place is not None and source is target and self.node is not None and len(source):
            request = window.start_all_reduce(self.node, source, place, op)
            self.node.progress()
            return Work(request, lambda: result)
        if self.size == 1 or not len(source) or not self.transport.reduces(op, source):
            return self._defer(lambda: self.all_reduce(array, op, result), result)
        self._note("all_reduce", op, source)
        return self._started(self.transport.start_all_reduce(source, target, op), target, result)

    def reduce_scatter_async(
        self, array: Any, op: str = "sum", out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Work:
        """`reduce_scatter`, started."""
        array = _rows(array)
        operation(op, array.dtype)
        rows = self._counts("counts", counts, len(array))
        result = _result(out, (rows[self.rank], *array.shape[1:]), array.dtype)
        elements = _elements(rows, array.shape)
        source, target = self._block_pair(array, result, elements)
        place = self._sum_place(source)
        if place is not None and self.node is not None and len(source):
            work = window.start_reduce_scatter(self.node, source, place, target, elements, op)
            self.node.progress()
            return Work(work, lambda: _deliver(target, result))
        if self.size == 1 or not len(source) or not self.transport.reduces(op, source):
            return self._defer(lambda: self.reduce_scatter(array, op, result, counts=rows), result)
        self._note("reduce_scatter", op, source)
        request = self.transport.start_reduce_scatter(source, target, elements, op)
        return self._started(request, target, result)

    def all_gather_async(self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None) -> Work:
        """`all_gather`, started."""
        array = _rows(array)
        rows = self._gathered(array, counts)
        result = _result(out, (sum(rows), *array.shape[1:]), array.dtype)
        place, elements = self._place(array), _elements(rows, array.shape)
        source, target = _apart(array, result, place is not None, sum(elements[: self.rank]))
        if self.size == 1 or not len(target):
            return self._defer(lambda: self.all_gather(array, result, rows), result)
        if place is not None and self.node is not None:
            work = window_moves.start_all_gather(self.node, source, place, target, elements)
            self.node.progress()
            return Work(work, lambda: _deliver(target, result))
        self._note("all_gather")
        request = self.transport.start_all_gather(source, target, elements)
        return self._started(request, target, result)

    def broadcast_async(self, array: Any, root: int = 0, out: Array | None = None) -> Work:
        """`broadcast`, started."""
        array = np.asarray(array)
        self._check_rank("root", root)
        result = _result(out, array.shape, array.dtype)
        target = self._sent(array, result, root)
        if self.size == 1 or not len(target):
            return Work(None, lambda: _deliver(target, result))
        place = self._place(target)
        if place is not None and self.node is not None:
            work = window_moves.start_broadcast(self.node, target, place, root)
            self.node.progress()
            return Work(work, lambda: _deliver(target, result))
        self._note("broadcast", "", target)
        return self._started(self.transport.start_broadcast(target, root), target, result)

    def send_async(self, array: Any, destination: int, tag: int = 0) -> Work:
        """`send`, started: array is left alone until `wait`."""
        self._check_pair("destination", destination, tag)
        array = np.asarray(array)
        return self._started(self.transport.start_send(_flat(array), destination, tag), array, array)

    def recv_async(self, out: Array, source: int, tag: int = 0) -> Work:
        """`recv`, started: out is left alone until `wait`."""
        self._check_pair("source", source, tag)
        target = _target(_result(out, out.shape, out.dtype))
        return self._started(self.transport.start_recv(target, source, tag), target, out)

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

    def _place(self, array: Array) -> Place | None:
        """Where the bytes of array lie in the window; None: elsewhere."""
        return None if self._node is None or not array.dtype.isnative else self._node.arena.place(array)

    def _sum_place(self, array: Array) -> Place | None:
        """`_place`, if the peers can address single elements there."""
        place = self._place(array)
        return None if place is None or place[1] % array.itemsize else place

    def _started(self, request: Request, target: Array, result: Array) -> Work:
        """The work of a request of the transport; it is helped along in every wait."""
        self._progress.watch(request)
        return Work(_Watched(request, self._progress), lambda: _deliver(target, result))

    def _note(self, name: str, op: str = "", array: Array | None = None) -> None:
        if self.node is not None:
            self.node.note(name, "native", op, array)

    def _sent(self, array: Array, result: Array, root: int) -> Array:
        """What is broadcast: the target, which holds the array on rank root."""
        target = _target(result)
        if self.rank == root and target.size:
            source = _flat(array)
            if address(source) != address(target):
                np.copyto(target, source)
        return target

    def _block_pair(self, array: Array, result: Array, counts: Sequence[int]) -> tuple[Array, Array]:
        """Source and target of a reduce_scatter; in place, the result is this rank's block of array."""
        source, target = _flat(array), _target(result)
        if self.size > 1 and np.may_share_memory(source, target):
            own = starts(counts)[self.rank]
            if address(target) != address(source) + own * source.itemsize or self._sum_place(source) is None:
                source = source.copy()
        return source, target

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

    # Deferred work: what has no non-blocking form runs at the first wait, in the order of the start. A blocking
    # collective runs the open ones first, so that all ranks run all collectives in one order wherever they wait.

    def _defer(self, run: Callable[[], Array], result: Array) -> Work:
        deferred = _Deferred(run, self._deferred)
        self._deferred.append(deferred)
        return Work(deferred, lambda: result)

    def _settle(self) -> None:
        if self._deferred:
            self._deferred[-1].wait()


class _Watched(Request):
    """A request of the transport that is waited for while everything else goes on."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self._request = request
        self._progress = progress

    def test(self) -> bool:
        return self._request.test()

    def wait(self) -> None:
        self._progress.wait(self._request)


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
    rows: Array = np.asarray(array)
    return rows.reshape(1) if rows.ndim == 0 else rows


def _elements(rows: Sequence[int], shape: tuple[int, ...]) -> list[int]:
    """Rows per rank as elements per rank."""
    width = math.prod(shape[1:])
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
    flat: Array = np.ascontiguousarray(array).reshape(-1)
    return flat


def _pair(array: Array, result: Array, shared: bool) -> tuple[Array, Array]:
    """Source and target of an all_reduce: the same object when they are the same memory, disjoint otherwise."""
    target = _target(result)
    if array is result:
        if target.base is not None and np.may_share_memory(target, result):
            return target, target
        return _flat(array), target
    source = _flat(array)
    if np.may_share_memory(source, target) and address(source) == address(target):
        return target, target
    return _disjoint(source, target, shared)


def _apart(array: Array, result: Array, shared: bool, own: int | None = None) -> tuple[Array, Array]:
    """Source and target in disjoint memory; or, with `own`, the source exactly at this element of the target."""
    source, target = _flat(array), _target(result)
    if shared and own is not None and len(source) and address(source) == address(target) + own * source.itemsize:
        return source, target
    return _disjoint(source, target, shared)


def _disjoint(source: Array, target: Array, shared: bool) -> tuple[Array, Array]:
    """The same where they do not overlap; else a copy of the source, or, where that must stay in the window
    (`shared`), a stand-in for the target that `_deliver` copies when all peers have read the source.
    """
    if not np.may_share_memory(source, target):
        return source, target
    return (source, np.empty_like(target)) if shared else (source.copy(), target)


def _target(result: Array) -> Array:
    """Where a transport may write the result: the result itself, flat, or a stand-in that `_deliver` copies."""
    if result.flags.c_contiguous and result.dtype.isnative:
        return result.reshape(-1)
    return np.empty(result.size, result.dtype.newbyteorder("="))


def _deliver(target: Array, result: Array) -> Array:
    """The result, after copying a stand-in into it."""
    if target.size and not np.may_share_memory(target, result):
        np.copyto(result, target.reshape(result.shape))
    return result


_NOTHING: Array = np.empty(0, np.uint8)
