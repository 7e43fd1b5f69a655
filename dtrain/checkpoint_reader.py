"""Reading checkpoints: the newest complete one, and any slice of any tensor, whatever layout wrote it.

    reader = Reader(latest(root))
    rows = reader.read("head.weight", start=(128, 0), shape=(64, 64))

      written by 2 ranks (rows)          asked for (columns)         read: the intersection with each shard,
      ┌──────────────┐ shard 0           ┌──────┬───────┐            from the memory map into one new array
      ├──────────────┤ shard 1           │      │▓▓▓▓▓▓▓│
      └──────────────┘                   └──────┴───────┘

Invariant: no value comes out of a slice whose checksum was not verified (once per slice and reader, when first
touched), and files that are not asked for are not opened. The format is in `docs/checkpoints.md`.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import manifest as manifests
from dtrain.arrays import Array
from dtrain.errors import UserError
from dtrain.manifest import MANIFEST, Manifest, Slice, TensorEntry, region
from dtrain.safetensors_file import FormatError, Mapped, dtype

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.(step_\d{8,})\.replaced")


class Reader:
    """A complete checkpoint, open for reading. UserError when the folder is none, or is damaged."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; a checkpoint is a folder with a {MANIFEST} in it")
        self.manifest: Manifest = manifests.load(self.folder)
        problem = _files_problem(self.folder, self.manifest)
        if problem is not None:
            raise UserError(f"{self.folder}: damaged checkpoint: {problem}")
        self.state: dict[str, Any] = self.manifest.state
        self._mapped: dict[str, Mapped] = {}
        self._verified: set[tuple[str, str]] = set()

    def number(self, *keys: str) -> int:
        """A whole number of the state, by the way to it; UserError where a checkpoint from elsewhere has none."""
        value: Any = self.state
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if type(value) is not int or value < 0:
            raise UserError(
                f"{self.folder}: state.{'.'.join(keys)}: {value!r}; to go on, a whole number is needed there"
            )
        return value

    def names(self, kind: str | None = None) -> list[str]:
        """The names of all tensors, or of those of a kind: "parameter", "optimizer" or "strategy"."""
        return [name for name, entry in self.manifest.tensors.items() if kind in (None, entry.kind)]

    def entry(self, name: str) -> TensorEntry:
        """Kind, dtype, global shape and slices of a tensor; no file is opened."""
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise UserError(f"{self.folder}: no tensor {name!r}; it holds {_few(self.names())}") from None

    def tensor(self, name: str) -> Array:
        """The whole tensor, as a new array."""
        return self.read(name)

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Array | None = None,
    ) -> Array:
        """The slice start .. start + shape of a tensor (default: all of it), as a new array or in `out`.

        `out` has that shape; its dtype may be another one of the same kind (float32 into bfloat16, say): it is rounded.
        """
        entry = self.entry(name)
        start = (0,) * len(entry.shape) if start is None else tuple(start)
        shape = tuple(n - a for n, a in zip(entry.shape, start, strict=False)) if shape is None else tuple(shape)
        if len(start) != len(entry.shape) or len(shape) != len(entry.shape):
            raise ValueError(f"{name}: start {start}, shape {shape} for a tensor with the shape {entry.shape}")
        stop = tuple(a + n for a, n in zip(start, shape, strict=True))
        if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, entry.shape, strict=True)):
            raise ValueError(f"{name}: the slice {region(start, stop)} is outside of the shape {list(entry.shape)}")
        if out is None:
            out = np.empty(shape, dtype(entry.dtype))
        elif out.shape != shape:
            raise ValueError(f"{name}: out has the shape {out.shape}, the slice {shape}")
        if 0 in shape:
            return out
        for part in entry.slices:
            low = tuple(map(max, start, part.start))
            high = tuple(map(min, stop, part.stop))
            if all(a < b for a, b in zip(low, high, strict=True)):
                there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.start, strict=True))
                here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
                np.copyto(out[here] if here else out, self._part(name, entry, part)[there], casting="same_kind")
        return out

    def verify(self) -> int:
        """Check the checksums of everything; bytes read. UserError naming the first damaged file and tensor."""
        for name, entry in self.manifest.tensors.items():
            for part in entry.slices:
                self._part(name, entry, part)
        for file in self.manifest.files:
            self._file(file)
        return sum(file.bytes for file in self.manifest.files.values())

    def _file(self, file: str) -> Mapped:
        if file not in self._mapped:
            expected = self.manifest.files[file]
            try:
                mapped = Mapped(self.folder / file)
            except (OSError, FormatError) as error:
                raise UserError(f"{self.folder}: damaged checkpoint: {error}") from None
            if (mapped.nbytes, mapped.header_bytes) != (expected.bytes, expected.header_bytes):
                raise self._damaged(f"{file}: other sizes than {MANIFEST} says")
            if mapped.header_crc32 != expected.header_crc32:
                raise self._damaged(f"{file}: its header does not have the checksum in {MANIFEST}")
            self._mapped[file] = mapped
        return self._mapped[file]

    def _part(self, name: str, entry: TensorEntry, part: Slice) -> Array:
        """A verified slice, as a view of its file."""
        mapped = self._file(part.file)
        if (part.file, part.key) not in self._verified:
            found = mapped.entries.get(part.key)
            if found is None or found[:2] != (entry.dtype, part.shape):
                raise self._damaged(f"{part.file}: has no {part.key!r} of {entry.dtype} {list(part.shape)}")
            if mapped.crc32(part.key) != part.crc32:
                where = region(part.start, part.stop)
                raise self._damaged(f"{part.file}: {name}{where} does not have the checksum in {MANIFEST}")
            self._verified.add((part.file, part.key))
        return mapped.array(part.key)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder}: damaged checkpoint: {what}; take another one (dtrain checkpoint ls)")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint folder: step, serial number (0: cannot be read), bytes, seconds since it was saved (NaN: not known).

    problem: what keeps it from being complete, or None.
    """

    folder: Path
    step: int
    serial: int
    nbytes: int
    age: float
    problem: str | None


def scan(root: Path | str) -> list[Found]:
    """The checkpoints in the folder `root`, oldest first; what is not complete says why. Checksums are not verified.

    Ordered by serial number, not by step: a run that was started anew in the same folder has the newer ones. Where the
    number cannot be read, the folder may be the newest, and comes last.
    """
    found = [_look(folder, step) for folder, step in folders(Path(root))]
    return sorted(found, key=lambda one: (one.serial or math.inf, one.step))


def latest(root: Path | str, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest complete checkpoint in the folder `root`, None if there is none.

    `warn` (default: the logger "dtrain") is told about every newer one that is passed over, and why.
    """
    for found in reversed(scan(root)):
        if found.problem is None:
            return found.folder
        text = f"{found.folder}: passed over, damaged checkpoint: {found.problem}"
        if warn is None:
            import logging

            logging.getLogger("dtrain").warning(text)
        else:
            warn(text)
    return None


