"""Tables cut over real processes: the losses, and the parts of the tables, are those of one process."""

import numpy as np
import pytest

from tests import training

CATEGORIES = ["rate_marriage", "religious", "educ", "occupation", "occupation_husb"]


def sections(ranks, **parallel):
    return {
        "model": {"kind": "dlrm", "dim": 6, "bottom": [8], "top": [8]},
        "data": {"kind": "table", "path": "fair", "categories": CATEGORIES},
        "train": {"steps": 3, "global_batch": 4 * ranks, "micro_batch": 2, "validate": {"every": 3, "batches": 1}},
        "parallel": parallel,
    }


@pytest.mark.parametrize("embedding", ["table", "row", "column"])
def test_cut_tables_equal_one_process(comm, embedding):
    pytest.importorskip("statsmodels")
    expected = training.alone(comm, **sections(comm.size))
    trainer = training.trainer(comm, **sections(comm.size, embedding=embedding))
    np.testing.assert_allclose(training.losses(list(trainer.run())), expected.losses, rtol=1e-11)
    for block in trainer._blocks()["parameter"]:
        part = tuple(slice(a, a + n) for a, n in zip(block.start, block.array.shape, strict=True))
        whole = expected.parameters[block.name]
        np.testing.assert_allclose(block.array, whole[part], rtol=1e-8, atol=1e-11, err_msg=block.name)
