"""The way of long calls: from the arguments straight to the plan that arrays like these had before.

    first call      arguments -> Call -> choose -> run                       the general way
    second          key -> plan -> run                                       `plans.py`
    from then       (name, shape, dtype, op) -> form -> run(array, out), which knows
      in the window    the addresses of the arrays (`places.py`)
      elsewhere        how they lie to each other (`long.py`)

Each is one function of machine code. Only once the first collectives are compared, and with no work under way: other
ranks may see it otherwise, they meet.
"""

from collections.abc import Callable, Hashable
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from numpy import ndarray

from dtrain.collectives import long, small
from dtrain.collectives.counters import Tally
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.long import Long, Meetings
from dtrain.collectives.machine_short import UNLIKE
from dtrain.collectives.places import Places, places
from dtrain.collectives.plans import Plan, Plans
from dtrain.collectives.prepared_window import Windowed
from dtrain.collectives.progress import Progress
from dtrain.collectives.small import Like
from dtrain.collectives.transport import Transport

KNOWN_FORMS = 4096
KNOWN_DISTANCES = 8  # between the arrays of calls that are otherwise alike, or places of the first
Key = tuple[Any, ...]
Form = Callable[[Any, Array | None], Any]


class LongCalls(Plans):
    """Plans, and what knows them by the addresses of their arrays."""

    def __init__(self, transport: Transport, timeout: float | None = None, progress: Progress | None = None) -> None:
        super().__init__(transport, timeout, progress)
        self._forms: dict[Hashable, Form] = {}
        """By name, shape, dtype and operation: those of short calls too (`shortcuts.py`)."""
        self._places: dict[Hashable, Places] = {}
        """Those of arrays in the window, by the key of the form."""
        self._longs: dict[Hashable, list[tuple[Long, Tally]]] = {}
        """Those of arrays from elsewhere: apart, and at each distance that has come."""

    def forget(self) -> None:
        """Drop all forms and plans: what `auto` chooses has changed, on all ranks."""
        self._forget()
        self.counters.forget()
        super().forget()

    def close(self) -> None:
        """Give all memory and handles back; the communicator is not used afterwards.

        Drop the arrays of `empty` before: their memory goes only when no rank has any of them any more.
        """
        self._forget()
        super().close()

    def _forget(self) -> None:
        self._forms.clear()
        self._places.clear()
        self._longs.clear()

    def all_reduce_shared(self, array: Any, op: str = "sum") -> Array:
        """`all_reduce` into one read-only result that all ranks of the node share: the least memory traffic there is.

        The result is valid until this rank calls this again with the same array; or, for arrays that do not come from
        `empty`, with one of the same size and dtype. Several nodes: an ordinary array, read-only as well.
        """
        if type(array) is not ndarray:
            return super().all_reduce_shared(array, op)
        key = "all_reduce_shared", array.shape, array.dtype, op
        form = self._forms.get(key)
        if form is not None:
            return form(array, None)  # type: ignore[no-any-return]
        return self._keep_shared(key, array, super().all_reduce_shared(array, op))

    def _keep_shared(self, key: Key, array: Array, result: Array) -> Array:
        """`result`; how it came about is kept until the array dies, if that lies in the window."""
        node, op, call = self._node, key[3], super().all_reduce_shared
        if node is None or not small.able(node) or node.arena.place(array) is None:
            return result
        found = self._shared_runs.get((address(array), array.size, array.dtype, op))
        if found is None:
            return result
        plan, _, volume = found
        known = self._places.get(key)
        if known is None and len(self._forms) < KNOWN_FORMS:
            known = places(node, Like(array.shape, array.dtype), None)
            if known is not None:
                self._places[key] = known
                self._forms[key] = self._form_of_shared(
                    known, lambda array: self._keep_shared(key, array, call(array, op))
                )
        what = "all_reduce_shared", "window", array.nbytes, volume
        if known is not None and known.add(array, array, plan, what, self.counters, result):
            node.arena.at_death(array, partial(known.drop, address(array)))
        return result

    def _form_of_shared(self, known: Places, otherwise: Callable[[Array], Array]) -> Form:
        """What does an all_reduce_shared from now on; `otherwise` does those of other arrays."""
        assert self._node is not None
        deferred, settle, note = self._deferred, self._settle, self.counters.recent.append
        run, finish, kept = known.run, known.finish, known.kept
        works, pending = self._node.works, self._node.works.pending

        def form(array: Array, _: Array | None) -> Array:
            if deferred:
                settle()
            if not pending and not works.at_work:  # in this order: `Node.alone`
                found = run(array, array)
                if found != UNLIKE:
                    tally, result = kept[found if found >= 0 else finish(found, array, array)]
                    tally.calls += 1
                    note((monotonic(), tally.last))
                    assert result is not None
                    return result.view()
            return otherwise(array)

        return form

    def _keep_long(self, key: Key, array: Array, out: Array | None, result: Array) -> None:
        """Keep the plan of a call: for these addresses, if both arrays lie in the window; if neither does, for arrays
        that are like these and lie to each other as these do.
        """
        name, _, _, *detail = key
        node, plan = self._node, self._plans.get(self._plan_key(array, out, name, "auto", *detail))
        if node is None or plan is None or not small.able(node):
            return
        home, goal = node.arena.place(array), node.arena.place(result)
        if isinstance(plan.run, Windowed) and home is not None and goal is not None:
            self._keep_place(key, plan, plan.run, array, result)
        elif isinstance(plan.run, Meetings) and (plan.run.placed or (home is None and goal is None)):
            self._keep_distance(key, plan, plan.run, array, result)

    def _keep_place(self, key: Key, plan: Plan, run: Windowed, array: Array, result: Array) -> None:
        known = self._places.get(key)
        if known is None and self._node is not None:
            known = places(self._node, Like(array.shape, array.dtype), Like(result.shape, result.dtype))
            if known is None or not self._has_form(key, array.dtype, result.shape):
                return
            self._places[key] = known
        what = plan.collective, plan.algorithm, plan.nbytes, plan.volume
        if known is not None:
            known.add(array, result, run, what, self.counters)

    def _keep_distance(self, key: Key, plan: Plan, run: Meetings, array: Array, result: Array) -> None:
        longs = self._longs.setdefault(key, [])
        if len(longs) >= KNOWN_DISTANCES or not long.able(run) or not result.flags.carray:
            return
        if self._has_form(key, array.dtype, result.shape):
            tally = self.counters.tally(plan.collective, plan.algorithm, plan.nbytes, plan.volume)
            longs.append((Long(run, array, result), tally))

    def _has_form(self, key: Key, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Whether calls with this key have a form, which is made now if there is none."""
        if key not in self._forms and len(self._forms) < KNOWN_FORMS:
            self._forms[key] = self._long_form(key, dtype, shape)
        return key in self._forms

    def _long_form(self, key: Key, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Form:
        """What does a long call from now on; shape: of the result."""
        assert self._node is not None
        deferred, settle, note = self._deferred, self._settle, self.counters.recent.append
        works, pending, known_places = self._node.works, self._node.works.pending, self._places
        longs = self._longs.setdefault(key, [])
        name, _, _, *detail = key
        plans = getattr(super(), name)

        def form(array: Array, out: Array | None) -> Array:
            if deferred:
                settle()
            alone = not pending and not works.at_work  # in this order: `Node.alone`
            places = known_places.get(key) if alone and out is not None else None
            if places is not None and out is not None:
                found = places.run(array, out)
                if found != UNLIKE:
                    tally = places.kept[found if found >= 0 else places.finish(found, array, out)].tally
                    tally.calls += 1
                    note((monotonic(), tally.last))
                    return out
            if alone and longs:
                into = np.empty(shape, dtype) if out is None else out
                for known, tally in longs:
                    missed = known.run(array, into)
                    if not missed or known.finish(missed, array, into):
                        tally.calls += 1
                        note((monotonic(), tally.last))
                        return into
            result: Array = plans(array, *detail, out=out)
            if alone or not longs:
                self._keep_long(key, array, out, result)
            return result

        return form
