"""A stream of tokens on disk, and the windows of it that are samples; `kind: tokens` reads streams made elsewhere.

    stream     t0 t1 t2 t3 t4 t5 t6 t7 t8 …            sequence T = 4
    sample 0   inputs  t0 t1 t2 t3   targets t1 t2 t3 t4
    sample 1               inputs  t4 t5 t6 t7   targets t5 t6 t7 t8

    |------------- train ------------------|--- validation ---|     the last fraction of the stream, at least one window

Invariant: windows do not overlap, no training window reads a validation token. The stream is memory-mapped: all ranks
of a machine share one copy in the page cache, and opening costs a header.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.config import TokensConfig
from dtrain.data import sources, store
from dtrain.data.dataset import Data, entropy_of_counts
from dtrain.data.tokenizer import Tokenizer
from dtrain.errors import UserError

CHUNK = 1 << 22  # tokens looked at together when a stream is measured
MOST = 1 << 24  # no vocabulary is larger: a larger token means that the file is something else


class Windows:
    """Dataset of the non-overlapping windows of `sequence` tokens of a stream (N,) of unsigned integers."""

    def __init__(self, tokens: Array, sequence: int) -> None:
        assert sequence > 0, f"windows of {sequence} tokens"
        self.tokens, self.sequence = tokens, sequence
        self._offsets = np.arange(sequence + 1)

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.sequence

    def batch(self, indices: Array) -> dict[str, Array]:
        """Inputs and targets (B, T) int32: windows [i T, i T + T) of the stream and the same one token later."""
        assert indices.size == 0 or 0 <= indices.min() <= indices.max() < len(self), f"no such samples: {indices}"
        windows = self.tokens[indices[:, None] * self.sequence + self._offsets].astype(np.int32)
        return {"inputs": np.ascontiguousarray(windows[:, :-1]), "targets": np.ascontiguousarray(windows[:, 1:])}


def split_stream(tokens: Array, sequence: int, fraction: float, path: str) -> tuple[Windows, Windows | None]:
    """Training windows, and validation windows of the last `fraction` of the stream (None: fraction 0)."""
    kept = max(sequence + 1, round(len(tokens) * fraction)) if fraction else 0
    cut = len(tokens) - kept
    if cut < sequence + 1:
        parts = f"{max(cut, 0)} for training beside {kept} for validation" if fraction else "all for training"
        needed = (sequence + 1) * (2 if fraction else 1)
        raise UserError(
            f"data.path: {path}: too short: {len(tokens)} tokens, {parts}; model.sequence: {sequence} needs at least "
            f"{sequence + 1} for each, {needed} together: more text, a shorter sequence, or a smaller data.validation"
        )
    return Windows(tokens[:cut], sequence), Windows(tokens[cut:], sequence) if fraction else None


class Measure:
    """What a header keeps of a stream that passes by in pieces: length, largest token, entropy, hash of the content."""

    def __init__(self) -> None:
        self.count, self.maximum = 0, -1
        self._counts: Array = np.zeros(0, dtype=np.int64)
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, piece: Array) -> None:
        """Take the next piece (N,) of unsigned integers into account."""
        if len(piece) == 0:
            return
        self.count += len(piece)
        self.maximum = max(self.maximum, int(piece.max()))
        self._digest.update(piece.astype(np.uint32).tobytes())  # one hash for one content, however it is stored
        if self.maximum < MOST:
            counts = np.bincount(piece, minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts = counts

    def header(self) -> dict[str, Any]:
        """The header as it is written; entropy 0 when a token is too large to be one."""
        entropy = entropy_of_counts(self._counts) if 0 <= self.maximum < MOST else 0.0
        digest = self._digest.hexdigest()
        return {"count": self.count, "maximum": self.maximum, "entropy": entropy, "fingerprint": digest}


def write_stream(folder: Path, pieces: Iterable[Array], vocabulary: int) -> None:
    """Write `tokens.bin` (the smallest dtype that holds the vocabulary) and `header.json` into `folder`."""
    dtype = np.min_scalar_type(vocabulary - 1)
    measure = Measure()
    with open(folder / "tokens.bin", "wb") as file:
        for piece in pieces:
            file.write(piece.astype(dtype).tobytes())
            measure.add(piece)
    write_header(folder, measure.header() | {"dtype": dtype.name, "vocabulary": vocabulary})


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write `header.json` into `folder`."""
    (folder / "header.json").write_text(json.dumps(header))


def read_header(folder: Path) -> dict[str, Any]:
    """The header of an entry of the cache."""
    header: dict[str, Any] = json.loads((folder / "header.json").read_bytes())
    return header


