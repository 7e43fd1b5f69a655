"""Checkpoints by real ranks: every slicing comes back as every other, and a rank that cannot write strands nobody."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import checkpoint, safetensors_file
from dtrain.checkpoint import Piece, Reader
from dtrain.collectives import Communicator
from dtrain.errors import UserError

WHOLE = np.arange(13 * 10, dtype=np.float32).reshape(13, 10)


@pytest.fixture
def root(comm: Communicator) -> Iterator[Path]:
    """One new folder for all ranks."""
    path = Path(comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield path
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def piece(comm: Communicator, name: str, dim: int | None) -> Piece:
    """This rank's share along dim; None: everything. With more ranks than rows some have nothing."""
    start = [0, 0]
    part = WHOLE
    if dim is not None:
        edges = np.linspace(0, WHOLE.shape[dim], comm.size + 1).astype(int)
        start[dim] = int(edges[comm.rank])
        part = WHOLE.take(range(edges[comm.rank], edges[comm.rank + 1]), dim)
    return Piece(name, part, (start[0], start[1]), WHOLE.shape)


def save(comm: Communicator, root: Path, step: int, keep: int = 0) -> Path:
    pieces = [piece(comm, "rows", 0), piece(comm, "columns", 1), *(piece(comm, f"same{i}", None) for i in range(4))]
    return checkpoint.save(root, step, comm, pieces, {"step": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def agreed(comm: Communicator, value: Any) -> Any:
    """The value, which all ranks have."""
    values = comm.all_gather_object(value)
    assert values == [values[0]] * comm.size
    return value


def test_any_slice_is_read_from_any_slices(comm: Communicator, root: Path) -> None:
    reader = Reader(Path(agreed(comm, str(save(comm, root, 1)))))
    for name in reader.names():
        assert np.array_equal(reader.tensor(name), WHOLE)
        for dim in (0, 1):
            mine = piece(comm, name, dim)
            assert np.array_equal(reader.read(name, mine.start, mine.array.shape), mine.array)
    assert len(reader.manifest.files) == comm.size  # one file each, also of what all of them have
    comm.barrier()


def test_the_oldest_are_gone_on_all_ranks_when_save_returns(comm: Communicator, root: Path) -> None:
    for step in (1, 2, 3):
        save(comm, root, step, keep=2)
        there = names(root)
        comm.barrier()
        assert there == [f"step_{n:08}" for n in range(max(1, step - 1), step + 1)]


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_a_rank_that_cannot_write_ends_the_save_on_all(
    comm: Communicator, root: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(comm, root, 1)

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "all" or comm.rank == {"first": 0, "last": comm.size - 1}[where]:
        monkeypatch.setattr(safetensors_file, "write", fail)
    with pytest.raises(UserError) as caught:
        save(comm, root, 2)
    text = agreed(comm, str(caught.value))
    assert str(root / "step_00000002") in text and "No space left" in text and "bytes are free" in text
    assert f"rank {comm.size - 1 if where == 'last' else 0}" in text
    there = names(root)
    comm.barrier()
    assert there == ["step_00000001"]
    monkeypatch.undo()
    assert Reader(save(comm, root, 2)).verify() > 0
    comm.barrier()


def test_pieces_that_leave_a_gap_are_refused_on_all(comm: Communicator, root: Path) -> None:
    gap = Piece("w", np.zeros((1, 2)), (2 * comm.rank, 0), (2 * comm.size, 2))
    with pytest.raises(ValueError, match=r"w: no slice has \[1:2,0:2\]"):
        checkpoint.save(root, 1, comm, [gap], {})
    assert names(root) == []
    comm.barrier()
