"""Saving checkpoints: every rank writes its share, and the whole is complete or not there.

    all ranks   names, shapes, slices of all pieces are gathered; the same plan is computed everywhere
    rank 0      makes .step_00000100.partial/
    all ranks   write at most one file each into it, summed and forced to the disk; they tell one another how it went
    rank 0      writes manifest.json, forces files and folder to the disk, renames to step_00000100/, removes the oldest

A checkpoint knows names, global shapes and slices, not ranks: what one layout wrote, any other reads
(`checkpoint_reader.py`).

Invariant: a folder step_* appears by one rename, after everything in it is on the disk. If a rank cannot write, all
ranks raise the same UserError, nothing of the new checkpoint stays, and the earlier ones are untouched. A killed save
leaves a hidden folder, which the next save removes. The folder must be on a file system that the hosts share.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import numpy as np

from dtrain import __version__, manifest, safetensors_file
from dtrain.arrays import Array
from dtrain.checkpoint_folder import SharedFolder, write_synced
from dtrain.checkpoint_reader import Reader, check_names, folders, latest, scan
from dtrain.collectives import Communicator
from dtrain.manifest import MANIFEST, FileEntry, Kind, Manifest, Slice, TensorEntry, check_tiling, region
from dtrain.safetensors_file import CODES, Entry, itemsize

__all__ = ["Piece", "Reader", "check_names", "latest", "save", "scan"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank holds of a global tensor: the elements start .. start + array.shape of global_shape.

    kind is "parameter", "optimizer" for its state, or "strategy" for what only that strategy looks for; `dtrain
    checkpoint export` leaves out the last two.
    """

    name: str
    array: Array
    start: tuple[int, ...]
    global_shape: tuple[int, ...]
    kind: str = "parameter"


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of the plan, and the rank that writes it."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who writes what: the same on all ranks. tensors: name -> (kind, dtype, global shape)."""

    tensors: dict[str, tuple[str, str, tuple[int, ...]]]
    parts: list[_Part]

    def key(self, part: _Part) -> str:
        """Where the part is whole, the plain name of the tensor: then other tools find what they look for."""
        if part.shape == self.tensors[part.name][2]:
            return part.name
        return part.name + region(part.start, [a + n for a, n in zip(part.start, part.shape, strict=True)])

    def nbytes(self, part: _Part) -> int:
        return math.prod(part.shape) * itemsize(self.tensors[part.name][1])

    def files(self) -> dict[int, str]:
        """The file of each rank that writes one."""
        ranks = sorted({part.rank for part in self.parts})
        return {rank: f"model-{i:05}-of-{len(ranks):05}.safetensors" for i, rank in enumerate(ranks)}


def save(
    root: Path | str, step: int, comm: Communicator, pieces: Sequence[Piece], state: dict[str, Any], keep: int = 0
) -> Path:
    """Write root/step_<step>/ from the pieces of all ranks; its path. Collective.

    The pieces of all ranks together tile each global tensor; what several ranks hold is written by one of them.
    `state` is JSON (that of rank 0 is written). The newest `keep` checkpoints remain, 0: all. UserError, the same on
    all ranks, when it cannot be written; ValueError when pieces overlap, leave a gap or disagree.
    """
    root = Path(root)
    json.dumps(state, allow_nan=False)  # what JSON cannot say fails here, on all ranks, and not on rank 0 alone
    plan = _plan(comm.all_gather_object([_describe(piece) for piece in pieces]))
    files = plan.files()
    needed = sum(plan.nbytes(part) + 400 for part in plan.parts)  # with its lines in header and manifest
    folder = SharedFolder(root, step, comm, needed)
    with folder.together():
        if comm.rank == 0:
            folder.prepare()
    written = None
    with folder.together():
        if comm.rank in files:
            written = safetensors_file.write(folder.partial / files[comm.rank], _entries(plan, pieces, comm.rank))
    reports = comm.all_gather_object(None if written is None else msgspec.to_builtins(written))
    with folder.together():
        if comm.rank == 0:
            content = msgspec.json.encode(_manifest(root, plan, reports, state, comm.size))
            write_synced(folder.partial / MANIFEST, content)
            folder.publish()
    if comm.rank == 0 and keep:
        folder.prune(keep)
    comm.barrier()
    return folder.final


