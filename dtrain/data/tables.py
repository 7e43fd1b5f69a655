"""`kind: table`: rows of numbers and a class, from CSV (with a header) or NPZ (arrays x and y).

    sepal,petal,species         x = [[5.1, 1.4], [7.0, 4.7]]
    5.1,1.4,setosa        ──►   y = [0, 1]                      classes setosa, versicolor: sorted
    7.0,4.7,versicolor

Columns of `data.categories` become ids instead (`categories.py`). Columns of numbers are standardised (mean 0,
deviation 1 over the training rows): a network does not learn from metres beside millimetres.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.config import TableConfig
from dtrain.data import sources, store
from dtrain.data.categories import bags_of
from dtrain.data.dataset import Data
from dtrain.data.rows import class_ids, read_npz, row_data, write_rows
from dtrain.errors import UserError


def open_table(config: TableConfig, sequence: int, seed: int, vocabulary: int | None, mask: bool) -> Data:
    """The samples of one CSV or NPZ file; `target` is the column (of NPZ: the array) of the class."""
    files = [_survey()] if config.path == "fair" else sources.files_of(config.path)
    if len(files) != 1 or not files[0].endswith((".csv", ".npz")):
        raise UserError(f"data.path: {config.path}: must be one file .csv or .npz, not {', '.join(files[:3])}")
    if config.categories and not files[0].endswith(".csv"):
        raise UserError(f"data.categories: {', '.join(config.categories)}; only a CSV has columns with names")
    options = (config.target, config.categories, config.hash_rows, config.separator) if config.categories else ()
    entry = sources.name_of_entry(files, "table", config.path == "fair", *(options or (config.target,)))
    folder = store.cached("table", entry, lambda folder: _make(folder, config, files[0]))
    what = f"table {config.path}"
    return row_data(folder, config.path, seed, config.validation, vocabulary, what, standardise=True)


def _make(folder: Path, config: TableConfig, name: str) -> None:
    path, target = config.path, config.target
    words: dict[str, list[str]] = {}
    if name.endswith(".npz"):
        x, y = read_npz(path, name, [("x", target or "y")])
        where = f"data.target: {target or 'y'}"
    else:
        x, y, column, words = read_csv(path, name, target, config.categories)
        where = f"data.target: {column}"
        if path == "fair" and column == "affairs":
            y = (y > 0).astype(np.float64)  # whether there were any, not how much time they took
    if x.size == 0 and not (len(x) and words):
        raise UserError(f"data.path: {path}: there are no rows of numbers in it; shape {x.shape}")
    classes_of_rows, classes = class_ids(y, where)
    ids, tables = bags_of(words, config.hash_rows, config.separator, path) if words else (None, [])
    write_rows(folder, x.astype(np.float64), classes_of_rows, classes, ids=ids, tables=tables)


def _survey() -> str:
    """The file of Fair's survey (1978) in statsmodels, which need not be imported for it."""
    from importlib.util import find_spec

    found = find_spec("statsmodels")
    for folder in found.submodule_search_locations or () if found else ():
        if (file := Path(folder) / "datasets" / "fair" / "fair.csv").is_file():
            return str(file)
    raise UserError(
        "data.path: fair: the survey is part of statsmodels, which is not installed: pip install 'dtrain[survey]'; "
        "or name a CSV file"
    )


def read_csv(
    path: str, name: str, target: str | None, categories: Sequence[str] = ()
) -> tuple[Array, Array, str, dict[str, list[str]]]:
    """Features (n, F) float64, targets (n,) of numbers or words, the target's column (None: the last one), and the
    cells of the categories by column."""
    import csv

    try:
        with open(name, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [column.strip() for column in next(reader, [])]
            at = _target(columns, path, target)
            named = {_category(columns, at, path, each): each for each in categories}
            numbers = [i for i in range(len(columns)) if i != at and i not in named]
            features, targets = [], []
            words: dict[str, list[str]] = {each: [] for each in categories}
            for cells in reader:
                if not cells:
                    continue  # an empty line, usually the last
                place = f"data.path: {path}: line {reader.line_num}"
                if len(cells) != len(columns):
                    raise UserError(f"{place}: {len(cells)} values, but the header has {len(columns)} columns")
                features.append([_number(cells[i], place, columns[i]) for i in numbers])
                for i, each in named.items():
                    words[each].append(cells[i])
                targets.append(_word(cells[at], place, columns[at]))
    except OSError as error:
        raise UserError(f"data.path: cannot read {name}: {error.strerror}; check its permissions") from error
    except csv.Error as error:
        raise UserError(f"data.path: {path}: line {reader.line_num}: {error}") from error
    x = np.array(features, dtype=np.float64).reshape(len(features), len(numbers))
    return x, _numbers_or_words(targets), columns[at], words


def _category(columns: list[str], target: int, path: str, category: str) -> int:
    """The place of a categorical column."""
    if category not in columns or columns.index(category) == target:
        others = ", ".join(column for i, column in enumerate(columns) if i != target)
        what = "is the target" if category in columns else "no such column"
        raise UserError(f"data.categories: {category}; {what} in {path}; allowed: {others}")
    return columns.index(category)


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
