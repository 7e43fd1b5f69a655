"""Collectives in shared memory with machine code and without: the same bits, and they may meet."""

import numpy as np
import pytest

from dtrain.collectives import Communicator, copying, node, parts, sums
from dtrain.collectives.machine_code import machine_code
from tests.oracle import bits


def results(comm: Communicator) -> list[bytes]:
    """What the collectives make of numbers whose sums are not exact, in long and short arrays."""
    found = []
    for count in (1000 * comm.size, 100_000 * comm.size):
        mine = comm.empty(count)
        mine[...] = np.random.default_rng(comm.rank).standard_normal(count)
        for _ in range(2):  # the second call is a prepared one
            found.append(bits(comm.all_reduce_shared(mine)))
            found.append(bits(comm.reduce_scatter(mine)))
            found.append(bits(comm.all_to_all(mine)))
            found.append(bits(comm.all_gather(mine)))
            mine = comm.all_to_all(mine, out=mine)
            found.append(bits(mine))
            mine = comm.all_reduce(mine, out=mine)
            found.append(bits(mine))
    return found


@pytest.mark.parametrize("who", ["nobody", "all but the first", "only the first"])
def test_with_and_without(comm: Communicator, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    expected = results(comm)
    monkeypatch.setattr(copying, "LONG", 1)
    if who == "nobody" or (who == "all but the first") == (comm.rank == 0):
        for module in (node, sums, copying, parts):
            monkeypatch.setattr(module, "machine_code", lambda: None)
    other = comm.split(0)
    assert other is not None
    try:
        assert results(other) == expected
        assert other.node is None or other.node.flags._await is None, "sleeps where not everybody rings"
    finally:
        other.close()


def test_it_waits_where_ranks_share_cores(comm: Communicator) -> None:
    pytest.importorskip("llvmlite")
    code = machine_code()
    if comm.node is not None and code is not None and code.await_flags is not None:
        assert (comm.node.flags._await is not None) == comm.transport.crowded
