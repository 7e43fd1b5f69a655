"""The pitfalls of tests/mpi/test_pitfalls.py, and short calls, on numbers of ranks that no test under mpirun has.

Ranks are threads of one process that share memory as those of a node do: window, staging, what goes by messages.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.mpi import test_pitfalls as pitfalls
from tests.mpi import test_shortcuts as shortcuts
from tests.nodes_in_threads import run_nodes

SIZES = [1, 6, 7, 9, 16]
CASES: dict[str, Callable[[Any], None]] = {
    "all_reduce": lambda comm: pitfalls.test_all_reduce_by_every_way(comm, "float32"),
    "movement": pitfalls.test_movement_by_every_way,
    "reduce": pitfalls.test_reduce_scatter_and_reduce_by_every_way,
    "nothing": pitfalls.test_some_ranks_have_nothing,
    "in place": pitfalls.test_in_place,
    "in place again": lambda comm: pitfalls.test_in_place_again(comm, "auto", 5),
    "order": pitfalls.test_the_order_is_that_of_the_ranks,
    "short": lambda comm: shortcuts.test_again_and_again_with_new_data(comm, "float32"),
    "short, uneven": shortcuts.test_uneven_blocks,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = sorted({0, 1, size - 1, size, size + 1, 1023})  # longer ones take their time with one thread running
    monkeypatch.setattr(pitfalls, "counts", lambda size: counts)
    run_nodes([0] * size, CASES[case])
