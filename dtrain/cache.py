"""The folder for what is costly to make and cheap to keep: measured tables, tokens of a text, trained tokenizers.

    $DTRAIN_CACHE, else ~/Library/Caches/dtrain on macOS, else $XDG_CACHE_HOME/dtrain, else ~/.cache/dtrain

Many ranks may make the same file at the same time. Each writes a file of its own and gives it the final name in one
step, so a reader sees nothing or all of it.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from dtrain.errors import UserError


def cache_folder() -> Path:
    """Return the folder; it need not exist yet."""
    chosen = os.environ.get("DTRAIN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dtrain"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"


def write_atomic(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all, replacing what was there. OSError as from open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def check_writable(folder: Path) -> None:
    """Raise UserError with the remedy when files cannot be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); set DTRAIN_CACHE to a folder that can"
        ) from None
