"""What a rank does between the synchronisations of a collective that comes again: copies, swaps, or a sum.

    copies   rows (source, begin there, begin in the target, bytes)
    swaps    rows (array of a peer, begin there, begin in mine, bytes)
    reads    rows (process, address there, begin there, begin in the target, bytes), or writes
    trades   rows (process, address there, begin there, begin in the target, bytes, done): swaps with other processes
    sum      inputs in rank order -> outputs, arrays in shared memory or the call's own

Each is there twice, with equal bits: as an action of machine code, which knows float32 and float64 sums and all else,
and in Python. What is new in every call are two addresses, those of its source and target: `aims` says where they go.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dtrain.collectives import cross_memory
from dtrain.collectives.copying import swap
from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import Action, machine_code
from dtrain.collectives.machine_reading import DONE
from dtrain.collectives.sums import past_caches, reduce_in_place, reduce_into


class Own(NamedTuple):
    """Elements of the call's own array from `begin` on."""

    of_target: bool
    begin: int


class Aim(NamedTuple):
    """table[word] = the address of the call's source or target, and so many bytes."""

    table: Array | None  # None: the action itself
    word: int
    of_target: bool
    nbytes: int


class Part(NamedTuple):
    """One part of a job."""

    python: Callable[[Array, Array], None]  # on the call's source and target, flat
    action: Action | None = None  # None: machine code does not know it
    aims: Sequence[Aim] = ()
    tables: Sequence[Array] = ()  # to which the action points


def copies(rows: Sequence[tuple[int, int, int, int]], past: bool = False, into: int | None = None) -> Part:
    """Rows (address of the source or 0: the call's own, where it begins there, where in the target, bytes).

    past: past the caches. into: the address of the target; by default it is the call's own.
    """
    table = np.array(rows, np.int64).reshape(-1, 4)
    code = machine_code()

    def python(source: Array, target: Array) -> None:
        goal = address(target) if into is None else into
        for there, begin, to, nbytes in table.tolist():
            ctypes.memmove(goal + to, (there or address(source)) + begin, nbytes)

    action = None if code is None else (code.parts["copies"], address(table), len(table), into or 0, 0, int(past), 0)
    aims = [Aim(None, 4, False, 0), *([Aim(None, 3, True, 0)] if into is None else [])]
    return Part(python, action, aims, [table])


def reads(rows: Sequence[tuple[int, int, int, int, int]], past: bool = False) -> Part:
    """Rows (process or 0: this one, address of the source there or 0: the call's own, where it begins there, where in
    the target, bytes). A process below zero: the target is copied there, into its opposite.

    past: what lies in this process goes past the caches.
    """
    table = np.array(rows, np.int64).reshape(-1, 5)
    code = machine_code()

    def python(source: Array, target: Array) -> None:
        for process, there, begin, to, nbytes in table.tolist():
            if process:
                move = cross_memory.read if process > 0 else cross_memory.write
                move(abs(process), there + begin, address(target) + to, nbytes)
            else:
                ctypes.memmove(address(target) + to, (there or address(source)) + begin, nbytes)

    action = None
    if code is not None and "reads" in code.parts:
        action = code.parts["reads"], address(table), len(table), 0, 0, int(past), 0
    return Part(python, action, [Aim(None, 4, False, 0), Aim(None, 3, True, 0)], [table])


def swaps(rows: Sequence[tuple[int, int, int, int]]) -> Part:
    """Rows (address of an array, where it begins there, where in the target, bytes): both change places there."""
    table = np.array(rows, np.int64).reshape(-1, 4)
    code = machine_code()

    def python(source: Array, target: Array) -> None:
        for there, begin, to, nbytes in table.tolist():
            swap(there + begin, address(target) + to, nbytes)

    action = None if code is None else (code.parts["swaps"], address(table), len(table), 0, 0, 0, 0)
    return Part(python, action, [Aim(None, 3, True, 0)], [table])


def trades(rows: Sequence[tuple[int, int, int, int, int]]) -> Part:
    """Rows (process or 0: this one, address there, where it begins there, where in the target, bytes): both change
    places there.
    """
    table = np.array([(*row, 0) for row in rows], np.int64).reshape(-1, DONE + 1)
    code = machine_code()

    def python(source: Array, target: Array) -> None:
        try:
            for process, there, begin, to, nbytes, done in table.tolist():  # machine code may have begun
                exchange = partial(cross_memory.swap, process) if process else swap
                exchange(there + begin + done, address(target) + to + done, nbytes - done)
        finally:
            table[:, DONE] = 0

    action = None
    if code is not None and "trades" in code.parts:
        action = code.parts["trades"], address(table), len(table), 0, 0, 0, 0
    return Part(python, action, [Aim(None, 3, True, 0)], [table])


def added(
    ufunc: np.ufunc, dtype: np.dtype, count: int, inputs: Sequence[Array | Own], outputs: Sequence[Array | Own] | None
) -> Part:
    """The sum of `count` elements of the inputs, in their order; outputs None: over each of them."""

    def python(source: Array, target: Array) -> None:
        def found(places: Sequence[Array | Own]) -> list[Array]:
            both = source, target
            return [both[at.of_target][at.begin :] if isinstance(at, Own) else at for at in places]

        if outputs is None:
            reduce_in_place(ufunc, found(inputs), 0, count)
        else:
            reduce_into(ufunc, found(inputs), 0, count, [result[:count] for result in found(outputs)])

    code = machine_code()
    if code is None or ufunc is not np.add or not dtype.isnative or dtype.char not in code.sums:
        return Part(python)
    aims: list[Aim] = []

    def addresses(places: Sequence[Array | Own]) -> Array:
        table = np.zeros(len(places), np.int64)
        for k, at in enumerate(places):
            if isinstance(at, Own):
                aims.append(Aim(table, k, at.of_target, at.begin * dtype.itemsize))
            else:
                table[k] = address(at)
        return table

    tables = [addresses(inputs)]
    if outputs is not None:
        tables.append(addresses(outputs))
    nbytes = count * dtype.itemsize
    past = outputs is not None and past_caches(len(inputs), nbytes)
    x, y = tables[0], tables[-1]
    action = code.parts[dtype.char], address(x), len(x), address(y), len(y), nbytes, int(past)
    return Part(python, action, aims, tables)
