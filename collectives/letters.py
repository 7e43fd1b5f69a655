"""What root tells the others before a scatter: who gets how much of what, and of a short array the rows themselves.

    letter   | form: rows, width, dtype, place | rows of all ranks, if they fit |        one broadcast of a fixed length

A form that comes again is looked up by its octets, on both sides, not spelled and read again. On one node a letter
that comes again is one short call: root lays down what is in it, not its whole length, and each takes its block.
"""

import json
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.dtypes import Array, dtype_from_name
from dtrain.collectives.forms import destination
from dtrain.collectives.staging import SHORT

HEAD = 512  # bytes
LENGTH = SHORT.nbytes  # of a letter, which is a short broadcast
ROOM = LENGTH - HEAD
KNOWN = 256


class Form(NamedTuple):
    """What there is to know of a scatter."""

    rows: list[int]  # of each rank
    width: list[int]  # the shape of a row
    dtype: str
    place: Any  # where the array of root lies in the window, or that it is on a GPU
    enclosed: bool


class Block:
    """The rows of one rank in a letter."""

    def __init__(self, form: Form, rank: int) -> None:
        dtype = dtype_from_name(form.dtype)
        row = int(np.prod(form.width, dtype=np.int64)) * dtype.itemsize
        count = form.rows[rank]
        self.shape, self.dtype, self.nbytes = (count, *form.width), dtype, count * row
        self.begin = HEAD + sum(form.rows[:rank]) * row
        self.of = sum(form.rows) * row
        """Bytes of the rows of all ranks."""
        self._laid = dtype if dtype.isnative else dtype.newbyteorder("=")  # as in `forms.flat`

    def read(self, octets: Array, out: Array | None) -> Array:
        """Out, or a new array, with the rows in it."""
        if out is None:
            out = np.empty(self.shape, self.dtype)
        else:
            destination(out, self.shape, self.dtype)
        out[...] = octets[self.begin : self.begin + self.nbytes].view(self._laid).reshape(self.shape)
        return out


class Known(NamedTuple):
    """What came before."""

    form: Form
    block: Block | None  # of this rank, if it is enclosed
    head: Array


class Letter:
    """The letter of one communicator, to be broadcast between `write` and `read`."""

    def __init__(self, rank: int) -> None:
        self.octets = np.zeros(LENGTH, np.uint8)
        self._rank = rank
        self._written: dict[Hashable, Known] = {}
        self._read: dict[bytes, Known] = {}

    def write(self, key: Hashable, form: Callable[[], Form]) -> Known:
        """On root: the form that belongs to the key, which is made where it is not known, into the head."""
        known = self._written.get(key)
        if known is None:
            if len(self._written) >= KNOWN:
                self._written.clear()
            made = form()
            text = json.dumps(made).encode()
            known = self._written[key] = self._known(made, text if len(text) <= HEAD else b"")
        self.octets[:HEAD] = known.head
        return known

    def read(self, octets: Array) -> Known | None:
        """On the others, of what came; None: the form was too long for the head, and follows."""
        head = octets[:HEAD].tobytes()
        known = self._read.get(head)
        if known is None:
            if not head[0]:
                return None
            if len(self._read) >= KNOWN:
                self._read.clear()
            known = self._read[head] = self._known(Form(*json.loads(head.rstrip(b"\0"))), head)
        return known

    def enclose(self, source: Array) -> None:
        """On root: a flat array of at most ROOM bytes."""
        self.octets[HEAD : HEAD + source.nbytes] = source.view(np.uint8)

    def _known(self, form: Form, head: bytes) -> Known:
        block = Block(form, self._rank) if form.enclosed else None
        return Known(form, block, np.array(bytearray(head.ljust(HEAD, b"\0")), np.uint8))
