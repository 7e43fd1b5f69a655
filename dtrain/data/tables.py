"""`kind: table`: rows of numbers and a class, from CSV (with a header) or NPZ (arrays x and y).

    sepal,petal,species         x = [[5.1, 1.4], [7.0, 4.7]]
    5.1,1.4,setosa        ──►   y = [0, 1]                      classes setosa, versicolor: sorted
    7.0,4.7,versicolor

Columns are standardised (mean 0, deviation 1 over the training rows): a network does not learn from metres beside
millimetres.
"""

import math
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.config import TableConfig
from dtrain.data import sources, store
from dtrain.data.dataset import Data
from dtrain.data.rows import class_ids, read_npz, row_data, write_rows
from dtrain.errors import UserError


def open_table(config: TableConfig, sequence: int, seed: int, vocabulary: int | None, mask: bool) -> Data:
    """The samples of one CSV or NPZ file; `target` is the column (of NPZ: the array) of the class."""
    files = sources.files_of(config.path)
    if len(files) != 1 or not files[0].endswith((".csv", ".npz")):
        raise UserError(f"data.path: {config.path}: must be one file .csv or .npz, not {', '.join(files[:3])}")
    entry = sources.name_of_entry(files, "table", config.target)
    folder = store.cached("table", entry, lambda folder: _make(folder, config.path, files[0], config.target))
    what = f"table {config.path}"
    return row_data(folder, config.path, seed, config.validation, vocabulary, what, standardise=True)


def _make(folder: Path, path: str, name: str, target: str | None) -> None:
    if name.endswith(".npz"):
        x, y = read_npz(path, name, [("x", target or "y")])
        where = f"data.target: {target or 'y'}"
    else:
        x, y, column = read_csv(path, name, target)
        where = f"data.target: {column}"
    if x.size == 0:
        raise UserError(f"data.path: {path}: there are no rows of numbers in it; shape {x.shape}")
    ids, classes = class_ids(y, where)
    write_rows(folder, x.astype(np.float64), ids, classes)


def read_csv(path: str, name: str, target: str | None) -> tuple[Array, Array, str]:
    """Features (n, F) float64, targets (n,) of numbers or words, and the target's column; None is the last one."""
    import csv

    try:
        with open(name, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [column.strip() for column in next(reader, [])]
            at = _target(columns, path, target)
            features, targets = [], []
            for cells in reader:
                if not cells:
                    continue  # an empty line, usually the last
                place = f"data.path: {path}: line {reader.line_num}"
                if len(cells) != len(columns):
                    raise UserError(f"{place}: {len(cells)} values, but the header has {len(columns)} columns")
                features.append([_number(c, place, columns[i]) for i, c in enumerate(cells) if i != at])
                targets.append(_word(cells[at], place, columns[at]))
    except OSError as error:
        raise UserError(f"data.path: cannot read {name}: {error.strerror}; check its permissions") from error
    except csv.Error as error:
        raise UserError(f"data.path: {path}: line {reader.line_num}: {error}") from error
    x = np.array(features, dtype=np.float64).reshape(len(features), len(columns) - 1)
    return x, _numbers_or_words(targets), columns[at]


def _target(columns: list[str], path: str, target: str | None) -> int:
    """The place of the target's column in a header that makes sense."""
    if len(columns) < 2:
        raise UserError(f"data.path: {path}: the first line must name two columns or more, separated by commas")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise UserError(f"data.path: {path}: the header names {', '.join(twice)} twice")
    if target is None:
        return len(columns) - 1
    if target not in columns:
        raise UserError(f"data.target: {target}; no such column in {path}; allowed: {', '.join(columns)}")
    return columns.index(target)


def _word(cell: str, place: str, column: str) -> str:
    if not cell.strip():
        raise UserError(f"{place}, column {column}: the value is missing; fill it in, or leave the row out")
    return cell.strip()


def _number(cell: str, place: str, column: str) -> float:
    word = _word(cell, place, column)
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}, column {column}: {word} is not a finite number; features must be numbers")
    return value


def _numbers_or_words(cells: list[str]) -> Array:
    """Numbers if all are, so that class 10 comes after class 9; otherwise words."""
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        return np.array(cells)
