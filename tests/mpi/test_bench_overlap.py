"""`dtrain bench overlap`: rows for every collective, with the thread off and on; what a row says."""

import pytest

from dtrain.collectives import Communicator
from dtrain.launch import bench_overlap
from dtrain.launch.bench_overlap import Row


@pytest.mark.parametrize(
    ("compute", "communication", "both", "overlap"), [(100, 50, 150, 0), (100, 50, 100, 1), (100, 40, 110, 0.75)]
)
def test_the_hidden_share(compute: float, communication: float, both: float, overlap: float) -> None:
    assert Row("all_reduce", 8, "window", True, compute, communication, both).overlap == pytest.approx(overlap)
    assert Row("all_reduce", 8, "window", True, 100, 50, 400).overlap == 0


def test_every_collective(comm: Communicator) -> None:
    if comm.size == 1:
        return
    for name in bench_overlap.COLLECTIVES:
        rows = bench_overlap.measure(comm, name, 4096, False, 12)
        assert [row.thread for row in rows] == [False, True]
        assert all(row.compute > 0 and row.communication > 0 and row.both > 0 for row in rows)
        both = comm.all_gather_object([row.both for row in rows])
        assert all(each == both[0] for each in both), "the ranks differ about what was measured"
    comm.use_progress_thread(False)
