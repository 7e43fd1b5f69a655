"""One safetensors file: written in one pass with checksums, read through a memory map.

    8 bytes: n | n bytes of JSON: {"key": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} | data

The format is https://github.com/huggingface/safetensors#format; its library reads what is written here and the other
way round (the tests do both). Writing is done here because the library takes whole contiguous arrays: a checkpoint
streams slices of any strides without a copy of more than CHUNK bytes, and sums each chunk while it is in the cache.

Invariant: the data are the arrays one after the other, without holes, widest elements first, so all of them are
aligned.
"""

import json
import math
import mmap
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.arrays import Array

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The name of a dtype in NumPy -> in the file."""
NAMES = {code: name for name, code in CODES.items()}
CHUNK = 1 << 20
"""Bytes between two writes: fits the cache, so the checksum costs no second trip to memory."""
_HEADER_LIMIT = 100_000_000  # that of the library


class FormatError(ValueError):
    """The file is not a safetensors file, or a damaged one."""


def dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of one of the names in CODES."""
    scalar: Any = name
    if name == "bfloat16":
        import ml_dtypes

        scalar = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(scalar)
    return found


def itemsize(name: str) -> int:
    """Bytes of an element, without importing ml_dtypes."""
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """An array to be written: `source()` gives it when its turn comes, so not all of them need be in memory at once."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: sizes in bytes, CRC-32 sums of the header (with its length) and of every array."""

    nbytes: int
    header_bytes: int
    header_crc32: int
    crc32: dict[str, int]


def header(entries: list[Entry], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[Entry]]:
    """The first bytes of a file with these arrays, and the arrays in the order in which the file has them."""
    order = sorted(entries, key=lambda entry: (-itemsize(entry.dtype), entry.key))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in order:
        if entry.key in table or entry.key == "__metadata__":
            raise ValueError(f"safetensors: the key {entry.key!r} is reserved or used twice")
        end = offset + entry.nbytes
        table[entry.key] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # then the data are aligned
    return len(text).to_bytes(8, "little") + text, order


def write(path: Path, entries: list[Entry], metadata: Mapping[str, str] | None = None) -> Written:
    """Write a new file and force it to the disk. OSError when that fails."""
    first, order = header(entries, metadata)
    sums = {}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, memoryview(first))
        for entry in order:
            array = entry.source()
            if array.shape != entry.shape or array.dtype.name != entry.dtype:
                raise ValueError(
                    f"{entry.key}: {array.dtype.name} {array.shape}, announced {entry.dtype} {entry.shape}"
                )
            crc = 0
            for block in blocks(array):
                crc = zlib.crc32(block, crc)
                _write_all(descriptor, block)
            sums[entry.key] = crc
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(len(first) + sum(entry.nbytes for entry in order), len(first), zlib.crc32(first), sums)


def blocks(array: Array) -> Iterator[memoryview]:
    """The bytes of an array, row-major and little-endian, in blocks of about CHUNK; only strided ones are copied."""
    if array.size == 0:
        return
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    if not array.flags.c_contiguous and array.nbytes > CHUNK and array.ndim:
        rows = max(1, CHUNK * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            yield from blocks(array[start] if rows == 1 else array[start : start + rows])
        return
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(octets), CHUNK):
        yield octets[start : start + CHUNK]


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Mapped:
    """A file open for reading; arrays come as views of the memory map, pages are read when they are touched.

    FormatError when the file is damaged, OSError when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise FormatError(f"{path}: not a safetensors file: shorter than 8 bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.nbytes = len(self._map)
        self.header_bytes = 8 + int.from_bytes(self._map[:8], "little")
        if self.header_bytes > min(self.nbytes, _HEADER_LIMIT):
            raise FormatError(f"{path}: not a safetensors file: a header of {self.header_bytes} bytes")
        self.header_crc32 = zlib.crc32(self._map[: self.header_bytes])
        self.entries = self._parse()

    def _parse(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """By key: (dtype, shape, offset in the file)."""
        entries = {}
        try:
            table = json.loads(self._map[8 : self.header_bytes])
            for key, row in table.items():
                if key == "__metadata__":
                    continue
                name = NAMES[row["dtype"]]
                shape = tuple(map(operator.index, row["shape"]))
                start, end = map(operator.index, row["data_offsets"])
                if min((*shape, start), default=0) < 0 or end - start != math.prod(shape) * itemsize(name):
                    raise FormatError(f"{self.path}: the offsets of {key!r} do not fit its shape")
                if self.header_bytes + end > self.nbytes:
                    raise FormatError(f"{self.path}: {key!r} ends after the end of the file")
                entries[key] = (name, shape, self.header_bytes + start)
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{self.path}: not a safetensors file: its header is no table of arrays ({error})"
            ) from None
        return entries

    def array(self, key: str) -> Array:
        """A read-only view of the array `key`; it keeps the map alive."""
        name, shape, offset = self.entries[key]
        if 0 in shape:
            return np.empty(shape, dtype(name))
        flat = np.frombuffer(self._map, dtype(name), count=math.prod(shape), offset=offset)
        return flat.reshape(shape)

    def crc32(self, key: str) -> int:
        """The CRC-32 of the bytes of the array `key`; reads all of them."""
        name, shape, offset = self.entries[key]
        with memoryview(self._map) as view, view[offset : offset + math.prod(shape) * itemsize(name)] as part:
            return zlib.crc32(part)
