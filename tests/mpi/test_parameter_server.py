"""Parameter servers over MPI: synchronous = one process, and the other modes come to their end."""

import numpy as np
import pytest

from tests import served, training

SECTIONS = {
    "model": {"kind": "gpt", "layers": 1, "dim": 16, "heads": 2, "sequence": 8},
    "train": {"steps": 3, "global_batch": 12, "micro_batch": 2, "validate": {"every": 2, "batches": 1}},
}


@pytest.mark.parametrize("mode", ["sync", "async", "ssp", "local_sgd"])
def test_servers_over_mpi(comm, mode):
    if comm.size < 2:
        pytest.skip("a worker and a server are two ranks")
    servers = max(1, comm.size // 3)
    result = served.serve(comm, **SECTIONS, parameter_server={"servers": servers, "mode": mode})
    everyone = comm.all_gather_object([record.loss for record in result.records])
    losses = everyone[comm.size - servers]
    assert len(losses) == 3 and np.all(np.isfinite(losses))
    if mode == "sync" or comm.size - servers == 1:
        expected = training.alone(comm, **SECTIONS)
        np.testing.assert_allclose(losses, expected.losses[:, 0], rtol=1e-10)
        for name, (start, values) in result.parameters.items():
            whole = expected.parameters[name].reshape(-1)
            np.testing.assert_allclose(values, whole[start : start + values.size], rtol=1e-9, atol=1e-11)
