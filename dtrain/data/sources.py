"""From the value of `data.path` to files: names, state and bytes, with the user's mistakes told in the user's words."""

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dtrain.errors import UserError

FORMAT = 1  # goes into every name in the cache: count up when what is written there changes

# The standard library without its tests (two thirds of it), tables of numbers, and programs beside the library proper.
NOT_LIBRARY = {
    "__pycache__", "distutils", "encodings", "ensurepip", "idlelib", "idle_test", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def files_of(path: str) -> list[str]:
    """The files of a path (a file, a folder with all below it, a glob), sorted, hidden ones left out of folders."""
    chosen = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(chosen):
        found = [name for name in _below(chosen, skip=set()) if not os.path.basename(name).startswith(".")]
        if not found:
            raise UserError(f"data.path: {path}: the folder {chosen} has no files; name one that holds the data")
        return found
    if os.path.lexists(chosen):
        return [chosen]
    if glob.has_magic(path):
        found = sorted(name for name in glob.glob(chosen, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(f"data.path: {path}: no file matches {chosen} (`**` stands for any folders)")
        return found
    raise UserError(
        f"data.path: {path}: there is no {chosen}; allowed: a file, a folder, a glob such as 'texts/**/*.txt'"
    )


def standard_library() -> list[str]:
    """The Python files of the running Python's own library, sorted: a few MB of real text on every machine."""
    root = sysconfig.get_path("stdlib")
    found = [name for name in _below(root, skip=NOT_LIBRARY) if name.endswith(".py")]
    if not found:
        raise UserError(f"data.path: stdlib: this Python has no source text in {root}; name a file or folder")
    return found


def _below(root: str, skip: set[str]) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        found += [os.path.join(folder, name) for name in names]
    return sorted(found)


def _unreadable(error: OSError, name: str | None = None) -> None:
    """Raise UserError; an error of reading, not opening, does not know the name."""
    name = name or error.filename
    raise UserError(f"data.path: cannot read {name}: {error.strerror}; check its permissions") from error


def name_of_entry(files: list[str], *options: object) -> str:
    """A name for the cache: changes with the files' names, sizes and times of change, and with the options."""
    state = hashlib.blake2b(repr((FORMAT, sys.byteorder, options)).encode(), digest_size=16)
    for name in files:
        try:
            found = os.stat(name)
        except OSError as error:
            _unreadable(error, name)
        else:
            state.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return state.hexdigest()


def name_of_library(*options: object) -> str:
    """The same for the standard library, which changes only with Python itself: no need to look at 800 files."""
    root = sysconfig.get_path("stdlib")
    text = repr((FORMAT, sys.byteorder, options, root, sys.version, sorted(NOT_LIBRARY)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_bytes(name: str, piece: int = 1 << 20) -> Iterator[bytes]:
    """The content of a file in pieces."""
    try:
        with open(name, "rb") as file:
            while content := file.read(piece):
                yield content
    except OSError as error:
        _unreadable(error, name)


def read_text(name: str, piece: int = 1 << 16) -> Iterator[str]:
    """The content of a file in pieces of so many characters; what is not UTF-8 becomes U+FFFD."""
    try:
        with open(name, encoding="utf-8", errors="replace", newline="") as file:
            while content := file.read(piece):
                yield content
    except OSError as error:
        _unreadable(error, name)


def is_text(name: str) -> bool:
    """No zero byte in the first 4 KiB: git's rule, near enough."""
    return b"\0" not in next(read_bytes(name, 4096), b"")


def whole(path: Path) -> bytes:
    """The content of one file of the user."""
    return b"".join(read_bytes(str(path)))
