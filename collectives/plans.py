"""Calls that come again: what never changes from call to call is prepared once.

    first call   arguments -> Call -> choose -> run         30 to 60 us of Python
    from then    key -> plan -> run(source, target)         5 to 15 us

A plan takes the same steps and writes the same records as the row it stands for, so a rank with a plan and a rank
without one may meet. Its key holds all that the choice of the row looks at, and what a plan depends on: shapes, dtype,
operation or root, and the places in the window. Invariant: a plan keeps no array of its caller alive; what lies
elsewhere than in the window is an argument of every run.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.algorithms import Algorithm
from dtrain.collectives.call import Call
from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.forms import destination
from dtrain.collectives.movement import Movement
from dtrain.collectives.prepared import PREPARED
from dtrain.collectives.prepared_window import Run
from dtrain.collectives.progress import Progress
from dtrain.collectives.reductions import Reductions
from dtrain.collectives.staged import SMALL_BYTES
from dtrain.collectives.transport import Transport
from dtrain.collectives.tuning import Table

KNOWN_PLANS = 1024


class Plan(NamedTuple):
    """A prepared call."""

    collective: str
    algorithm: str
    nbytes: int
    volume: Volume
    shape: tuple[int, ...]  # of the result
    run: Run  # on flat arrays


PREPARED_COLLECTIVES = {collective for collective, _ in PREPARED}


class Plans(Reductions, Movement):
    """Reductions and movement that remember how their calls ran."""

    def __init__(self, transport: Transport, timeout: float | None = None, progress: Progress | None = None) -> None:
        super().__init__(transport, timeout, progress)
        self._plans: dict[Hashable, Plan] = {}
        self._ran: tuple[dict[str, Algorithm], Call] | None = None  # the call that runs now

    def close(self) -> None:
        """Give all memory and handles back; the communicator is not used afterwards.

        Drop the arrays of `empty` before: their memory goes only when no rank has any of them any more.
        """
        self._plans.clear()
        self._ran = None
        super().close()

    def tune(self, table: Table | None) -> None:
        """Choose by this table from now on; `Group.tune`."""
        super().tune(table)
        self.forget()

    def forget(self) -> None:
        """Drop all plans: what `auto` chooses has changed, on all ranks."""
        self._plans.clear()

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks of array (any shape), of the same shape and dtype, on every rank."""
        if type(array) is not np.ndarray or array.nbytes <= SMALL_BYTES:
            return super().all_reduce(array, op, out, algorithm)
        key = self._plan_key(array, out, "all_reduce", algorithm, op)
        plan = self._plans.get(key)
        if plan is not None:
            return self._follow(plan, array, out)
        return self._remember(key, array, super().all_reduce(array, op, out, algorithm))

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
        if counts is not None:
            return super().reduce_scatter(array, op, out, algorithm, counts)
        key = self._plan_key(array, out, "reduce_scatter", algorithm, op)
        plan = self._plans.get(key)
        if plan is not None:
            return self._follow(plan, array, out)
        return self._remember(key, array, super().reduce_scatter(array, op, out, algorithm))

    def all_gather(
        self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None, algorithm: str = "auto"
    ) -> Array:
        """The arrays of all ranks, in rank order along dim 0: (n, ...) on each rank gives (n * size, ...).

        counts: the first dims of all ranks, where they differ.
        """
        if counts is not None:
            return super().all_gather(array, out, counts, algorithm)
        key = self._plan_key(array, out, "all_gather", algorithm)
        plan = self._plans.get(key)
        if plan is not None:
            return self._follow(plan, array, out)
        return self._remember(key, array, super().all_gather(array, out, algorithm=algorithm))

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
        if counts is not None or out_counts is not None:
            return super().all_to_all(array, out, counts, out_counts, algorithm)
        key = self._plan_key(array, out, "all_to_all", algorithm)
        plan = self._plans.get(key)
        if plan is not None:
            return self._follow(plan, array, out)
        return self._remember(key, array, super().all_to_all(array, out, algorithm=algorithm))

    def broadcast(self, array: Any, root: int = 0, out: Array | None = None, algorithm: str = "auto") -> Array:
        """The array of rank root on every rank; the others pass one of its shape and dtype to be ignored."""
        if type(array) is np.ndarray and out is not array:
            array = out = self._into_result(array, root, out)
        key = self._plan_key(array, out, "broadcast", algorithm, root)
        plan = self._plans.get(key)
        if plan is not None:
            return self._follow(plan, array, out)
        return self._remember(key, array, super().broadcast(array, root, out, algorithm))

    def _into_result(self, array: Array, root: int, out: Array | None) -> Array:
        """The result of a broadcast, with root's array in it: from there on it is one in place."""
        result = destination(out, array.shape, array.dtype)
        if self._deferred:
            self._settle()
        if self.rank == root:
            np.copyto(result, array)
        return result

    # Keys and plans

    def _plan_key(self, array: Any, out: Array | None, name: str, algorithm: Any, detail: Hashable = None) -> Hashable:
        """What decides how a call runs; None: that is not enough here (strides, subclasses, byte order)."""
        node = self._node
        if node is None or type(algorithm) is not str or type(array) is not np.ndarray or not array.flags.c_contiguous:
            return None
        place = node.arena.place(array)
        if out is None:
            return name, algorithm, detail, array.shape, array.dtype, place
        if type(out) is not np.ndarray or not out.flags.c_contiguous or not out.flags.writeable:
            return None
        if out is array:
            return name, algorithm, detail, array.shape, array.dtype, place, True
        goal = node.arena.place(out)
        apart = goal is not None or place is not None or not np.may_share_memory(array, out)
        shift = None if apart else address(array) - address(out)
        return name, algorithm, detail, array.shape, array.dtype, place, out.shape, out.dtype, goal, shift

    def _follow(self, plan: Plan, array: Array, out: Array | None) -> Array:
        """Run a plan; the result."""
        if out is None:
            out = np.empty(plan.shape, array.dtype)
        if self._deferred:
            self._settle()
        plan.run(array.reshape(-1), out.reshape(-1))
        self.counters.add(plan.collective, plan.algorithm, plan.nbytes, plan.volume)
        return out

    def _run(
        self, name: str, table: dict[str, Algorithm], algorithm: Any, call: Call, empty: bool | None = None
    ) -> None:
        super()._run(name, table, algorithm, call, empty)
        # Nothing else is kept: the arrays of a call that nobody asks after would live until the next one.
        asked_after = name in PREPARED_COLLECTIVES and (name != "all_reduce" or call.source.nbytes > SMALL_BYTES)
        self._ran = (table, call) if asked_after else None

    def _remember(self, key: Hashable, array: Any, result: Array) -> Array:
        """The result; and a plan of the call it came from, if that has a prepared form and used these very arrays."""
        ran, self._ran = self._ran, None
        last = self.counters.last
        if key is None or ran is None or last is None or len(self._plans) >= KNOWN_PLANS or not result.size:
            return result
        table, call = ran
        prepare = PREPARED.get((last[0], last[1]))
        if prepare is None or not array.dtype.isnative:
            return result
        if call.source.size and address(call.source) == address(array) and address(call.target) == address(result):
            run = prepare(call)
            if run is not None:
                self._plans[key] = Plan(last[0], last[1], last[2], table[last[1]].volume(call), result.shape, run)
        return result
