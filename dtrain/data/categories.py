"""Categorical columns of a table: from the words in a column to the rows of an embedding table.

    genre                 counted: one row per word, sorted         hashed to 4 rows: hash(word) mod 4
    comedy          ──►   [ 1]                                      [ 2]
    drama|comedy    ──►   [ 2  1]      a bag of several             [ 0  2]
                    ──►   [-1 -1]      an empty bag                 [-1 -1]
    action          ──►   [ 0]                                      [ 2]     a collision: shares a row

Hashing needs no table of words and bounds the rows, whatever words come; it is a function of the word alone.
Reference: Weinberger et al., "Feature hashing for large scale multitask learning", arXiv:0902.2206.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from dtrain.arrays import Array
from dtrain.errors import UserError

NONE = -1  # fills up the bags that are shorter than the longest


def bags_of(
    columns: Mapping[str, list[str]], hash_rows: int | None, separator: str, path: str
) -> tuple[Array, list[int]]:
    """Ids (n, columns, longest bag) int32, NONE after the end of a bag; and the rows of each column's table."""
    split = {name: [_words(cell, name, i, separator, path) for i, cell in enumerate(columns[name])] for name in columns}
    samples = len(next(iter(split.values()), []))
    longest = max((len(words) for bags in split.values() for words in bags), default=1)
    ids = np.full((samples, len(split), max(1, longest)), NONE, np.int32)
    rows = []
    for c, (name, bags) in enumerate(split.items()):
        words = sorted({word for bag in bags for word in bag})
        if not words:
            raise UserError(f"data.categories: {name}: the column of {path} has no values at all; leave it out")
        place = {word: _hashed(word, hash_rows) if hash_rows else i for i, word in enumerate(words)}
        rows.append(hash_rows or len(words))
        for i, bag in enumerate(bags):
            ids[i, c, : len(bag)] = [place[word] for word in bag]
    return ids, rows


def _words(cell: str, column: str, row: int, separator: str, path: str) -> list[str]:
    """The words of a cell; an empty cell is an empty bag."""
    if not cell.strip():
        return []
    words = [word.strip() for word in cell.split(separator)]
    if "" in words:
        raise UserError(
            f"data.path: {path}: row {row + 1}, column {column}: {cell.strip()!r} has an empty value between two "
            f"{separator!r} (data.separator); fill it in, or leave it out"
        )
    return words


def _hashed(word: str, rows: int) -> int:
    """The same on every machine and in every run, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") % rows