def _describe(piece: Piece) -> list[Any]:
    return [piece.name, piece.kind, piece.array.dtype.name, piece.global_shape, piece.start, piece.array.shape]


def _plan(described: Sequence[Sequence[Sequence[Any]]]) -> _Plan:
    """The plan from the descriptions of all ranks' pieces. ValueError if they do not fit together."""
    tensors: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    first: dict[str, int] = {}
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for rank, rows in enumerate(described):
        for name, kind, dtype, global_shape, start, shape in rows:
            tensor = (kind, dtype, tuple(global_shape))
            if dtype not in CODES or kind not in get_args(Kind) or not len(global_shape) == len(start):
                raise ValueError(f"checkpoint: {name} on rank {rank}: {kind} {dtype} {global_shape} from {start}")
            if len(shape) != len(global_shape):
                raise ValueError(f"checkpoint: {name} on rank {rank}: a slice {shape} of the shape {global_shape}")
            if tensors.setdefault(name, tensor) != tensor:
                raise ValueError(
                    f"checkpoint: {name} is {tensors[name]} on rank {first[name]}, {tensor} on rank {rank}"
                )
            first.setdefault(name, rank)
            ranks = holders.setdefault((name, tuple(start), tuple(shape)), [])
            if rank in ranks:
                raise ValueError(f"checkpoint: rank {rank} hands in {name} from {start} twice")
            ranks.append(rank)
    boxes: dict[str, list[manifest.Box]] = {name: [] for name in tensors}
    full = {place: ranks for place, ranks in holders.items() if 0 not in place[2]}
    for name, start, shape in full:
        boxes[name].append((start, tuple(a + n for a, n in zip(start, shape, strict=True))))
    for name, (_, _, global_shape) in tensors.items():
        check_tiling(f"checkpoint: {name}", global_shape, boxes[name])
    return _Plan(tensors, _share(full, tensors))


def _share(
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]],
    tensors: dict[str, tuple[str, str, tuple[int, ...]]],
) -> list[_Part]:
    """One writer per piece: first those without a choice, then the largest first, each to its least loaded holder."""
    load: dict[int, int] = {}
    parts = []

    def weight(place: tuple[str, tuple[int, ...], tuple[int, ...]]) -> int:
        return math.prod(place[2]) * itemsize(tensors[place[0]][1])

    for place in sorted(holders, key=lambda place: (len(holders[place]) > 1, -weight(place), place)):
        rank = min(holders[place], key=lambda rank: (load.get(rank, 0), rank))
        load[rank] = load.get(rank, 0) + weight(place)
        parts.append(_Part(*place, rank))
    return parts


def _entries(plan: _Plan, pieces: Sequence[Piece], rank: int) -> list[Entry]:
    arrays = {(piece.name, tuple(piece.start), piece.array.shape): piece.array for piece in pieces}
    entries = []
    for part in plan.parts:
        if part.rank == rank:
            array = arrays[part.name, part.start, part.shape]
            entries.append(Entry(plan.key(part), plan.tensors[part.name][1], part.shape, _given(array)))
    return entries


def _given(array: Array) -> Callable[[], Array]:
    return lambda: array


def _manifest(root: Path, plan: _Plan, reports: list[Any], state: dict[str, Any], ranks: int) -> Manifest:
    files = plan.files()
    slices: dict[str, list[Slice]] = {name: [] for name in plan.tensors}
    for part in sorted(plan.parts, key=lambda part: (part.name, part.start)):
        key = plan.key(part)
        slices[part.name].append(Slice(files[part.rank], key, part.start, part.shape, reports[part.rank]["crc32"][key]))
    return Manifest(
        serial=1 + max((manifest.serial(folder) for folder, _ in folders(root)), default=0),
        saved=time.time(),
        ranks=ranks,
        versions={"dtrain": __version__, "numpy": np.__version__, "python": platform.python_version()},
        state=state,
        files={
            file: FileEntry(reports[rank]["nbytes"], reports[rank]["header_bytes"], reports[rank]["header_crc32"])
            for rank, file in files.items()
        },
        tensors={
            name: TensorEntry(cast(Kind, kind), dtype, shape, tuple(slices[name]))
            for name, (kind, dtype, shape) in plan.tensors.items()
        },
    )
