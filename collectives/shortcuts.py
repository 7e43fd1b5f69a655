"""The way of short calls: from the arguments straight to a prepared form (`small.py`), past `Call` and the choice.

    first call   arguments -> Call -> choose -> run -> volume          the general way; if it went through the staging,
    from then    (name, shape, dtype, op) -> form -> run(array, out)   its form is kept, once the first are compared

A form stands for the built-in choice, which for so few bytes does not depend on where the arrays lie; a table of
`dtrain bench tune` is not asked about them (`Tuning.order`). So it does not matter which ranks have a form already.
"""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy import ndarray

from dtrain.collectives import small
from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import Array, cut
from dtrain.collectives.forms import NOTHING
from dtrain.collectives.letters import LENGTH, Block
from dtrain.collectives.long_calls import KNOWN_FORMS, Form, Key, LongCalls
from dtrain.collectives.node import Node
from dtrain.collectives.plans import PREPARED_COLLECTIVES
from dtrain.collectives.staged import SMALL_BYTES

if TYPE_CHECKING:
    from dtrain.collectives.choices import Own

# Up to here the built-in choice is the staging wherever the arrays lie; where a table of `dtrain bench tune` is in use,
# it is asked from SMALL_BYTES on. Longer sums take two synchronisations, as plans.
MOVED_BYTES = 64 * 1024
Result = TypeVar("Result", Array, Array | None)


