"""The keys of `data`: what it learns from."""

from typing import Literal, TypeAlias

from dtrain.config.rules import Member, at_least, fraction, require


class _Source(Member, frozen=True, kw_only=True):
    path: str
    """A file, a folder, a glob (`texts/**/*.txt`), or a name that the kind knows."""
    validation: float = 0.05
    """Share that is kept for validation."""

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.path != "", f"data.path: {self.path}; must name a file, a folder or a glob")
        fraction("data", validation=self.validation)


class TextConfig(_Source, frozen=True, kw_only=True, tag="text"):
    """Text; `path: stdlib` is the source text of Python's own standard library."""

    tokenizer: Literal["byte", "bpe"] = "byte"
    vocabulary: int | None = None
    """Tokens that byte-pair encoding learns; null: 256 for bytes, 4096 for bpe."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.vocabulary is not None and self.tokenizer == "byte":
            require(
                self.vocabulary == 256, f"data.vocabulary: {self.vocabulary}; bytes have 256: leave it out, or null"
            )
        elif self.vocabulary is not None:
            require(
                self.vocabulary >= 257, f"data.vocabulary: {self.vocabulary}; must be 257 or more: bytes and merges"
            )


class TokensConfig(_Source, frozen=True, kw_only=True, tag="tokens"):
    """Tokens that were prepared elsewhere: `.bin` (raw, memory-mapped) or `.npy`."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    """Of a `.bin` file."""
    vocabulary: int | None = None
    """Number of different tokens; null: the largest token + 1."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        at_least(1, "data", vocabulary=1 if self.vocabulary is None else self.vocabulary)


class ImagesConfig(_Source, frozen=True, kw_only=True, tag="images"):
    """Images with labels: IDX or NPZ files; `path: digits` are scikit-learn's 1797 handwritten digits."""

    labels: str | None = None
    """The file of the labels of an IDX file; null: found by the name beside it."""


class TableConfig(_Source, frozen=True, kw_only=True, tag="table"):
    """Rows of numbers, words and a class: CSV or NPZ; `path: fair` is a survey of 6366 people inside statsmodels."""

    target: str | None = None
    """The column to predict; null: the last."""
    categories: tuple[str, ...] = ()
    """Columns of words (or numbers that only name something), each with an embedding table: for dlrm, of a CSV."""
    hash_rows: int | None = None
    """Rows of each embedding table, chosen by a hash of the word; null: a row for every different word."""
    separator: str = "|"
    """Between the words of a cell that has several."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        twice = sorted({name for name in self.categories if self.categories.count(name) > 1})
        require(not twice, f"data.categories: {', '.join(twice)}; named twice")
        require(
            self.target is None or self.target not in self.categories,
            f"data.categories: {self.target}; is the target",
        )
        at_least(1, "data", hash_rows=1 if self.hash_rows is None else self.hash_rows)
        require(self.separator != "", "data.separator: must be a character or more")


DataConfig: TypeAlias = TextConfig | TokensConfig | ImagesConfig | TableConfig
