"""The communicator: the ranks that work together, and the collectives between them on plain NumPy arrays.

    Group          ranks, split, close, empty             group.py
    Reductions     all_reduce, reduce_scatter, ...        reductions.py
    Movement       all_gather, broadcast, ...             movement.py
    Plans          the same again, prepared               plans.py
    Shortcuts      what is short, prepared                shortcuts.py
    Messages       send, recv                             messages.py
    Communicator   the non-blocking twins                 here

One rule for all collectives: arrays go in unchanged and a new array comes out, unless `out=` says where the result
goes; `out=array` works in place. Any dtype of NumPy and ml_dtypes, any length, contiguous or not. Every reduction is
a SUM unless asked ("max", "min", "prod"). Results have equal bits on all ranks and from run to run.

All methods are collective calls (all ranks, same order, same arguments) unless they say otherwise.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.collectives import algorithms, staged
from dtrain.collectives.algorithms import Algorithm
from dtrain.collectives.call import Call
from dtrain.collectives.device import ON_GPU, on_gpu
from dtrain.collectives.dtypes import Array, neutral
from dtrain.collectives.forms import NOTHING, as_rows, deliver
from dtrain.collectives.group import BARRIER
from dtrain.collectives.messages import Messages
from dtrain.collectives.window import WindowWork
from dtrain.collectives.work import Work

if TYPE_CHECKING:
    from dtrain.collectives.choices import Own


class Communicator(Messages):
    """`size` ranks, of which this process is number `rank`."""

    # Non-blocking twins: the same arguments, a `Work` as the result

    def all_reduce_async(
        self, array: Any, op: str = "sum", out: Array | None = None, algorithm: "str | Own" = "auto"
    ) -> Work:
        """`all_reduce`, started: array and out are left alone until `wait`."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_reduce_async(array, op, out)
        array = np.asarray(array)
        call, result = self._all_reduce_call(array, op, out)
        blocking = lambda: self.all_reduce(array, op, result)  # noqa: E731
        return self._start("all_reduce", algorithms.ALL_REDUCE, call, result, blocking, algorithm=algorithm)

    def reduce_scatter_async(
        self,
        array: Any,
        op: str = "sum",
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """`reduce_scatter`, started."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.reduce_scatter_async(array, op, out, counts)
        array = as_rows(array)
        call, result = self._reduce_scatter_call(array, op, out, counts)
        blocking = lambda: self.reduce_scatter(array, op, result, counts=counts)  # noqa: E731
        return self._start("reduce_scatter", algorithms.REDUCE_SCATTER, call, result, blocking, algorithm=algorithm)

    def all_gather_async(
        self,
        array: Any,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """`all_gather`, started."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_gather_async(array, out, counts)
        array = as_rows(array)
        call, result = self._all_gather_call(array, out, counts)
        blocking = lambda: self.all_gather(array, result, counts)  # noqa: E731
        return self._start("all_gather", algorithms.ALL_GATHER, call, result, blocking, algorithm=algorithm)

    def broadcast_async(
        self, array: Any, root: int = 0, out: Array | None = None, algorithm: "str | Own" = "auto"
    ) -> Work:
        """`broadcast`, started."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.broadcast_async(array, root, out)
        call, result = self._broadcast_call(np.asarray(array), root, out)
        blocking = lambda: deliver(call.target, result)  # noqa: E731
        return self._start("broadcast", algorithms.BROADCAST, call, result, blocking, algorithm=algorithm)

    def all_to_all_async(
        self,
        array: Any,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """`all_to_all`, started; counts without out_counts are exchanged first."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_to_all_async(array, out, counts, out_counts)
        array = as_rows(array)
        call, result = self._all_to_all_call(array, out, counts, out_counts)
        if not call.alike:
            call.place = None  # in the window the starts of uneven blocks would lie where the next collective writes
        blocking = lambda: self.all_to_all(array, result, counts, out_counts)  # noqa: E731
        return self._start("all_to_all", algorithms.ALL_TO_ALL, call, result, blocking, algorithm=algorithm)

    def reduce_async(
        self,
        array: Any,
        op: str = "sum",
        root: int = 0,
        out: Array | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """`reduce`, started; on the other ranks `wait` returns an array without elements."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.reduce_async(array, op, root, out)
        array = np.asarray(array)
        call, result = self._reduce_call(array, op, root, out)
        blocking = lambda: _or_nothing(self.reduce(array, op, root, result))  # noqa: E731
        return self._start("reduce", algorithms.REDUCE, call, _or_nothing(result), blocking, algorithm=algorithm)

    def scan_async(
        self, array: Any, op: str = "sum", out: Array | None = None, algorithm: "str | Own" = "auto"
    ) -> Work:
        """`scan`, started."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.scan_async(array, op, out, inclusive=True)
        array = np.asarray(array)
        call, result = self._all_reduce_call(array, op, out)
        blocking = lambda: self.scan(array, op, result)  # noqa: E731
        return self._start("scan", algorithms.SCAN, call, result, blocking, algorithm=algorithm)

    def exscan_async(
        self, array: Any, op: str = "sum", out: Array | None = None, algorithm: "str | Own" = "auto"
    ) -> Work:
        """`exscan`, started."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.scan_async(array, op, out, inclusive=False)
        array = np.asarray(array)
        call, result = self._all_reduce_call(array, op, out)
        blocking = lambda: self.exscan(array, op, result)  # noqa: E731
        work = self._start("exscan", algorithms.EXSCAN, call, result, blocking, algorithm=algorithm)
        return work.then(lambda before: _full(before, neutral(op, array.dtype))) if self.rank == 0 else work

    def gather_async(
        self,
        array: Any,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """`gather`, started; on the other ranks `wait` returns an array without elements."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.gather_async(array, root, out, counts)
        array = as_rows(array)
        call, result = self._gather_call(array, root, out, counts)
        blocking = lambda: _or_nothing(self.gather(array, root, result, counts))  # noqa: E731
        return self._start(
            "gather", algorithms.GATHER, call, _or_nothing(result), blocking, sum(call.counts), algorithm
        )

    def scatter_async(
        self, array: Any | None, root: int = 0, out: Array | None = None, counts: Sequence[int] | None = None
    ) -> Work:
        """`scatter`, started, once root has told the others what they get."""
        form, enclosed = self._scatter_form(array, root, out, counts, enclose=True)
        if enclosed is not None:
            return Work(None, lambda: enclosed)
        if form.place == ON_GPU:
            return self.gpu.scatter_async(array, root, out, form)
        call, result = self._scatter_call(array, root, out, form)
        moved = sum(call.counts)

        def blocking() -> Array:
            self._run("scatter", algorithms.SCATTER, "auto", call, empty=not moved)
            return deliver(call.target, result)

        return self._start("scatter", algorithms.SCATTER, call, result, blocking, moved)

    def barrier_async(self) -> Work:
        """`barrier`, started: this rank has come; `wait` returns when all have. Its result has no elements."""
        self._settle()
        if self.node is not None:
            self.counters.add("barrier", "staged", 0, BARRIER)
            return Work(staged.start_barrier(self.node), lambda: NOTHING)
        if self.size == 1:
            return Work(None, lambda: NOTHING)
        self._check("barrier", "native")
        self.counters.add("barrier", "native", 0, BARRIER)
        return self._watch(self.transport.start_barrier(), lambda: NOTHING, "barrier")

    # How a work begins

    def _start(
        self,
        name: str,
        table: dict[str, Algorithm],
        call: Call,
        result: Array,
        blocking: Callable[[], Array],
        elements: int | None = None,
        algorithm: "str | Own" = "auto",
    ) -> Work:
        """Start a call by the algorithm, or the first that can be started; by none, it is done at the first wait.

        elements: how many there are to move, where source and target of this rank do not tell.
        """
        if elements is None:
            elements = call.source.size or call.target.size
        something = self.size > 1 and (elements or (not call.alike and name == "all_to_all"))
        self._bring_levels(call)
        found: tuple[str, Algorithm] | None = None
        if algorithm != "auto" and something:
            found = algorithms.choose(table, algorithm, call)
            if found[1].start is None:
                raise ValueError(f"algorithm={algorithm!r}: cannot be started without waiting; call {name} itself")
        elif something:
            measured = () if self.tuning is None else self.tuning.order(name, call)
            found = algorithms.choose_start(table, call, measured)
        if found is None:
            return self._defer(blocking, result)
        chosen, row = found
        assert row.start is not None
        if call.node is None:
            self._check(name, chosen if chosen == "hierarchical" else f"{chosen}, started", call)
        request = row.start(call)
        if call.node is not None and not isinstance(request, WindowWork):
            request = call.node.compared(request)
        nbytes = max(call.source.nbytes, call.target.nbytes)
        if name in ("reduce", "gather") and isinstance(request, WindowWork):  # who moved what is known in the end
            node, number = call.stage, request.number

            def finish() -> Array:
                if not call.at_root:
                    call.target_place = node.aside(call.root, number)
                self.counters.add(name, chosen, nbytes, row.volume(call))
                return deliver(call.target, result) if call.at_root else result

            self._progress.poll()
            self._progress.wake()
            return Work(request, finish, (name,))
        self.counters.add(name, chosen, nbytes, row.volume(call))
        if chosen not in ("window", "hierarchical") or call.moved is not None:  # a schedule may have such a name too
            return self._watch(request, lambda: deliver(call.target, result), name)
        self._progress.poll()  # the slices of earlier works whose last rank has come meanwhile
        self._progress.wake()
        return Work(request, lambda: deliver(call.target, result), (name,))


def _full(array: Array, value: Any) -> Array:
    """The array, full of this value."""
    array[...] = value
    return array


def _or_nothing(result: Array | None) -> Array:
    return NOTHING if result is None else result
