"""Both levels between processes: over the hosts there are; on one host, over two nodes that are made up."""

import numpy as np
import pytest

from dtrain.collectives import Communicator
from tests import hierarchy_cases


@pytest.fixture(scope="module")
def spread(comm: Communicator) -> Communicator:
    """A communicator with levels: every third rank is on the second node, if there is only one."""
    if comm.local_size < comm.size:
        if comm.levels is None:
            pytest.skip("one rank on every host")
        if len(set(map(len, comm.levels.nodes))) == 1:
            return comm
        in_turns = comm.split(0, comm.local_rank * comm.size + comm.rank)  # uneven hosts: their ranks in turns, too
        assert in_turns is not None
        return in_turns
    if comm.size < 3:
        pytest.skip("two nodes of which one has two ranks need three")
    transport = comm.transport.split(0, comm.rank)
    assert transport is not None
    transport.nodes = [int(rank % 3 == 1) for rank in range(comm.size)]
    vars(transport)["_names"] = {0: "first", 1: "second"}
    return Communicator(transport)


@pytest.mark.parametrize("name", hierarchy_cases.ALL)
def test_case(spread: Communicator, name: str) -> None:
    hierarchy_cases.ALL[name](spread)


def test_memory_comes_back(spread: Communicator) -> None:
    """Splits and what they share are given back; arrays of the window are used again."""
    for _ in range(3):
        part = spread.split(0)
        assert part is not None
        for _ in range(5):
            array = part.empty(1 << 20)
            array[...] = 1
            part.all_reduce(array, out=array)
            assert np.all(array == part.size)
            del array
        part.close()
