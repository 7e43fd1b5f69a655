"""What root tells the others before a scatter: who gets how much of what, and of a short array the rows themselves.

    letter   | form: rows, width, dtype, place | rows of all ranks, if they fit |        one broadcast of a fixed length

A form that comes again is looked up by its octets, on both sides, not spelled and read again.
"""

import json
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array

HEAD, ROOM = 512, 3584  # bytes; together they are a short broadcast
KNOWN = 256

Form = list[Any]


class Letter:
    """The letter of one communicator, to be broadcast between `write` and `read`."""

    def __init__(self) -> None:
        self.octets = np.zeros(HEAD + ROOM, np.uint8)
        self._written: dict[Hashable, tuple[Form, Array]] = {}
        self._read: dict[bytes, Form] = {}

    def write(self, key: Hashable, form: Callable[[], Form]) -> Form:
        """On root: the form that belongs to the key, which is made where it is not known, into the head."""
        known = self._written.get(key)
        if known is None:
            if len(self._written) >= KNOWN:
                self._written.clear()
            made = form()
            text = json.dumps(made).encode()
            head = np.frombuffer(text.ljust(HEAD, b"\0") if len(text) <= HEAD else bytes(HEAD), np.uint8)
            known = self._written[key] = made, head
        self.octets[:HEAD] = known[1]
        return known[0]

    def read(self) -> Form | None:
        """On the others; None: it was too long for the head, and follows."""
        head = self.octets[:HEAD].tobytes()
        form = self._read.get(head)
        if form is None and head[0]:
            if len(self._read) >= KNOWN:
                self._read.clear()
            form = self._read[head] = json.loads(head.rstrip(b"\0"))
        return form

    def enclose(self, source: Array) -> None:
        """On root: a flat array of at most ROOM bytes."""
        self.octets[HEAD : HEAD + source.nbytes] = source.view(np.uint8)

    def enclosed(self, begin: int, target: Array) -> None:
        """Target, flat = what is enclosed from byte `begin` on."""
        target[...] = self.octets[HEAD + begin : HEAD + begin + target.nbytes].view(target.dtype)