class Shortcuts(LongCalls):
    """Plans, and prepared forms of what is short."""

    def all_reduce(self, array: Any, op: str = "sum", out: Array | None = None, algorithm: str = "auto") -> Array:
        """The sum over ranks of array (any shape), of the same shape and dtype, on every rank."""
        if algorithm != "auto" or type(array) is not ndarray:
            return super().all_reduce(array, op, out, algorithm)
        key = "all_reduce", array.shape, array.dtype, op
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().all_reduce(array, op, out)
        return self._keep(key, array, out, result, lambda node: small.all_reduce(node, array.shape, array.dtype, op))

    def reduce(
        self, array: Any, op: str = "sum", root: int = 0, out: Array | None = None, algorithm: str = "auto"
    ) -> Array | None:
        """The sum over ranks of array (any shape) on rank root; None on the others."""
        if algorithm != "auto" or type(array) is not ndarray:
            return super().reduce(array, op, root, out, algorithm)
        key = "reduce", array.shape, array.dtype, op, root
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().reduce(array, op, root, out)
        short = lambda node: small.all_reduce(node, array.shape, array.dtype, op, root)  # noqa: E731
        return self._keep(key, array, out, result, short)

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
        if algorithm != "auto" or counts is not None or type(array) is not ndarray:
            return super().reduce_scatter(array, op, out, algorithm, counts)
        key = "reduce_scatter", array.shape, array.dtype, op
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().reduce_scatter(array, op, out)

        def make(node: Node) -> small.Short:
            return small.reduce_scatter(node, array.shape, array.dtype, op, cut(len(array), node.size))

        return self._keep(key, array, out, result, make)

    def all_gather(
        self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None, algorithm: str = "auto"
    ) -> Array:
        """The arrays of all ranks, in rank order along dim 0: (n, ...) on each rank gives (n * size, ...).

        counts: the first dims of all ranks, where they differ.
        """
        if algorithm != "auto" or counts is not None or type(array) is not ndarray:
            return super().all_gather(array, out, counts, algorithm)
        key = "all_gather", array.shape, array.dtype
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().all_gather(array, out)
        return self._keep(key, array, out, result, lambda node: small.all_gather(node, array.shape, array.dtype))

    def gather(
        self,
        array: Any,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array | None:
        """The arrays of all ranks along dim 0, as `all_gather`, on rank root; None on the others."""
        if algorithm != "auto" or counts is not None or type(array) is not ndarray:
            return super().gather(array, root, out, counts, algorithm)
        key = "gather", array.shape, array.dtype, root
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().gather(array, root, out)
        short = lambda node: small.all_gather(node, array.shape, array.dtype, root)  # noqa: E731
        return self._keep(key, array, out, result, short)

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
        if algorithm != "auto" or counts is not None or out_counts is not None or type(array) is not ndarray:
            return super().all_to_all(array, out, counts, out_counts, algorithm)
        key = "all_to_all", array.shape, array.dtype
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().all_to_all(array, out)

        def make(node: Node) -> small.Short:
            return small.all_to_all(node, array.shape, array.dtype)

        return self._keep(key, array, out, result, make)

    def broadcast(self, array: Any, root: int = 0, out: Array | None = None, algorithm: str = "auto") -> Array:
        """The array of rank root on every rank; the others pass one of its shape and dtype to be ignored."""
        if algorithm != "auto" or type(array) is not ndarray:
            return super().broadcast(array, root, out, algorithm)
        if out is not array and array.nbytes > MOVED_BYTES:
            array = out = self._into_result(array, root, out)
        key = "broadcast", array.shape, array.dtype, root
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().broadcast(array, root, out)
        short = lambda node: small.broadcast(node, array.shape, array.dtype, root)  # noqa: E731
        return self._keep(key, array, out, result, short)

    def scatter(
        self,
        array: Any | None,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array:
        """My block of the array (n, ...) of rank root, cut along dim 0 as in `reduce_scatter`; others may pass None."""
        key: tuple[Any, ...] | None = None  # the others do not know what comes: what came last, perhaps
        if algorithm == "auto" and self.rank != root:
            key = "scatter", root
        elif algorithm == "auto" and counts is None and type(array) is ndarray:
            key = "scatter", root, array.shape, array.dtype
        form = self._forms.get(key)
        if form is not None:
            return form(array, out)  # type: ignore[no-any-return]
        result = super().scatter(array, root, out, counts, algorithm)
        if key is not None:
            self._keep_letter(key, root, array)
        return result

    def _keep_letter(self, key: tuple[Any, ...], root: int, array: Any) -> None:
        """Keep the form of a scatter that was one letter, as the one that comes next."""
        node, known = self._node, self._opened
        ran = [what[:2] for _, what in list(self.counters.recent)[-2:]]
        if node is None or known is None or known.block is None:
            return
        if ran != [("broadcast", "staged"), ("scatter", "letter")]:
            return
        if self.tuning is not None or not small.able(node) or not known.block.dtype.isnative:
            return
        head = *key, known.head.tobytes()
        form = self._forms.get(head)
        if form is None and len(self._forms) < KNOWN_FORMS:
            source = array if self.rank == root else NOTHING
            like = small.Like(source.shape, source.dtype)
            short = small.scatter(node, root, known.head, known.block, like)
            form = self._forms[head] = self._letter_form(key, short, known.block, root)
        if form is not None:
            self._forms[key] = form

    def _letter_form(self, key: tuple[Any, ...], short: small.Short, block: Block, root: int) -> Form:
        mine, give, scattered = self.rank == root, self._form(short, block.dtype, block.shape), super().scatter
        volume = Volume(1, LENGTH if mine else 0, 0 if mine else LENGTH)
        letters = self.counters.tally("broadcast", "staged", LENGTH, volume)

        def fits(out: Array) -> bool:
            return type(out) is ndarray and out.dtype is block.dtype and out.shape == block.shape and out.flags.carray

        def form(array: Any, out: Array | None) -> Array:
            if mine or out is None or fits(out):
                letters.calls += 1
                result: Array | None = give(array if mine else NOTHING, out)
                if result is not None:
                    return result
                self.counters.recent.append((monotonic(), letters.last))
                told = self._open_letter(short.slot(root), root, out)
                result = self._scattered(*told, None, root, out, "auto")
            else:  # for another letter, perhaps
                result = scattered(None, root, out)
            self._keep_letter(key, root, None)
            return result

        return form

    def barrier(self, algorithm: "str | Own" = "auto") -> None:
        """Return when all ranks have come here."""
        form = self._forms.get("barrier")
        if form is not None and algorithm == "auto":
            form(NOTHING, None)
            return
        super().barrier(algorithm)
        if self.node is not None and form is None and algorithm == "auto" and small.able(self.node):
            self._forms["barrier"] = self._form(small.barrier(self.node), NOTHING.dtype, None)

    def _keep(
        self, key: Key, array: Array, out: Array | None, result: Result, make: Callable[[Node], small.Short]
    ) -> Result:
        """The result; the form of a short call through the staging is kept, or that of a long one."""
        last = self.counters.last
        nbytes = array.nbytes * (self.size if key[0] in ("all_gather", "gather") else 1)
        limit = SMALL_BYTES if key[0] in ("all_reduce", "reduce") or self.tuning is not None else MOVED_BYTES
        if self._node is None or last is None or last[:2] != (key[0], "staged") or not 0 < nbytes <= limit:
            if result is not None and key[0] in PREPARED_COLLECTIVES:
                self._keep_long(key, array, out, result)
            return result
        if not array.dtype.isnative or len(self._forms) >= KNOWN_FORMS:
            return result
        if small.able(self._node):
            self._forms[key] = self._form(make(self._node), array.dtype, None if result is None else result.shape)
        return result

    def _form(self, short: small.Short, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> Form:
        """What does a short call from now on; shape: of the result, if there is one on this rank."""
        assert self._node is not None and self.counters.last is not None
        last, works = self.counters.last, self._node.works
        tally = self.counters.tally(*last, self.counters.volume_of_last)
        run, finish, then, pending = short.run, short.finish, short.then, works.pending
        deferred, settle, note = self._deferred, self._settle, self.counters.recent.append

        def form(array: Array, out: Array | None) -> Array | None:
            if shape is None:
                out = array
            elif out is None:
                out = np.empty(shape, dtype)
            if deferred:
                settle()
            if pending:
                works.progress()
            found = run(array, out)
            if found:
                if finish(found, array, out):
                    return None
            elif then is not None:
                then(out)
            tally.calls += 1
            note((monotonic(), last))
            return None if shape is None else out

        return form
