"""PipeDream on the processes of mpirun, a stage on each = the delayed updates done by hand in one process.

Check 47 of the course: forward and backward of a microbatch use one version of the weights; with real messages, whose
order nobody but the schedule decides.
"""

import numpy as np
import pytest

from tests.pipedream_cases import CASES, check, train


@pytest.mark.parametrize("case", CASES)
def test_delayed_updates_are_those_of_the_simulation(comm, case):
    if comm.size == 1:
        pytest.skip("one stage waits for nobody")
    losses, values, staleness, kept = train(comm, CASES[case][0])
    mine = [losses, {name: value.tolist() for name, value in values.items()}, list(staleness.items()), kept]
    results = [
        (losses, {name: np.array(value) for name, value in values.items()}, dict(staleness), kept)
        for losses, values, staleness, kept in comm.all_gather_object(mine)
    ]
    if comm.rank == 0:
        check(case, results)
