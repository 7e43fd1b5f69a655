"""An interrupted run goes on as if nothing had happened: the same bits in the same layout, to rounding in another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, single
from dtrain.launch.environment import job
from tests import training

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": training.BASE["optimizer"],
    "sgd": {"kind": "sgd", "learning_rate": 0.1},
    "lamb": {"kind": "lamb", "learning_rate": 3e-3},
    "adafactor": {"kind": "adafactor", "learning_rate": 3e-3},
}


def options(comm: Communicator, dtype: str, optimizer: str) -> dict[str, Any]:
    if 24 % comm.size:
        pytest.skip(f"24 samples do not divide over {comm.size} ranks")
    train = {"steps": 20, "dtype": dtype, "micro_batch": 24 // comm.size, "validate": {"every": 0}}
    model = {"kind": "gpt", "layers": 1, "dim": 16, "heads": 2, "sequence": 8, "dropout": 0.1}
    return {"train": train, "optimizer": OPTIMIZERS[optimizer], "model": model}


# Optimizers, dtypes and 2 or 4 ranks: every two of them meet.
PAIRS = [(("float32", "float64")[(number + (job().size > 2)) % 2], name) for number, name in enumerate(OPTIMIZERS)]


@pytest.mark.parametrize(("dtype", "optimizer"), PAIRS)
def test_ten_and_ten_steps_are_the_bits_of_twenty(comm: Communicator, folder: Path, dtype: str, optimizer: str) -> None:
    sections = options(comm, dtype, optimizer)
    whole = training.trainer(comm, **sections)
    expected = training.losses(list(whole.run()))[10:]

    first = training.trainer(comm, **sections)
    for record in first.run():
        if record.step == 10:
            break
    saved = first.save(folder)
    second = training.trainer(comm, **sections)
    second.load(saved)
    assert (second.step, second.consumed) == (10, 240)
    np.testing.assert_array_equal(training.losses(list(second.run())), expected)
    for name, parameter in training.parameters(whole).items():
        np.testing.assert_array_equal(training.parameters(second)[name], parameter, err_msg=name)


def test_half_precision_continues_from_its_float32_copies(comm: Communicator, folder: Path) -> None:
    sections = options(comm, "bfloat16", "adamw")
    whole = training.trainer(comm, **sections)
    expected = training.losses(list(whole.run()))[10:]
    first = training.trainer(comm, **sections)
    for record in first.run():
        if record.step == 10:
            break
    saved = first.save(folder)
    second = training.trainer(comm, **sections)
    second.load(saved)
    np.testing.assert_array_equal(training.losses(list(second.run())), expected)


def test_another_number_of_ranks_goes_on_to_rounding(comm: Communicator, folder: Path) -> None:
    sections = options(comm, "float64", "adamw")
    expected = training.alone(comm, **sections).losses[10:]

    mine = training.trainer(comm, **sections)  # all ranks, then each rank alone
    for record in mine.run():
        if record.step == 10:
            break
    saved = mine.save(folder)
    alone = training.trainer(single(), **sections)
    alone.load(saved)
    np.testing.assert_allclose(training.losses(list(alone.run())), expected, rtol=1e-10)

    part = comm.split(color=comm.rank % 2, key=comm.rank)  # then halves of the ranks
    assert part is not None
    if 24 % part.size == 0:
        sections["train"] = {**sections["train"], "micro_batch": 24 // part.size}
        half = training.trainer(part, **sections)
        half.load(saved)
        np.testing.assert_allclose(training.losses(list(half.run())), expected, rtol=1e-10)
