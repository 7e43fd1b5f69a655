"""Experts on the processes of mpirun: this layout = one process, with what a single node shares and without."""

import numpy as np
import pytest

from tests import training

MODEL = {"kind": "moe_gpt", "layers": 2, "dim": 16, "heads": 2, "sequence": 12, "moe": {"experts": 8, "top": 2}}
TRAIN = {"steps": 2, "micro_batch": 3, "global_batch": 24, "validate": {"every": 2, "batches": 1}}


@pytest.mark.parametrize("data_parallel", ["ddp", "zero3"])
def test_experts_equal_one_process(comm, data_parallel):
    ep = 2 if comm.size % 2 == 0 else comm.size
    trainer = training.trainer(comm, model=MODEL, train=TRAIN, parallel={"ep": ep, "data_parallel": data_parallel})
    records = list(trainer.run())
    expected = training.alone(comm, model=MODEL, train=TRAIN)
    np.testing.assert_allclose(training.losses(records), expected.losses, rtol=1e-10)
    assert [records[-1].validation_loss] == pytest.approx(expected.validation, rel=1e-10)
