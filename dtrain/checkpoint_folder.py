"""A folder that many ranks fill and that appears at once, or not at all.

    root/.step_00000100.partial/     being filled; left behind by a killed job, removed by the next save
    root/step_00000100/              complete
    root/.step_00000100.replaced/    the older one of that step, between two renames; whole, and found by the reader
    root/.step_00000050.removed/     on its way out

Invariant: `together` ends the same way on all ranks, so no rank waits for one that gave up.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain import manifest
from dtrain.checkpoint_reader import folders
from dtrain.collectives import Communicator
from dtrain.errors import UserError


class SharedFolder:
    """The folder of a step while it is made; `needed` is its size in bytes, for the check and the message."""

    def __init__(self, root: Path, step: int, comm: Communicator, needed: int) -> None:
        self.root, self.comm, self.needed = root, comm, needed
        self.final = root / f"step_{step:08}"
        self.partial = root / f".{self.final.name}.partial"
        self._aside = root / f".{self.final.name}.replaced"

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collective: run the block; if it fails on any rank, remove the folder and raise the same UserError on all."""
        failure = None
        try:
            yield
        except (OSError, UserError) as error:
            failure = _reason(error)
        failures = self.comm.all_gather_object(failure)
        failed = [rank for rank, reason in enumerate(failures) if reason is not None]
        if failed:
            text = None
            if self.comm.rank == 0:
                where = f"rank {failed[0]} on {self.comm.hosts[failed[0]]}"
                text = self._give_up(f"{failures[failed[0]]} ({where})")
            raise UserError(self.comm.broadcast_object(text))

    def prepare(self) -> None:
        """Rank 0: remove what killed saves left, check the space, make the folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        for pattern in (".step_*.partial", ".step_*.removed"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover)
        if shutil.disk_usage(self.root).free < self.needed:  # do not fill the disk first: others write to it, too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.partial.mkdir()

    def publish(self) -> None:
        """Rank 0: give the folder its name, when all that is in it is on the disk."""
        sync_folder(self.partial)
        if self.final.exists():
            shutil.rmtree(self._aside, ignore_errors=True)  # if it stays, the rename says so
            self.final.rename(self._aside)
        try:
            self.partial.rename(self.final)
        except OSError:
            if self._aside.exists():
                self._aside.rename(self.final)
            raise
        sync_folder(self.root)
        shutil.rmtree(self._aside, ignore_errors=True)  # the new one is complete; a rest is ignored and goes next time

    def prune(self, keep: int) -> None:
        """Rank 0: remove all but the newest `keep` (by serial number: the one just published is the newest)."""
        ordered = sorted(folders(self.root), key=lambda one: (manifest.serial(one[0]), one[1]))
        for folder, _ in ordered[:-keep]:
            doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
            try:
                folder.rename(doomed)  # first out of sight as a whole: it is never there half
                shutil.rmtree(doomed)
            except OSError as error:
                import logging

                text = f"cannot remove the old checkpoint {folder}: {error.strerror}"
                logging.getLogger("dtrain").warning(text)

    def _give_up(self, reason: str) -> str:
        shutil.rmtree(self.partial, ignore_errors=True)  # a rest is hidden, ignored and removed by the next save
        existing = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"cannot write the checkpoint {self.final}: {reason}. It needs {self.needed:,} bytes; {free:,} bytes are "
            f"free there. Nothing of it is left, earlier checkpoints are as they were"
        )


def write_synced(path: Path, content: bytes) -> None:
    """Write a new small file and force it to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems: they do it at once or never
            raise
    finally:
        os.close(descriptor)


def _reason(error: OSError | UserError) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno == errno.ENOENT:
        text += "; the folder must be on a file system that all hosts share"
    return text