def read_stream(folder: Path) -> tuple[Array, dict[str, Any]]:
    """What `write_stream` wrote: the memory-mapped stream and its header."""
    header = read_header(folder)
    return map_file(str(folder / "tokens.bin"), header["dtype"]), header


def map_file(name: str, dtype: str) -> Array:
    """The file as an array of `dtype`, read only, in the page cache; a plain array, whose indexing costs least."""
    try:
        return np.asarray(np.memmap(name, dtype=dtype, mode="r"))
    except OSError as error:
        raise UserError(f"data.path: cannot read {name}: {error.strerror}; check its permissions") from error


def token_data(
    tokens: Array,
    header: dict[str, Any],
    path: str,
    sequence: int,
    validation: float,
    model_vocabulary: int | None,
    mask: bool,
    tokenizer: Tokenizer | None,
    what: str,
) -> Data:
    """Split a stream into training and validation, after its vocabulary was found to fit the model's."""
    vocabulary = header["vocabulary"] + mask
    if model_vocabulary is not None and vocabulary > model_vocabulary:
        raise UserError(
            f"model.vocabulary: {model_vocabulary}; too small for {path}, whose ids go up to {vocabulary - 1}"
            f"{', the one that hides tokens' if mask else ''}; allowed: {vocabulary} or more, or null"
        )
    train, kept = split_stream(tokens, sequence, validation, path)
    windows = f"{len(train):,} + {len(kept) if kept else 0:,} windows of {sequence}"
    return Data(
        train=train,
        validation=kept,
        vocabulary=vocabulary,
        description=f"{what}: {len(tokens):,} tokens of {header['vocabulary']:,}, {windows} (training + validation)",
        entropy=header["entropy"],
        fingerprint=header["fingerprint"],
        tokenizer=tokenizer,
        mask_token=header["vocabulary"] if mask else None,
    )


def open_tokens(config: TokensConfig, sequence: int, seed: int, vocabulary: int | None, mask: bool) -> Data:
    """`kind: tokens`: one `.bin` file of raw tokens or one `.npy` file, used where it lies."""
    files = sources.files_of(config.path)
    if len(files) != 1 or not files[0].endswith((".bin", ".npy")):
        raise UserError(f"data.path: {config.path}: must be one file .bin or .npy, not {', '.join(files[:3])}")
    name = files[0]
    tokens = _map_npy(name) if name.endswith(".npy") else _map_bin(name, config.dtype)
    if len(tokens) == 0:
        raise UserError(f"data.path: {config.path}: {name} is empty; tokens are needed")
    entry = sources.name_of_entry(files, "tokens", tokens.dtype.name)
    header = read_header(store.cached("tokens", entry, lambda folder: _measure(folder, name, tokens)))
    limit = min(config.vocabulary or MOST, MOST)
    if header["maximum"] >= limit:
        raise UserError(
            f"data.vocabulary: {config.vocabulary}; {name} has the token {header['maximum']}; allowed are tokens below "
            f"{limit}: correct data.vocabulary, or data.dtype (read as {tokens.dtype.name}) if the file has another"
        )
    header["vocabulary"] = config.vocabulary or header["maximum"] + 1
    what = f"tokens {config.path}"
    return token_data(tokens, header, config.path, sequence, config.validation, vocabulary, mask, None, what)


def _pieces(tokens: Array) -> Iterator[Array]:
    for start in range(0, len(tokens), CHUNK):
        yield tokens[start : start + CHUNK]


def _measure(folder: Path, name: str, tokens: Array) -> None:
    measure = Measure()
    for piece in _pieces(tokens):
        if piece.dtype.kind == "i" and piece.min() < 0:
            raise UserError(f"data.path: {name}: a token is {piece.min()}; tokens must be 0 or more")
        measure.add(piece)
    write_header(folder, measure.header())


def _map_bin(name: str, dtype: str) -> Array:
    try:
        size = os.path.getsize(name)
    except OSError as error:
        raise UserError(f"data.path: cannot read {name}: {error.strerror}") from error
    width = np.dtype(dtype).itemsize
    if size % width:
        raise UserError(f"data.path: {name}: {size} bytes are no whole number of {dtype}; is data.dtype right?")
    return map_file(name, dtype) if size else np.zeros(0, dtype=dtype)


def _map_npy(name: str) -> Array:
    try:
        tokens = store.map_npy(name)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data.path: {name}: cannot be read as a .npy file of numbers: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        form = f"{tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"data.path: {name}: must be one array of integers with one dim, not {form}")
    return tokens
