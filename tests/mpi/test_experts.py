"""Experts on the processes of mpirun: this layout = one process, with what a single node shares and without."""

import numpy as np
import pytest

from dtrain.collectives import single
from tests import training

MODEL = {"kind": "moe_gpt", "layers": 2, "dim": 16, "heads": 2, "sequence": 12, "moe": {"experts": 8, "top": 2}}
TRAIN = {"steps": 2, "micro_batch": 1, "global_batch": 24, "validate": {"every": 2, "batches": 1}}


@pytest.mark.parametrize("data_parallel", ["ddp", "zero3"])
def test_experts_equal_one_process(comm, data_parallel):
    ep = 2 if comm.size % 2 == 0 else comm.size
    results = []
    for on, parallel in ((single(), {}), (comm, {"ep": ep, "data_parallel": data_parallel})):
        trainer = training.trainer(on, model=MODEL, train=TRAIN, parallel=parallel)
        records = list(trainer.run())
        results.append((training.losses(records), records[-1].validation_loss))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-10)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-10)
