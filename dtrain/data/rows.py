"""Rows of a matrix with a class each: what images and tables become.

    x (n, F), y (n,)  ──cache──►  x.npy, y.npy, memory-mapped  ──batch──►  inputs   (x - offset) / divisor, float32
                                                                           targets  int32

    rows   0 1 2 3 4 5 6 7 8 9       a seeded permutation chooses the validation rows: files are often sorted by class
           t t v t t t t v t t

Invariant: the split depends on (seed, number of rows, fraction) alone; training and validation share no row.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import random
from dtrain.arrays import Array
from dtrain.data.dataset import Data, unigram_entropy
from dtrain.data.sampler import Permutation
from dtrain.data.store import map_npy
from dtrain.errors import UserError


class Rows:
    """Dataset of the chosen `rows` (N,) of x (n, F) and y (n,); `offset` and `divisor` are numbers or (F,)."""

    def __init__(
        self,
        x: Array,
        y: Array,
        rows: Array,
        offset: Array | float = 0.0,
        divisor: Array | float = 1.0,
        ids: Array | None = None,
    ) -> None:
        """ids: of the categories of all samples, (n, columns, longest bag)."""
        self.x, self.y, self.rows, self.offset, self.divisor, self.ids = x, y, rows, offset, divisor, ids

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Array) -> dict[str, Array]:
        """Inputs (B, F) float32, scaled, targets (B,) int32, and the ids of categories if there are any."""
        assert indices.size == 0 or 0 <= indices.min() <= indices.max() < len(self), f"no such samples: {indices}"
        rows = self.rows[indices]
        inputs = (self.x[rows] - self.offset) / self.divisor
        batch = {"inputs": inputs.astype(np.float32), "targets": self.y[rows].astype(np.int32)}
        return batch if self.ids is None else {**batch, "ids": self.ids[rows]}


def split_rows(n: int, seed: int, fraction: float, path: str) -> tuple[Array, Array]:
    """Indices of the training rows and of the validation rows, both ascending; at least one each (fraction 0: none)."""
    kept = max(1, round(n * fraction)) if fraction else 0
    if n - kept < 1:
        raise UserError(
            f"data.path: {path}: too short: {n} samples, of which data.validation: {fraction} keeps {kept}; "
            f"{1 + (fraction > 0)} or more are needed"
        )
    order = Permutation(n, random.key(seed, "validation rows"))(np.arange(n))
    return np.sort(order[kept:]), np.sort(order[:kept])


def write_rows(
    folder: Path,
    x: Array,
    y: Array,
    classes: list[str],
    divisor: float = 1.0,
    ids: Array | None = None,
    tables: Sequence[int] = (),
) -> None:
    """Fill an entry of the cache with x (n, F), y (n,), the names of the classes; ids and tables as in `Data`."""
    y = y.astype(np.int32)
    np.save(folder / "x.npy", x, allow_pickle=False)
    np.save(folder / "y.npy", y, allow_pickle=False)
    content = hashlib.blake2b(repr((x.shape, x.dtype.name, classes)).encode(), digest_size=16)
    content.update(np.ascontiguousarray(x).data)
    content.update(y.data)
    if ids is not None:
        np.save(folder / "ids.npy", ids, allow_pickle=False)
        content.update(repr((ids.shape, list(tables))).encode())
        content.update(np.ascontiguousarray(ids).data)
    header = {
        "classes": classes,
        "divisor": divisor,
        "fingerprint": content.hexdigest(),
        "tables": None if ids is None else list(tables),
    }
    (folder / "header.json").write_text(json.dumps(header))


def row_data(
    folder: Path, path: str, seed: int, fraction: float, vocabulary: int | None, what: str, standardise: bool = False
) -> Data:
    """Open an entry that `write_rows` made. `standardise`: columns have mean 0 and deviation 1 in the training rows."""
    header = json.loads((folder / "header.json").read_bytes())
    x, y = (map_npy(folder / name) for name in ("x.npy", "y.npy"))
    tables = header.get("tables")
    ids = None if tables is None else map_npy(folder / "ids.npy")
    classes = len(header["classes"])
    if vocabulary is not None and classes > vocabulary:
        raise UserError(f"data.path: {path}: {classes} classes, but the model has {vocabulary}; they must not be fewer")
    train, validation = split_rows(len(y), seed, fraction, path)
    offset: Array | float = 0.0
    divisor: Array | float = header["divisor"]
    if standardise:
        known = x[train]
        offset, deviation = known.mean(axis=0), known.std(axis=0)
        varies = deviation > 1e-14 * np.abs(offset)  # the mean of equal numbers is not quite that number
        offset, divisor = np.where(varies, offset, known[0]), np.where(varies, deviation, 1.0)
    return Data(
        train=Rows(x, y, train, offset, divisor, ids),
        validation=Rows(x, y, validation, offset, divisor, ids) if fraction else None,
        vocabulary=classes,
        description=f"{what}: {len(train):,} + {len(validation):,} samples (training + validation) "
        f"of {x.shape[1]:,} features in {classes} classes"
        + ("" if tables is None else f", {len(tables)} categories with {sum(tables):,} rows"),
        entropy=unigram_entropy(y[train], classes),
        fingerprint=header["fingerprint"],
        features=x.shape[1],
        tables=tuple(tables or ()),
    )


def read_npz(path: str, name: str, choices: list[tuple[str, str]]) -> tuple[Array, Array]:
    """The first pair of arrays (x, y) among `choices` that the NPZ file `name` has. Never unpickles."""
    import zipfile
    import zlib

    try:
        with open(name, "rb") as file, np.load(file, allow_pickle=False) as archive:
            for x, y in choices:
                if x in archive and y in archive:
                    return _checked(path, archive[x], archive[y], x, y)
            found = ", ".join(archive.files)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data.path: {path}: {name} cannot be read as an NPZ file of numbers: {error}") from error
    wanted = " or ".join(f"{x} and {y}" for x, y in choices)
    raise UserError(f"data.path: {path}: {name} has the arrays {found}; needed are {wanted}")


def _checked(path: str, x: Array, y: Array, x_name: str, y_name: str) -> tuple[Array, Array]:
    """The two arrays as (n, F) of finite numbers and (n,)."""
    where = f"data.path: {path}"
    if x.dtype.kind not in "biuf" or x.ndim < 2:
        raise UserError(f"{where}: {x_name} is {x.dtype} of shape {x.shape}; must be numbers of shape (n, …)")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != x.shape[:1]:
        raise UserError(f"{where}: {x_name} has shape {x.shape} and {y_name} {y.shape}; {len(x)} targets are needed")
    if not np.isfinite(x).all():
        raise UserError(f"{where}: {x_name}: sample {_first(~np.isfinite(x))} has a value that is not finite")
    return x.reshape(len(x), int(np.prod(x.shape[1:]))), y


def _first(wrong: Array) -> int:
    return int(np.argwhere(wrong)[0][0])


def class_ids(values: Array, where: str) -> tuple[Array, list[str]]:
    """Targets (n,) of integers or words as ids 0..classes-1 in sorted order, and the names of the classes."""
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.floor(values))
        if not whole.all():
            wrong = _first(~whole)
            raise UserError(f"{where}: sample {wrong} is {values[wrong]}; classes must be whole numbers or words")
        values = values.astype(np.int64)
    if values.dtype.kind not in "biuUS":
        raise UserError(f"{where}: is of {values.dtype}; classes must be whole numbers or words")
    names, ids = np.unique(values, return_inverse=True)
    return ids.reshape(-1), [_name(name) for name in names.tolist()]


def _name(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
