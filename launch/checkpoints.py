"""`dtrain checkpoint`: look at checkpoints, check, compare and hand them on. One process; no model, no MPI, no data.

ls RUN                 step, size, age, complete or why not
verify CHECKPOINT      every checksum
diff A B               names, shapes, largest difference per tensor
export CHECKPOINT OUT  OUT/model.safetensors (whole parameters, for other tools), OUT/config.json (what they are);
                       adapters are added to the parameters of their base
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.checkpoint_folder import write_synced
from dtrain.checkpoint_reader import Found, Reader, latest, scan
from dtrain.errors import UserError
from dtrain.manifest import MANIFEST
from dtrain.safetensors_file import Entry, write

_BLOCK = 1 << 20  # elements that are compared at once in float64


def table(run: Path) -> str:
    """The checkpoints of a run (or of its folder checkpoints/), oldest first."""
    root = _root(run)
    found = scan(root)
    if not found:
        return f"{root}: no checkpoints"
    rows = [("step", "size", "age", "state"), *(_row(one) for one in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def verify(path: Path) -> str:
    """Read everything and compare the checksums; UserError when something is damaged."""
    reader = Reader(_checkpoint(path))
    nbytes = reader.verify()
    return f"{reader.folder}: complete, {len(reader.names())} tensors, {_size(nbytes)}, all checksums right"


def diff(first: Path, second: Path) -> tuple[bool, str]:
    """Whether the tensors of two checkpoints are equal, and what differs."""
    a, b = Reader(_checkpoint(first)), Reader(_checkpoint(second))
    lines = [f"A {a.folder}, step {a.state.get('step', '?')}", f"B {b.folder}, step {b.state.get('step', '?')}"]
    names = [*a.names(), *(name for name in b.names() if name not in a.manifest.tensors)]
    rows = [(name, text) for name in names if (text := _difference(a, b, name)) is not None]
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name.ljust(width)}  {text}" for name, text in rows]
    lines.append(f"{len(names) - len(rows)} tensors equal, {len(rows)} different")
    return not rows, "\n".join(lines)


def export(path: Path, out: Path, base: str | None = None) -> str:
    """Write the parameters, whole, into one file; UserError when `out` holds something or cannot be written.

    base: of adapters, where their base is now, if not where it was.
    """
    reader = Reader(_checkpoint(path))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; export needs a new or an empty folder")
    entries = _parameters(reader, base)
    config = {**reader.state, "versions": reader.manifest.versions}
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        # "pt" is what the transformers library asks for; the bytes are the same for every framework.
        written = write(partial / "model.safetensors", entries, {"format": "pt"})
        write_synced(partial / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        partial.rename(out)
    except OSError as error:
        needed = sum(entry.nbytes for entry in entries)
        raise UserError(f"{out}: cannot export: {error.strerror}; it needs {needed:,} bytes") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out / 'model.safetensors'}: {len(entries)} tensors, {_size(written.nbytes)}; {out / 'config.json'}"


def _root(run: Path) -> Path:
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; a run is a folder that `dtrain run` wrote, such as runs/gpt-ddp")
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def _checkpoint(path: Path) -> Path:
    """The folder itself, or the newest checkpoint of a run."""
    if path.is_dir() and not (path / MANIFEST).exists():
        return latest(_root(path)) or path  # its own error will be told
    return path


def _row(found: Found) -> tuple[str, str, str, str]:
    state = "complete" if found.problem is None else f"damaged: {found.problem}"
    return str(found.step), _size(found.nbytes), _age(found.age), state


def _difference(a: Reader, b: Reader, name: str) -> str | None:
    for reader, other in ((a, "B"), (b, "A")):
        if name not in reader.manifest.tensors:
            return f"only in {other}"
    ours, theirs = (f"{one.entry(name).dtype} {list(one.entry(name).shape)}" for one in (a, b))
    if ours != theirs:
        return f"A has {ours}, B {theirs}"
    equal, largest = compare(a.tensor(name), b.tensor(name))
    return None if equal else f"{ours}  largest difference {largest:.3g}"


def compare(a: Array, b: Array) -> tuple[bool, float]:
    """Whether two arrays are equal (a NaN equals a NaN), and the largest difference; NaN where only one has a NaN."""
    a, b = a.reshape(-1), b.reshape(-1)
    equal, largest = True, 0.0
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        differs = (x != y) & ~((x != x) & (y != y))
        if differs.any():
            equal = False
            with np.errstate(invalid="ignore"):
                here = float(np.abs(x[differs].astype(np.float64) - y[differs].astype(np.float64)).max())
            largest = here if math.isnan(here) or here > largest else largest
    return equal, largest


def _parameters(reader: Reader, base: str | None) -> list[Entry]:
    """All parameters, made when they are written; of adapters those of the base with them."""
    make: dict[str, Callable[[], Array]] = {name: partial(reader.tensor, name) for name in reader.names("parameter")}
    if "lora" in reader.state:
        from dtrain.strategies.lora import merged

        reader, make = merged(reader, base)
    elif base is not None:
        raise UserError(f"--base {base}: {reader.folder} holds whole parameters, which need no base")
    return [Entry(name, reader.entry(name).dtype, reader.entry(name).shape, each) for name, each in make.items()]


def _size(nbytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def _age(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
