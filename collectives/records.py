"""What collective number n of a rank is, in words that its peers can read: for checks and for reports.

    word   0        1           2                  3       4       5       6       7
           number   signature   name, how, op      dtype   count   place   extra   aside
                                (checksums)

A ring of them lies in the control segment of each rank, and after it a ring of texts: who called it. The signature is a
hash of the words 2 to 6, which must be equal on all ranks; `aside` is a place of this rank alone, which peers look up.
The numbers are part of no file and may change.
"""

import struct
import zlib
from typing import Any

import numpy as np

from dtrain.collectives import callers
from dtrain.collectives.arena import Place
from dtrain.collectives.waiting import FREE

RING, RECORD_WORDS, TEXT_BYTES = 256, 8, 192
RECORDS = FREE  # the word where the ring of records begins
TEXTS = 8 * (RECORDS + RING * RECORD_WORDS)  # the byte where that of the texts begins
END = TEXTS + RING * TEXT_BYTES
OPS = ("", "sum", "prod", "max", "min")
NO_PLACE: Place = (-1, 0)
IN_PLACE = {"window": "window, in place", "cma": "cma, in place"}  # how: where the others must know it
SIGNATURE, ASIDE = 1, 7
_BITS = (1 << 24) - 1

_spelling: dict[int, str] = {}  # checksum -> word, of all words met so far
_sums: dict[str, int] = {}
_dtype_codes: dict[np.dtype[Any], int] = {}

# signature, code, dtype, count, place, extra
Record = tuple[int, int, int, int, int, int]
WHERE = 4  # the place, packed
pack = struct.Struct("=8q").pack_into


def record(
    name: str,
    algorithm: str,
    op: str = "",
    dtype: np.dtype[Any] | None = None,
    count: int = 0,
    place: Place = NO_PLACE,
    extra: int = 0,
) -> Record:
    """The words of a collective, all but its number and what is aside."""
    code = _sum(name) | _sum(algorithm) << 24 | OPS.index(op) << 48
    kind = 0 if dtype is None else _dtype_code(dtype)
    where = packed(place)
    return hash((code, kind, count, where, extra)), code, kind, count, where, extra


def packed(place: Place) -> int:
    """A place in one word; NO_PLACE is negative."""
    return place[0] << 48 | place[1]


def unpacked(word: int) -> Place | None:
    """The inverse of `packed`."""
    return None if word < 0 else (word >> 48, word & (1 << 48) - 1)


def slot(number: int) -> int:
    """The word where the record of collective `number` begins."""
    return RECORDS + RECORD_WORDS * (number % RING)


def describe(words: memoryview, number: int) -> str:
    """A text about collective `number` of the rank with these words."""
    found, _, code, kind, count, where, _, _ = words[slot(number) : slot(number) + RECORD_WORDS]
    if found != number:
        return f"collective #{number}"
    details = [f"algorithm {_word(code >> 24 & _BITS)}"]
    if code >> 48:
        details.append(OPS[code >> 48])
    if kind:
        details.append(f"{count} elements of dtype {chr(kind >> 8)}{kind & 255}")
    if where >= 0:
        details.append(f"at byte {where & (1 << 48) - 1} of segment {where >> 48}")
    return f"{_word(code & _BITS)} #{number} ({', '.join(details)})"


def _sum(word: str) -> int:
    """A word in 24 bits, the same in every process."""
    found = _sums.get(word)
    if found is None:
        found = _sums[word] = zlib.crc32(word.encode()) & _BITS
        _spelling[found] = word
    return found


def _word(number: int) -> str:
    """The word, if this process has met it or it stands in a table; a peer may have an algorithm of its user's own."""
    if number not in _spelling:
        from dtrain.collectives.algorithms import TABLES
        from dtrain.collectives.schedules.catalogue import ALGORITHMS

        for tables in (TABLES, ALGORITHMS):
            for name, rows in tables.items():
                for word in (name, *rows, "barrier", "none", "all_reduce_shared", *IN_PLACE.values()):
                    _sum(word)
    return _spelling.get(number, "of another name")


def write_text(octets: memoryview, number: int) -> None:
    """Who called collective `number`: the line of the user's program, and the call."""
    caller = callers.here()
    text = f" at {caller.line}, {caller.call}".encode(errors="replace")[:TEXT_BYTES]
    del caller  # its frames, this one among them, would live on in a circle, and with them the arrays they name
    begin = TEXTS + TEXT_BYTES * (number % RING)
    octets[begin : begin + TEXT_BYTES] = text.ljust(TEXT_BYTES, b"\0")


def read_text(octets: memoryview, number: int) -> str:
    """What `write_text` wrote."""
    begin = TEXTS + TEXT_BYTES * (number % RING)
    return bytes(octets[begin : begin + TEXT_BYTES]).rstrip(b"\0").decode(errors="replace")


def _dtype_code(dtype: np.dtype[Any]) -> int:
    """Kind and size in one number, the same in every process."""
    code = _dtype_codes.get(dtype)
    if code is None:
        code = _dtype_codes[dtype] = ord(dtype.kind) << 8 | min(dtype.itemsize, 255)
    return code
