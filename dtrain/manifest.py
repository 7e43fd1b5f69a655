"""The table of contents of a checkpoint: which slice of which global tensor lies in which file.

    manifest.json
    {"format": "dtrain-checkpoint", "version": 1, "serial": 3, "saved": 1767225600.0,
     "tensors": {"head.weight": {"kind": "parameter", "dtype": "float32", "shape": [256, 64], "slices": [
         {"file": "model-00000-of-00002.safetensors", "key": "head.weight[0:128,0:64]",
          "start": [0, 0], "shape": [128, 64], "crc32": 305419896}, ...]}},
     "files": {"model-00000-of-00002.safetensors": {"bytes": ..., "header_bytes": ..., "header_crc32": ...}},
     "state": {"step": 100, ...}, "versions": {"dtrain": ..., "numpy": ..., "python": ...}, "ranks": 2}

Invariant: the slices of a tensor cover each of its elements exactly once, and header and slices cover each byte of a
file. A manifest may come from elsewhere: nothing in it is believed before `parse` has checked it, and a file name is
only that.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from dtrain.errors import UserError
from dtrain.safetensors_file import CODES, itemsize

MANIFEST = "manifest.json"
VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Start and stop of a slice, per dim."""
Kind = Literal["parameter", "optimizer", "strategy"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Slice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block of a tensor: elements start .. start + shape, under `key` in `file`; crc32 of its bytes."""

    file: str
    key: str
    start: tuple[Count, ...]
    shape: tuple[Count, ...]
    crc32: Count

    @property
    def stop(self) -> tuple[int, ...]:
        """The end of the block, per dim."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A global tensor; a tensor without elements has no slices."""

    kind: Kind
    dtype: str
    shape: tuple[Count, ...]
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file: its length, and the length and CRC-32 of its header."""

    bytes: Count
    header_bytes: Count
    header_crc32: Count


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of manifest.json. `serial` counts the checkpoints of a run, `saved` is in seconds since 1970."""

    format: Literal["dtrain-checkpoint"] = "dtrain-checkpoint"
    version: int = VERSION
    serial: Count
    saved: float
    ranks: Count
    versions: dict[str, str]
    state: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


class _Head(msgspec.Struct, frozen=True):
    """What is read before all else, whatever the version."""

    format: str
    version: int
    serial: int = 0


def load(folder: Path) -> Manifest:
    """The checked manifest of a checkpoint. A UserError says what is wrong with it."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a checkpoint is a folder with this file in it") from None
    return parse(content, path)


def serial(folder: Path) -> int:
    """The serial number of a checkpoint, 0 if its manifest cannot be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Head).serial
    except (OSError, msgspec.MsgspecError, RecursionError):
        return 0


def parse(content: bytes, path: Path) -> Manifest:
    """A manifest from its text; `path` is named in the errors."""
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format == "dtrain-checkpoint" and head.version > VERSION:
            raise UserError(f"{path}: version {head.version}, from a newer dtrain; this one reads up to {VERSION}")
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UserError(f"{path}: not the manifest of a checkpoint, or a damaged one: {error}") from None
    try:
        _check(manifest)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return manifest


def _check(manifest: Manifest) -> None:
    size = {}
    for file, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(file):
            raise ValueError(f"files: {file!r} is not a plain name that ends in .safetensors")
        size[file] = entry.header_bytes
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in CODES:
            raise ValueError(f"tensors: {name}: dtype {tensor.dtype!r}; known: {', '.join(CODES)}")
        for part in tensor.slices:
            if part.file not in size:
                raise ValueError(f"tensors: {name}: its file {part.file!r} is not among the files")
            if len(part.start) != len(tensor.shape) or len(part.shape) != len(tensor.shape):
                raise ValueError(f"tensors: {name}: a slice has not the {len(tensor.shape)} dims of the tensor")
            size[part.file] += math.prod(part.shape) * itemsize(tensor.dtype)
        check_tiling(name, tensor.shape, [(part.start, part.stop) for part in tensor.slices])
    for file, entry in manifest.files.items():
        if size[file] != entry.bytes:
            raise ValueError(f"files: {file}: {entry.bytes} bytes, but header and slices have {size[file]}")


def check_tiling(name: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """ValueError naming tensor and region unless the boxes cover every element of `shape` exactly once."""
    for start, stop in boxes:
        if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, shape, strict=True)):
            raise ValueError(f"{name}: the slice {region(start, stop)} is empty or outside of the shape {list(shape)}")
    if 0 in shape:
        return
    flaw = _flaw(list(boxes), tuple(shape), 0)
    if flaw is not None:
        count, box = flaw
        what = "no slice has" if count == 0 else f"{count} slices have"
        raise ValueError(f"{name}: {what} {region(*box)} of the shape {list(shape)}")


def _flaw(boxes: list[Box], shape: tuple[int, ...], dim: int) -> tuple[int, Box] | None:
    """A region that not exactly one box covers, with the number of those that do.

    Cut at all edges along `dim`; within a slab every box goes from end to end, so only the later dims matter.
    """
    if dim == len(shape):
        return None if len(boxes) == 1 else (len(boxes), ((), ()))
    waiting = sorted(boxes, key=lambda box: box[0][dim], reverse=True)
    edges = sorted({0, shape[dim], *(box[0][dim] for box in boxes), *(box[1][dim] for box in boxes)})
    slab: list[Box] = []
    for low, high in pairwise(edges):
        slab = [box for box in slab if box[1][dim] > low]
        while waiting and waiting[-1][0][dim] == low:
            slab.append(waiting.pop())
        flaw = _flaw(slab, shape, dim + 1) if slab else (0, ((0,) * (len(shape) - dim - 1), shape[dim + 1 :]))
        if flaw is not None:
            count, (start, stop) = flaw
            return count, ((low, *start), (high, *stop))
    return None


def region(start: Sequence[int], stop: Sequence[int]) -> str:
    """As NumPy writes it: [0:4,2:3]."""
    return "[" + ",".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