def check_names(reader: Reader, expected: Mapping[str, tuple[Sequence[int], Any]]) -> None:
    """UserError unless the checkpoint holds exactly the tensors name -> (global shape, dtype), strategies' aside."""
    held = {name: entry for name, entry in reader.manifest.tensors.items() if entry.kind != "strategy"}
    wanted = {name: f"{_dtype_name(kind)} {list(shape)}" for name, (shape, kind) in expected.items()}
    there = {name: f"{entry.dtype} {list(entry.shape)}" for name, entry in held.items()}
    missing = [name for name in wanted if name not in there]
    unexpected = [name for name in there if name not in wanted]
    differing = [name for name in wanted if there.get(name, wanted[name]) != wanted[name]]
    if not (missing or unexpected or differing):
        return
    different = [f"{name} is {there[name]}, not {wanted[name]}" for name in differing]
    lists = {"not in it": missing, "only in it": unexpected, "different": different}
    problems = [f"{what}: {_few(names)}" for what, names in lists.items() if names]
    parameters = set(reader.names("parameter"))
    same_model = parameters.isdisjoint(unexpected + differing) and all(_is_state(n, parameters) for n in missing)
    word = "optimizer" if same_model else "model"
    remedy = "Train on with the configuration that wrote it, or give the new run another `name`"
    if not missing and not unexpected and all(list(held[n].shape) == list(expected[n][0]) for n in differing):
        raise UserError(
            f"{reader.folder}: a checkpoint of another dtype (train.dtype); {'; '.join(problems)}. {remedy}"
        )
    described = reader.state.get(word)
    if isinstance(described, dict):
        described = ", ".join(f"{key}: {value}" for key, value in described.items())
    raise UserError(
        f"{reader.folder}: a checkpoint of another {word}: it holds {described or 'one that is not described'}. "
        f"Its tensors are not those of the configured {word}; {'; '.join(problems)}. {remedy}"
    )


def _is_state(name: str, parameters: set[str]) -> bool:
    """Whether the name is one of the parameters' with more after it: head.weight.m."""
    words = name.split(".")
    return any(".".join(words[:i]) in parameters for i in range(1, len(words)))


def folders(root: Path) -> list[tuple[Path, int]]:
    """The folders of checkpoints with their steps; partial ones have other names."""
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root}: cannot list the checkpoints: {error.strerror}") from None
    folders = [(root / name, int(match[1])) for name in names if (match := _STEP_FOLDER.fullmatch(name))]
    # A save of the same step was killed between its two renames: the old one is still whole, under this name.
    aside = [(root / name, match[1]) for name in names if (match := _REPLACED.fullmatch(name))]
    return folders + [(folder, int(name[5:])) for folder, name in aside if name not in names]


def _look(folder: Path, step: int) -> Found:
    try:
        manifest = manifests.load(folder)
    except UserError as error:
        return Found(folder, step, manifests.serial(folder), _bytes(folder), math.nan, str(error))
    problem = _files_problem(folder, manifest)
    return Found(folder, step, manifest.serial, _bytes(folder), time.time() - manifest.saved, problem)


def _bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0  # no folder, or not ours to read: its problem is told already


def _files_problem(folder: Path, manifest: Manifest) -> str | None:
    for file, entry in manifest.files.items():
        try:
            size = (folder / file).stat().st_size
        except OSError as error:
            return f"{file}: {error.strerror}"
        if size != entry.bytes:
            return f"{file}: {size} bytes instead of {entry.bytes}"
    return None


def _dtype_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else np.dtype(kind).name


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
