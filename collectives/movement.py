"""The movements that return when they are done: all_gather, all_to_all, broadcast, gather, scatter, and small values.

The methods `_..._call` bring arguments into the form of a `Call`; the non-blocking twins use the same ones.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives import algorithms, device
from dtrain.collectives.call import Call
from dtrain.collectives.counters import Volume
from dtrain.collectives.device import ON_GPU, on_gpu
from dtrain.collectives.dtypes import Array, address, dtype_from_name, dtype_name, starts
from dtrain.collectives.forms import (
    NOTHING,
    apart,
    as_rows,
    check_rank,
    deliver,
    destination,
    elements,
    flat,
    rows_brought,
    rows_per_rank,
    swapped,
    target_of,
)
from dtrain.collectives.group import Group
from dtrain.collectives.letters import ROOM, Form, Known, Letter


class Movement(Group):
    """A group that hands around."""

    _letter: Letter | None = None
    _opened: Known | None = None  # the last letter

    def all_gather(
        self, array: Any, out: Array | None = None, counts: Sequence[int] | None = None, algorithm: str = "auto"
    ) -> Array:
        """The arrays of all ranks, in rank order along dim 0: (n, ...) on each rank gives (n * size, ...).

        counts: the first dims of all ranks, where they differ.
        """
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_gather(array, out, counts, algorithm)  # type: ignore[no-any-return]
        call, result = self._all_gather_call(as_rows(array), out, counts)
        self._settle()
        self._run("all_gather", algorithms.ALL_GATHER, algorithm, call)
        return deliver(call.target, result)

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
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.all_to_all(array, out, counts, out_counts, algorithm)  # type: ignore[no-any-return]
        call, result = self._all_to_all_call(as_rows(array), out, counts, out_counts)
        self._run("all_to_all", algorithms.ALL_TO_ALL, algorithm, call, empty=call.alike and not len(call.source))
        return deliver(call.target, result)

    def broadcast(self, array: Any, root: int = 0, out: Array | None = None, algorithm: str = "auto") -> Array:
        """The array of rank root on every rank; the others pass one of its shape and dtype to be ignored."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.broadcast(array, root, out, algorithm)  # type: ignore[no-any-return]
        self._settle()
        call, result = self._broadcast_call(np.asarray(array), root, out)
        self._run("broadcast", algorithms.BROADCAST, algorithm, call)
        return deliver(call.target, result)

    def gather(
        self,
        array: Any,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array | None:
        """The arrays of all ranks along dim 0, as `all_gather`, on rank root; None on the others."""
        if type(array) is not np.ndarray and on_gpu(array):
            return self.gpu.gather(array, root, out, counts, algorithm)  # type: ignore[no-any-return]
        call, result = self._gather_call(as_rows(array), root, out, counts)
        self._run("gather", algorithms.GATHER, algorithm, call, empty=not sum(call.counts))
        return None if result is None else deliver(call.target, result)

    def scatter(
        self,
        array: Any | None,
        root: int = 0,
        out: Array | None = None,
        counts: Sequence[int] | None = None,
        algorithm: str = "auto",
    ) -> Array:
        """My block of the array (n, ...) of rank root, cut along dim 0 as in `reduce_scatter`; others may pass None."""
        told = self._scatter_form(array, root, out, counts, algorithm == "auto")
        return self._scattered(*told, array, root, out, algorithm)

    def _scattered(
        self, form: Form, enclosed: Array | None, array: Any | None, root: int, out: Array | None, algorithm: str
    ) -> Array:
        """My rows, once root has told the others."""
        if enclosed is not None:
            return enclosed
        if form.place == ON_GPU:
            return self.gpu.scatter(array, root, out, form)  # type: ignore[no-any-return]
        call, result = self._scatter_call(array, root, out, form)
        self._run("scatter", algorithms.SCATTER, algorithm, call, empty=not sum(call.counts))
        return deliver(call.target, result)

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

    # From arguments to calls

    def _all_gather_call(self, array: Array, out: Array | None, counts: Sequence[int] | None) -> tuple[Call, Array]:
        rows = rows_brought(array, counts, self.rank, self.size)
        result = destination(out, (sum(rows), *array.shape[1:]), array.dtype)
        node, place, lengths = self.node, self._place(array), elements(rows, array.shape)
        source, target = apart(array, result, place is not None, self._own_block(lengths, place))
        return Call(self.transport, node, source, target, counts=lengths, place=place), result

    def _broadcast_call(self, array: Array, root: int, out: Array | None) -> tuple[Call, Array]:
        check_rank("root", root, self.size)
        result = destination(out, array.shape, array.dtype)
        target = target_of(result)
        if self.rank == root and target.size:
            source = flat(array)
            if address(source) != address(target):
                np.copyto(target, source)
        node = self.node
        return Call(self.transport, node, target, target, root=root, place=self._place(target)), result

    def _all_to_all_call(
        self, array: Array, out: Array | None, counts: Sequence[int] | None, out_counts: Sequence[int] | None
    ) -> tuple[Call, Array]:
        """Asks the others for out_counts where they must be known and are not given."""
        rows = rows_per_rank("counts", counts, len(array), self.size)
        self._settle()
        if out_counts is not None:
            received = rows_per_rank("out_counts", out_counts, None, self.size)
        elif counts is None:
            received = [rows[self.rank]] * self.size
        else:
            asked = np.array(rows, np.int64)
            received = self.all_to_all(asked).tolist()
        result = destination(out, (sum(received), *array.shape[1:]), array.dtype)
        node, place = self.node, self._place(array)
        alike = counts is None and out_counts is None
        source, target, same = swapped(array, result, place is not None, alike and rows[0] == rows[-1])
        call = Call(self.transport, node, source, target, counts=elements(rows, array.shape), place=place)
        call.out_counts = elements(received, array.shape)
        call.alike, call.in_place = alike, same
        return call, result

    def _gather_call(
        self, array: Array, root: int, out: Array | None, counts: Sequence[int] | None
    ) -> tuple[Call, Array | None]:
        check_rank("root", root, self.size)
        rows = rows_brought(array, counts, self.rank, self.size)
        self._settle()
        node, place, lengths = self.node, self._place(array), elements(rows, array.shape)
        result = None
        if self.rank == root:
            result = destination(out, (sum(rows), *array.shape[1:]), array.dtype)
            source, target = apart(array, result, place is not None, self._own_block(lengths, place))
        else:
            source, target = flat(array), NOTHING
        call = Call(self.transport, node, source, target, counts=lengths, root=root, place=place)
        call.target_place = self._place(target)
        return call, result

    def _scatter_form(
        self, array: Any | None, root: int, out: Array | None, counts: Sequence[int] | None, enclose: bool
    ) -> tuple[Form, Array | None]:
        """What root tells the others, and my rows, if they came with it, as they may."""
        check_rank("root", root, self.size)
        self._settle()
        if self._letter is None:
            self._letter = Letter(self.rank)
        letter, known = self._letter, None
        if self.rank == root:
            on_device = type(array) is not np.ndarray and on_gpu(array)
            array = device.as_rows(array) if on_device else as_rows(array)
            enclose = enclose and not on_device and 0 < array.nbytes <= ROOM and self.size > 1
            place: Any = ON_GPU if on_device else None if enclose or self.node is None else self._place(array)
            given = None if counts is None else tuple(counts)

            def form() -> Form:
                rows, dtype = rows_per_rank("counts", counts, len(array), self.size), np.dtype(array.dtype)
                return Form(rows, list(array.shape[1:]), dtype_name(dtype), place, enclose)

            known = letter.write((array.shape, array.dtype, given, place, enclose), form)
            if enclose:
                letter.enclose(flat(array))
        octets = self.broadcast(letter.octets, root, letter.octets)
        return self._open_letter(octets, root, out, known)

    def _open_letter(
        self, octets: Array, root: int, out: Array | None, known: Known | None = None
    ) -> tuple[Form, Array | None]:
        """The form that came, and my rows, if they came with it. Root knows it."""
        assert self._letter is not None
        self._opened = known = known or self._letter.read(octets)
        if known is None or not octets[0]:
            return Form(*self.broadcast_object(known and known.form, root)), None
        block = known.block
        if block is None:
            return known.form, None
        self.counters.add("scatter", "letter", block.of if self.rank == root else block.nbytes, Volume(0, 0, 0))
        return known.form, block.read(octets, out)

    def _scatter_call(self, array: Any | None, root: int, out: Array | None, form: Form) -> tuple[Call, Array]:
        rows, width, name, place, _ = form
        result = destination(out, (rows[self.rank], *width), dtype_from_name(name))
        if self.rank == root:
            source, target = apart(as_rows(array), result, place is not None)
        else:
            source, target = NOTHING, target_of(result)
        call = Call(self.transport, self.node, source, target, counts=elements(rows, (0, *width)), root=root)
        call.place = None if place is None else (place[0], place[1])
        return call, result
