"""Cut parameters over MPI: the cases of the unit test, with flat buffers in shared windows."""

from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, single
from dtrain.strategies import DistributedDataParallel, NaiveDataParallel
from tests import training
from tests.unit.test_cut_parameters import make, pieces, sections


def layouts(size: int) -> list[dict[str, int]]:
    """All ranks along tp; and two axes, where the size has two factors."""
    return [{"tp": size}, *({"dp": size // 2, "tp": 2} for _ in range(size % 2 == 0))]


@pytest.mark.parametrize("data_parallel", [DistributedDataParallel, NaiveDataParallel])
def test_every_layout_equals_one_process_and_reads_the_others(comm: Communicator, data_parallel: Any, tmp_path) -> None:
    given = sections("adamw", steps=4)
    if 4 % max(each.get("dp", 1) for each in layouts(comm.size)):
        pytest.skip(f"4 samples do not divide over {comm.size} ranks")
    expected_losses = training.losses(list((whole := make(single(), given)).run()))
    expected = pieces(whole)
    folder = str(comm.broadcast_object(str(tmp_path)))
    for number, layout in enumerate(layouts(comm.size)):
        trainer = make(comm, given, data_parallel, **layout)
        first = training.losses([trainer.train_step() for _ in range(2)])
        saved = trainer.save(f"{folder}/{number}")
        again = make(comm, given, data_parallel, **layouts(comm.size)[number - 1])
        again.load(saved)
        second = training.losses(list(again.run()))
        np.testing.assert_allclose(np.concatenate([first, second]), expected_losses, rtol=1e-10)
        for name, blocks in pieces(again).items():
            for start, array in blocks:
                where = tuple(slice(a, a + n) for a, n in zip(start, array.shape, strict=True))
                np.testing.assert_allclose(array, expected[name][0][1][where], rtol=1e-7, atol=1e-10, err_msg=name)
