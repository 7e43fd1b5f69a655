"""The measured table between processes: one for all ranks, made by `dtrain bench tune`, and used by the next world."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import __version__
from dtrain.collectives import Communicator, mpi, tuning, world
from dtrain.collectives.tuning import Measured, Table
from dtrain.errors import UserError
from dtrain.launch import bench_tune
from dtrain.launch.run import described

LENGTH = 1 << 16  # bytes: through the staging by the built-in rule


@pytest.fixture
def path(comm: Communicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this rank, which no other rank has."""
    found = tmp_path / f"table of rank {comm.rank}.json"
    monkeypatch.setenv("DTRAIN_TUNING", str(found))
    return found


def table(comm: Communicator, best: str) -> Table:
    names = [best, *({"native", "exchange"} - {best})]
    times = {name: 10.0 * (1 + number) for number, name in enumerate(names)}
    nodes = len(set(comm.transport.nodes))
    sizes = [size for size in (2, 3, 4, comm.size) if size > 1]
    rows = [Measured("all_reduce", size, nodes, "private", LENGTH, times, tuple(names)) for size in set(sizes)]
    return Table.of(tuning.key(mpi.library(), __version__), rows)


def algorithm(comm: Communicator) -> str:
    comm.all_reduce(np.ones(LENGTH // 4, np.float32))
    assert comm.last is not None
    return comm.last.algorithm


def test_all_ranks_go_by_the_table_of_rank_0(comm: Communicator, path: Path) -> None:
    """Every rank has another file: different answers, none, garbage."""
    if comm.size == 1:
        return
    for rank_0, others in (("exchange", "native"), ("native", "exchange")):
        best = rank_0 if comm.rank == 0 else others
        path.write_text(table(comm, best).as_json() if comm.rank != 1 else "garbage")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the others have on file is not even read
            whole = world()
        assert whole.tuning is not None and described(whole).startswith(str(path.parent)) == (comm.rank == 0)
        assert "table of rank 0.json: " in described(whole)
        assert algorithm(whole) == rank_0
        part = whole.split(comm.rank % 2)
        assert part is not None
        if part.size > 1:
            assert algorithm(part) == rank_0
        whole.close()


def test_garbage_on_rank_0_is_told_once_and_means_no_table(comm: Communicator, path: Path) -> None:
    path.write_text("garbage" if comm.rank == 0 else table(comm, "native").as_json())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = world()
    assert len(caught) == (comm.rank == 0), [str(warning.message) for warning in caught]
    assert whole.tuning is None and "built-in rule" in described(whole)
    whole.close()


def test_tuning_writes_a_table_and_the_next_world_uses_it(
    comm: Communicator, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_tune, "QUICK_SECONDS", 1e-4)  # two iterations in each block
    if comm.size == 1:
        with pytest.raises(UserError, match="one rank has nothing to choose"):
            bench_tune.tune(("all_reduce",), (LENGTH,))
        return
    with pytest.raises(UserError, match=r"--collectives barrier: .*allowed: all_reduce, "):
        bench_tune.tune(("barrier",), (LENGTH,))
    lines: list[str] = []
    made = bench_tune.tune(("all_reduce",), (1024 * comm.size, LENGTH), quick=True, tell=lines.append)
    assert path.exists() == (comm.rank == 0)
    rows = {(row.collective, row.place, row.nbytes): row for row in made.measured}
    if comm.node is not None:
        places = {place for _, place, _ in rows}
        assert places == {"window", "apart", "private"}
        assert {"staged", "native", "exchange"} <= set(rows["all_reduce", "private", 1024 * comm.size].times)
        assert "window" in rows["all_reduce", "window", 1024 * comm.size].times
    if comm.rank == 0:
        content = json.loads(path.read_text())
        assert content["key"] == tuning.key(mpi.library(), __version__)
        assert sum("native" in line for line in lines) >= len(rows)
    whole = world()
    assert whole.tuning is not None and whole.tuning.table.measured == made.measured
    array = np.ones(1024 * comm.size // 4 * 3, np.float32)  # in between: the same class as the shorter length
    order = whole.tuning.order("all_reduce", whole._all_reduce_call(array, "sum", None)[0])
    assert order == rows["all_reduce", "private", 1024 * comm.size].order
    whole.all_reduce(array)
    assert whole.last is not None and (whole.last.algorithm == order[0] or array.nbytes <= 4096)
    whole.close()
    # a second run adds what it measures and keeps the rest
    again = bench_tune.tune(("broadcast",), (LENGTH,), quick=True, tell=lambda text: None)
    assert {row.collective for row in again.measured} == {"all_reduce", "broadcast"}


def test_a_folder_that_cannot_be_written_is_one_message(
    comm: Communicator, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.size == 1:
        return
    path.write_text("a file")
    monkeypatch.setattr(bench_tune, "QUICK_SECONDS", 1e-4)
    with pytest.raises(UserError, match=r"cannot be written \(.*set DTRAIN_CACHE"):
        bench_tune.tune(("gather",), (1024,), quick=True, path=path / "below", tell=lambda text: None)


def test_without_a_folder_the_start_asks_nothing(
    comm: Communicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No table, no cost: the library's name, the processor and the file are not looked for, nothing is sent."""
    monkeypatch.delenv("DTRAIN_TUNING", raising=False)
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "none"))
    asked: list[Any] = []
    monkeypatch.setattr(tuning, "key", lambda *words: asked.append(words))
    whole = world()
    assert whole.tuning is None and not asked and not os.path.exists(tmp_path / "none")
    whole.close()
