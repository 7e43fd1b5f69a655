"""The reductions that return when they are done: all_reduce, all_reduce_shared, reduce_scatter, reduce.

The methods `_..._call` bring arguments into the form of a `Call`; the non-blocking twins use the same ones.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dtrain.collectives import algorithms
from dtrain.collectives.arena import with_keeper
from dtrain.collectives.call import Call
from dtrain.collectives.counters import Volume
from dtrain.collectives.device import on_gpu
from dtrain.collectives.dtypes import Array, address, neutral, operation
from dtrain.collectives.forms import (
    NOTHING,
    as_rows,
    check_rank,
    deliver,
    destination,
    elements,
    flat,
    pair,
    rows_per_rank,
    with_block,
)
from dtrain.collectives.group import Group
from dtrain.collectives.prepared_window import Windowed, window_all_reduce_shared
from dtrain.collectives.progress import Progress
from dtrain.collectives.transport import Transport
from dtrain.collectives.volumes import window_shared

_KNOWN_FORMS = 1024

# What adds up arrays at one place, the one home of their sum, and what moves.
SharedSum = tuple[Windowed, Array, Volume]


class Reductions(Group):
    """A group that adds up."""

    def __init__(self, transport: Transport, timeout: float | None = None, progress: Progress | None = None) -> None:
        super().__init__(transport, timeout, progress)
        # Until the arrays at these places die (None: elsewhere); the home of copies, if any, and the result.
        self._shared_results: dict[Hashable, tuple[Array | None, Array]] = {}
        # By addresses in the window: nothing else lies there before these arrays die.
        self._shared_runs: dict[Hashable, SharedSum] = {}

    def close(self) -> None:
        """Give all memory and handles back; the communicator is not used afterwards.

        Drop the arrays of `empty` before: their memory goes only when no rank has any of them any more.
        """
        self._shared_results.clear()
        self._shared_runs.clear()
        super().close()

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks of array (any shape), of the same shape and dtype, on every rank."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_reduce(array, op, out, algorithm)  # type: ignore[no-any-return]
        array = np.asarray(array)
        call, result = self._all_reduce_call(array, op, out)
        self._settle()
        self._run("all_reduce", algorithms.ALL_REDUCE, algorithm, call)
        return deliver(call.target, result)

    def all_reduce_shared(self, array: Any, op: str = "sum") -> Array:
        """`all_reduce` into one read-only result that all ranks of the node share: the least memory traffic there is.

        The result is valid until this rank calls this again with the same array; or, for arrays that do not come from
        `empty`, with one of the same size and dtype. Several nodes: an ordinary array, read-only as well.
        """
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_reduce(array, op, None, "auto")  # type: ignore[no-any-return]
        array = np.asarray(array)
        self._settle()
        known = None
        if array.flags.c_contiguous:
            known = self._shared_runs.get((address(array), array.size, array.dtype, op))
        if known is None:
            known = self._prepare_shared(array, op)
        if known is None:
            result = self.all_reduce(array, op)
            result.flags.writeable = False
            return result
        run, shared, volume = known
        run(shared, shared)
        self.counters.add("all_reduce_shared", "window", array.nbytes, volume)
        view = shared.reshape(array.shape)
        view.flags.writeable = False
        return view

    def _prepare_shared(self, array: Array, op: str) -> SharedSum | None:
        """What sums up arrays like this one; None: no memory is shared. An array from elsewhere is copied there."""
        operation(op, array.dtype)
        node, place, source = self.node, self._sum_place(array), flat(array)
        if node is None or not len(source):
            return None
        key = (place, source.size, source.dtype)
        if key not in self._shared_results:
            home = node.arena.allocate((source.size,), source.dtype) if place is None else None
            self._shared_results[key] = home, node.arena.allocate((source.size,), source.dtype)
            if place is not None:
                node.arena.at_death(source, partial(self._shared_results.pop, key, None))
        home, result = self._shared_results[key]
        if home is not None:
            np.copyto(home, source)
            source = home
        at, goal = self._sum_place(source), self._sum_place(result)
        assert at is not None and goal is not None
        shared = node.arena.parts(goal, source.size, source.dtype)[0]
        run = window_all_reduce_shared(node, at, op, shared)
        volume = window_shared(Call(self.transport, node, source, shared, op))
        known = run, with_keeper(shared, result), volume
        if place is not None and len(self._shared_runs) < _KNOWN_FORMS:
            here = address(source), source.size, source.dtype, op
            self._shared_runs[here] = known
            node.arena.at_death(source, partial(self._shared_runs.pop, here, None))
        return known

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
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.reduce_scatter(array, op, out, algorithm, counts)  # type: ignore[no-any-return]
        call, result = self._reduce_scatter_call(as_rows(array), op, out, counts)
        self._settle()
        self._run("reduce_scatter", algorithms.REDUCE_SCATTER, algorithm, call)
        return deliver(call.target, result)

    def reduce(
        self, array: Any, op: str = "sum", root: int = 0, out: Array | None = None, algorithm: str = "auto"
    ) -> Array | None:
        """The sum over ranks of array (any shape) on rank root; None on the others."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.reduce(array, op, root, out, algorithm)  # type: ignore[no-any-return]
        call, result = self._reduce_call(np.asarray(array), op, root, out)
        self._run("reduce", algorithms.REDUCE, algorithm, call)
        return None if result is None else deliver(call.target, result)

    def scan(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum of the arrays of ranks 0 to mine, in this order."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.scan(array, op, out, algorithm, inclusive=True)  # type: ignore[no-any-return]
        call, result = self._all_reduce_call(np.asarray(array), op, out)
        self._settle()
        self._run("scan", algorithms.SCAN, algorithm, call)
        return deliver(call.target, result)

    def exscan(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum of the arrays of the ranks before mine; on rank 0 what changes no sum (0; of a product 1, and so on).

        (MPI leaves rank 0's result undefined.)
        """
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.scan(array, op, out, algorithm, inclusive=False)  # type: ignore[no-any-return]
        call, result = self._all_reduce_call(np.asarray(array), op, out)
        self._settle()
        if self.size > 1:
            self._run("exscan", algorithms.EXSCAN, algorithm, call)
        else:
            algorithms.choose(algorithms.EXSCAN, algorithm, call)  # refuses a wrong name
        if self.rank == 0:
            call.target[...] = neutral(op, call.target.dtype)
        return deliver(call.target, result)

    # From arguments to calls

    def _all_reduce_call(self, array: Array, op: str, out: Array | None) -> tuple[Call, Array]:
        operation(op, array.dtype)
        result = destination(out, array.shape, array.dtype)
        node, place = self.node, self._sum_place(array)
        source, target = pair(array, result, place is not None)
        return Call(self.transport, node, source, target, op, place=place, in_place=source is target), result

    def _reduce_scatter_call(
        self, array: Array, op: str, out: Array | None, counts: Sequence[int] | None
    ) -> tuple[Call, Array]:
        operation(op, array.dtype)
        rows = rows_per_rank("counts", counts, len(array), self.size)
        result = destination(out, (rows[self.rank], *array.shape[1:]), array.dtype)
        node, place, lengths = self.node, self._sum_place(array), elements(rows, array.shape)
        source, target = with_block(array, result, place is not None, self._own_block(lengths, place))
        return Call(self.transport, node, source, target, op, lengths, place=place), result

    def _reduce_call(self, array: Array, op: str, root: int, out: Array | None) -> tuple[Call, Array | None]:
        operation(op, array.dtype)
        check_rank("root", root, self.size)
        self._settle()
        node, place = self.node, self._sum_place(array)
        result = None
        if self.rank == root:
            result = destination(out, array.shape, array.dtype)
            source, target = pair(array, result, place is not None)
        else:
            source, target = flat(array), NOTHING
        call = Call(self.transport, node, source, target, op, root=root, place=place)
        call.target_place = self._sum_place(target)
        return call, result
