"""Checkpoints by real ranks: every slicing comes back as every other, and a rank that cannot write strands nobody."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import checkpoint, safetensors_file
from dtrain.checkpoint import Piece, Reader
from dtrain.collectives import Communicator
from dtrain.errors import UserError

WHOLE = np.arange(13 * 10, dtype=np.float32).reshape(13, 10)


def piece(comm: Communicator, name: str, dim: int | None) -> Piece:
    """This rank's share along dim; None: everything. With more ranks than rows some have nothing."""
    start = [0, 0]
    part = WHOLE
    if dim is not None:
        edges = np.linspace(0, WHOLE.shape[dim], comm.size + 1).astype(int)
        start[dim] = int(edges[comm.rank])
        part = WHOLE.take(range(edges[comm.rank], edges[comm.rank + 1]), dim)
    return Piece(name, part, (start[0], start[1]), WHOLE.shape)


def save(comm: Communicator, folder: Path, step: int, keep: int = 0) -> Path:
    pieces = [piece(comm, "rows", 0), piece(comm, "columns", 1), *(piece(comm, f"same{i}", None) for i in range(4))]
    return checkpoint.save(folder, step, comm, pieces, {"step": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def agreed(comm: Communicator, value: Any) -> Any:
    """The value, which all ranks have."""
    values = comm.all_gather_object(value)
    assert values == [values[0]] * comm.size
    return value


def test_any_slice_is_read_from_any_slices(comm: Communicator, folder: Path) -> None:
    reader = Reader(Path(agreed(comm, str(save(comm, folder, 1)))))
    for name in reader.names():
        assert np.array_equal(reader.tensor(name), WHOLE)
        for dim in (0, 1):
            mine = piece(comm, name, dim)
            assert np.array_equal(reader.read(name, mine.start, mine.array.shape), mine.array)
    assert len(reader.manifest.files) == comm.size  # one file each, also of what all of them have
    comm.barrier()


def test_the_oldest_are_gone_on_all_ranks_when_save_returns(comm: Communicator, folder: Path) -> None:
    for step in (1, 2, 3):
        save(comm, folder, step, keep=2)
        there = names(folder)
        comm.barrier()
        assert there == [f"step_{n:08}" for n in range(max(1, step - 1), step + 1)]


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_a_rank_that_cannot_write_ends_the_save_on_all(
    comm: Communicator, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(comm, folder, 1)

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "all" or comm.rank == {"first": 0, "last": comm.size - 1}[where]:
        monkeypatch.setattr(safetensors_file, "write", fail)
    with pytest.raises(UserError) as caught:
        save(comm, folder, 2)
    text = agreed(comm, str(caught.value))
    assert str(folder / "step_00000002") in text and "No space left" in text and "bytes are free" in text
    assert f"rank {comm.size - 1 if where == 'last' else 0}" in text
    there = names(folder)
    comm.barrier()
    assert there == ["step_00000001"]
    monkeypatch.undo()
    assert Reader(save(comm, folder, 2)).verify() > 0
    comm.barrier()


def test_pieces_that_leave_a_gap_are_refused_on_all(comm: Communicator, folder: Path) -> None:
    gap = Piece("w", np.zeros((1, 2)), (2 * comm.rank, 0), (2 * comm.size, 2))
    with pytest.raises(ValueError, match=r"w: no slice has \[1:2,0:2\]"):
        checkpoint.save(folder, 1, comm, [gap], {})
    assert names(folder) == []
    comm.barrier()
