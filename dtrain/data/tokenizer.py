"""Text <-> numbers: bytes as they are, or byte-pair encoding trained on the text.

    "né"  ──bytes──►  6e c3 a9  =  [110, 195, 169]              256 ids, nothing to train, longer sequences
                      └ "n" ┘└"é"┘  =  [77, 305]                bpe: the most frequent pairs become ids of their own

Byte-pair encoding works on bytes as well, so every text round-trips and there is no unknown token.
Reference: Sennrich, Haddow, Birch, "Neural machine translation of rare words with subword units" (ACL 2016).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dtrain.arrays import Array
from dtrain.errors import UserError


class Tokenizer(Protocol):
    """A pair of functions between text and ids, and the file that keeps it with a run."""

    @property
    def vocabulary(self) -> int:
        """The number of ids."""

    def encode(self, text: str) -> Array:
        """The ids (N,) int32 of `text`."""

    def decode(self, ids: Array) -> str:
        """The text of `ids` (N,); what is no UTF-8 becomes U+FFFD."""

    def save(self, path: Path) -> None:
        """Write the JSON file that `load` reads."""


class ByteTokenizer:
    """Ids are the bytes of the UTF-8 text."""

    vocabulary = 256

    def encode(self, text: str) -> Array:
        """The ids (N,) int32 of `text`."""
        # A prompt that was typed in another encoding arrives as surrogates: they are its bytes.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Array) -> str:
        """The text of `ids` (N,); ids that are no bytes (a mask token, a padded vocabulary) become U+FFFD too."""
        raw = b"".join(bytes([i]) if i < 256 else b"\xff" for i in ids.tolist())
        return raw.decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the JSON file that `load` reads."""
        path.write_text(json.dumps({"kind": "byte"}))


class BPETokenizer:
    """A trained encoding in the JSON format of the `tokenizers` library, which is imported only when it is used."""

    def __init__(self, definition: str, vocabulary: int) -> None:
        self.definition, self.vocabulary = definition, vocabulary
        self._loaded: Any = None

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = import_tokenizers().Tokenizer.from_str(self.definition)
        return self._loaded

    def encode(self, text: str) -> Array:
        """The ids (N,) int32 of `text`."""
        return np.array(self._tokenizer().encode(text).ids, dtype=np.int32)

    def decode(self, ids: Array) -> str:
        """The text of `ids` (N,)."""
        text: str = self._tokenizer().decode(ids.tolist(), skip_special_tokens=False)
        return text

    def encode_pieces(self, pieces: Iterator[str]) -> Iterator[Array]:
        """The ids (N,) int32 of each piece, the library's threads working on a few pieces at a time."""
        several: list[str] = []
        for piece in pieces:
            several.append(piece)
            if len(several) == 64:
                yield from self._encode_several(several)
                several = []
        yield from self._encode_several(several)

    def _encode_several(self, pieces: list[str]) -> Iterator[Array]:
        for encoding in self._tokenizer().encode_batch(pieces):
            yield np.array(encoding.ids, dtype=np.int32)

    def save(self, path: Path) -> None:
        """Write the JSON file that `load` reads."""
        path.write_text(self.definition, encoding="utf-8")


def train_bpe(pieces: Iterator[str], vocabulary: int) -> BPETokenizer:
    """Learn up to `vocabulary` ids (fewer when the text is too short for so many pairs): 256 bytes, then merges."""
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return BPETokenizer(tokenizer.to_str(), tokenizer.get_vocab_size())


def load(path: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `path`."""
    try:
        definition = path.read_text(encoding="utf-8")
        content = json.loads(definition)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from error
    if content == {"kind": "byte"}:
        return ByteTokenizer()
    try:
        return BPETokenizer(definition, len(content["model"]["vocab"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is JSON, but not a tokenizer's; allowed: what dtrain wrote") from error


def import_tokenizers() -> Any:
    """The `tokenizers` library, or the error that says how to get it."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise UserError(
            "data.tokenizer: bpe needs the library tokenizers: pip install 'dtrain[bpe]'; or use tokenizer: byte"
        ) from error
    return tokenizers
