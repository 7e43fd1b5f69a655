"""What root tells the others before a scatter: who gets how much of what, and of a short array the rows themselves.

    letter   | form: rows, width, dtype, place | rows of all ranks, if they fit |        one broadcast of a fixed length

A form that comes again is looked up by its octets, on both sides, not spelled and read again. On one node root lays
down what is in the letter, not its whole length, and the others read it where it lies (`shortcuts.py`).
"""

import json
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives.dtypes import Array, dtype_from_name
from dtrain.collectives.forms import destination
from dtrain.collectives.staging import SHORT

HEAD = 512  # bytes
ROOM = SHORT.nbytes - HEAD  # together they are a short broadcast
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
        begin, count = HEAD + sum(form.rows[:rank]) * row, form.rows[rank]
        self.shape, self.dtype = (count, *form.width), dtype
        self.nbytes = count * row
        self._laid = dtype if dtype.isnative else dtype.newbyteorder("=")  # as in `forms.flat`
        self._cut = slice(begin, begin + self.nbytes)

    def read(self, octets: Array, out: Array | None) -> Array:
        """Out, or a new array, with the rows in it."""
        if out is None:
            out = np.empty(self.shape, self.dtype)
        else:
            destination(out, self.shape, self.dtype)
        out[...] = octets[self._cut].view(self._laid).reshape(self.shape)
        return out


Known = tuple[Form, Block | None]  # the block of this rank, if it is enclosed


class Letter:
    """The letter of one communicator, to be broadcast between `write` and `read`."""

    def __init__(self, rank: int) -> None:
        self.octets = np.zeros(HEAD + ROOM, np.uint8)
        self._rank = rank
        self._written: dict[Hashable, tuple[Known, Array]] = {}
        self._read: dict[bytes, Known] = {}

    def write(self, key: Hashable, form: Callable[[], Form]) -> Known:
        """On root: the form that belongs to the key, which is made where it is not known, into the head."""
        known = self._written.get(key)
        if known is None:
            if len(self._written) >= KNOWN:
                self._written.clear()
            made = form()
            text = json.dumps(made).encode()
            head = np.frombuffer(text.ljust(HEAD, b"\0") if len(text) <= HEAD else bytes(HEAD), np.uint8)
            known = self._written[key] = self._known(made), head
        self.octets[:HEAD] = known[1]
        return known[0]

    def read(self, octets: Array) -> Known | None:
        """On the others, of what came; None: the form was too long for the head, and follows."""
        head = octets[:HEAD].tobytes()
        known = self._read.get(head)
        if known is None and head[0]:
            if len(self._read) >= KNOWN:
                self._read.clear()
            known = self._read[head] = self._known(Form(*json.loads(head.rstrip(b"\0"))))
        return known

    def enclose(self, source: Array) -> None:
        """On root: a flat array of at most ROOM bytes."""
        self.octets[HEAD : HEAD + source.nbytes] = source.view(np.uint8)

    def _known(self, form: Form) -> Known:
        return form, Block(form, self._rank) if form.enclosed else None
