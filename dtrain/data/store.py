"""Entries of the cache: folders that are made once per machine from data of the user, and opened ever after.

    <cache folder>/text/3f2a…/        an entry: appears whole, under a name that says what it was made from
    <cache folder>/text/3f2a….lock    only while it is made: one rank of a machine makes it, the others wait
    <cache folder>/text/3f2a….x8k1    only while it is made: the entry before its rename

Invariant: an entry is complete or not there, whoever is killed when. The lock only saves work; where a file system has
no locks, several ranks make the same entry, and the first rename wins. All may be deleted at any time between runs.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.cache import cache_folder
from dtrain.errors import UserError

_parsing = threading.Lock()


def map_npy(path: Path | str) -> Array:
    """The array of an NPY file, read only, in the page cache. Errors as of `np.load`. Never unpickles.

    One thread at a time: NumPy parses a header as Python does its own text, and up to Python 3.11.4 two threads that
    parse may end each other's by a SystemError (https://github.com/python/cpython/issues/106905).
    """
    with _parsing:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise ValueError("it must be one array, not an archive of several")
    return np.asarray(found)


def cached(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of the entry `name` (say, a hash of its sources) of `kind`; `make(folder)` fills a new one.

    A UserError if the cache cannot be written. An OSError inside `make` is taken for that too: turn errors of the
    sources into UserErrors there.
    """
    entry = cache_folder() / kind / name
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with locked(entry.with_name(name + ".lock")):
            if not entry.is_dir():
                _make(entry, make)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {entry.parent}: {error.strerror or error}; "
            "make room there, or set the environment variable DTRAIN_CACHE to a folder that can be written"
        ) from error
    return entry


def _make(entry: Path, make: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=entry.name + ".", dir=entry.parent))
    try:
        make(partial)
        for name in partial.iterdir():  # a crash of the machine must not leave the name without its content
            with open(name, "rb") as file:
                os.fsync(file.fileno())
        partial.rename(entry)
    except OSError:
        if not entry.is_dir():  # otherwise another process without a common lock was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against the other processes of this machine; the system frees it when its holder dies.

    Without locks on the file system (some network ones), go on without: whoever calls this must stay right then.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # ENOLCK, EOPNOTSUPP: nobody can lock here, and the rename keeps it right
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)  # who waits for this file finds the entry, who comes later does not lock
    finally:
        os.close(descriptor)
