"""all_reduce of a few numbers, prepared once per (shape, dtype, op): one synchronisation and little Python.

    copy mine into my slot  ->  ARRIVED  ->  everybody adds up all slots, in rank order

The same steps, records and results as the short form in `staged.py`, so ranks may mix both. Kept here is what never
changes from call to call: the views of the slots, the record, the volume.
"""

from typing import Any

import numpy as np

from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator
from dtrain.collectives.node import Node


class SmallAllReduce:
    """The sum over ranks of arrays of one shape, dtype and length of at most `staged.SMALL_BYTES`."""

    def __init__(self, node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], op: str) -> None:
        count = int(np.prod(shape, dtype=np.int64))
        self._node = node
        self._ufunc = OPERATIONS[op]
        self._wide = accumulator(dtype)
        self._narrow = self._wide != dtype
        self._careful = dtype.kind in "fc" or self._narrow
        self._record = node.record("all_reduce", "staged", op, dtype, count, extra=-1)
        self._slots = [[slot[:count].reshape(shape) for slot in node.slots(half, dtype)] for half in (0, 1)]
        self.volume = Volume(1, count * dtype.itemsize, (node.size - 1) * count * dtype.itemsize)
        self.nbytes = count * dtype.itemsize

    def run(self, source: Array, target: Array) -> None:
        """Target = the sum of the ranks' sources; both of the shape, any layout, target may be or overlap source."""
        node = self._node
        number = node.begin_record(self._record)
        slots = self._slots[node.next_half(number)]
        slots[node.rank][...] = source
        node.arrive(number)
        node.await_arrived(number)
        if self._careful:  # a sum beyond the largest number is infinity, as in MPI: never a warning on one rank
            with np.errstate(all="ignore"):
                self._add(slots, target)
        else:
            self._add(slots, target)

    def _add(self, slots: list[Array], target: Array) -> None:
        ufunc = self._ufunc
        if self._narrow:
            total = slots[0].astype(self._wide)
            for slot in slots[1:]:
                total = ufunc(total, slot.astype(self._wide))
            target[...] = total
            return
        ufunc(slots[0], slots[1], out=target)
        for slot in slots[2:]:
            ufunc(target, slot, out=target)
