"""Collectives over nodes that are threads: layouts of every kind, and what goes wrong."""

import time

import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.collectives.waiting import CollectiveMismatch, CollectiveTimeout
from tests import hierarchy_cases
from tests.nodes_in_threads import run_nodes

EVEN, IN_TURNS, LONELY, THREE = [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [5, 2, 2, 7, 7, 7]


@pytest.mark.parametrize("nodes", [LONELY, THREE], ids=str)
@pytest.mark.parametrize("name", hierarchy_cases.ALL)
def test_case(name: str, nodes: list[int]) -> None:
    run_nodes(nodes, hierarchy_cases.ALL[name])


@pytest.mark.parametrize(
    "nodes", [EVEN, IN_TURNS, [2, 0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3, 3], [0] * 8 + [1] * 8, [0, 0, 1]], ids=str
)
def test_layouts(nodes: list[int]) -> None:
    def check(comm: Communicator) -> None:
        hierarchy_cases.groups(comm)
        for count in (1, 5, 4099):
            arrays = [np.sin(np.arange(count) * (rank + 1)).astype(np.float32) for rank in range(comm.size)]
            expected = hierarchy_cases.total(comm, arrays)
            for source in hierarchy_cases.homes(comm, arrays[comm.rank]):
                assert np.array_equal(
                    comm.reduce_scatter(source, algorithm="hierarchical"),
                    np.array_split(expected, comm.size)[comm.rank],
                )
                assert np.array_equal(comm.all_gather(source, algorithm="hierarchical"), np.concatenate(arrays))
                assert np.array_equal(comm.broadcast(source, 1, algorithm="hierarchical"), arrays[1])
                assert np.array_equal(comm.all_reduce(source, out=source, algorithm="hierarchical"), expected)
            blocks = np.repeat(np.arange(comm.size), count) + 100 * comm.rank
            came = np.repeat(np.arange(comm.size) * 100, count) + comm.rank
            assert np.array_equal(comm.all_to_all(blocks, algorithm="hierarchical"), came)

    run_nodes(nodes, check)


def test_one_node_or_one_rank_each_has_no_levels() -> None:
    for nodes in ([0, 0, 0], [0, 1, 2]):
        assert run_nodes(nodes, lambda comm: comm.levels) == [None] * 3


def test_ranks_of_a_node_that_do_different_things_are_told() -> None:
    def stray(comm: Communicator) -> None:
        comm.all_reduce(np.ones(70_000 + comm.rank % 2, np.float32))

    with pytest.raises(CollectiveMismatch, match=r"all_reduce #\d+ .*7000\d elements.*rank \d to .*7000\d"):
        run_nodes(EVEN, stray, patience=1)


def test_who_does_not_come_is_told() -> None:
    def stray(comm: Communicator) -> None:
        assert comm.levels is not None
        if comm.rank != 3:
            with pytest.raises(CollectiveTimeout, match=r"rank \d of 4 waited .* in all_reduce"):
                comm.all_reduce(np.ones(70_000, np.float32))
        else:
            time.sleep(2.5)

    began = time.monotonic()
    run_nodes(EVEN, stray, patience=1)
    assert time.monotonic() - began < 20
