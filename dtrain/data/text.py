"""`kind: text`: files of text -> one stream of tokens, made once per machine and memory-mapped ever after.

    data.path ──► sorted files ──► tokenizer ──► <cache>/text/<hash>/ tokens.bin, header.json, tokenizer.json
                                                     │
                  every rank, every later run ───────┴──► memory map (milliseconds)

Files follow one another without a separator. The byte tokenizer takes bytes as they are, so a text in any encoding is
learnt exactly; byte-pair encoding works on characters, and there bytes that are not UTF-8 become U+FFFD.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.config import TextConfig
from dtrain.data import sources, store
from dtrain.data.dataset import Data
from dtrain.data.tokenizer import ByteTokenizer, Tokenizer, import_tokenizers, load, train_bpe
from dtrain.data.tokens import read_stream, token_data, write_stream
from dtrain.errors import UserError

BPE_VOCABULARY = 4096  # of `tokenizer: bpe` without `vocabulary`


def open_text(config: TextConfig, sequence: int, seed: int, vocabulary: int | None, mask: bool) -> Data:
    """The windows of a text; the first call for a text, tokenizer and machine makes the entry in the cache."""
    learnt = None if config.tokenizer == "byte" else config.vocabulary or BPE_VOCABULARY
    if config.path == "stdlib":
        entry = sources.name_of_library("text", learnt)
    else:
        entry = sources.name_of_entry(sources.files_of(config.path), "text", learnt)
    folder = store.cached("text", entry, lambda folder: _make(folder, config.path, learnt))
    tokens, header = read_stream(folder)
    tokenizer = ByteTokenizer() if learnt is None else load(folder / "tokenizer.json")
    what = f"text {config.path}, {config.tokenizer} tokens"
    return token_data(tokens, header, config.path, sequence, config.validation, vocabulary, mask, tokenizer, what)


def _make(folder: Path, path: str, learnt: int | None) -> None:
    """Fill an entry of the cache: tokens, header, tokenizer."""
    files = _text_files(path)
    tokenizer: Tokenizer
    if learnt is None:
        tokenizer = ByteTokenizer()
        pieces = _bytes(files)
    else:
        import_tokenizers()
        trained = tokenizer = train_bpe(_characters(files), learnt)
        pieces = trained.encode_pieces(_characters(files))
    write_stream(folder, pieces, tokenizer.vocabulary)
    tokenizer.save(folder / "tokenizer.json")


def _text_files(path: str) -> list[str]:
    """The files to read; of a folder only those that are text, of which one at least must have some."""
    if path == "stdlib":
        return sources.standard_library()
    files = sources.files_of(path)
    if len(files) > 1:
        files = [name for name in files if sources.is_text(name)]
    if not any(next(sources.read_bytes(name, 1), b"") for name in files):
        raise UserError(f"data.path: {path}: there is no text in it; name a file, folder or glob that has some")
    return files


def _bytes(files: list[str]) -> Iterator[Array]:
    for name in files:
        for piece in sources.read_bytes(name):
            yield np.frombuffer(piece, dtype=np.uint8)


def _characters(files: list[str]) -> Iterator[str]:
    for name in files:
        yield from sources.read_text(name)
