"""Layouts that cut the model, over MPI and shared memory: this layout = one process.

Few here: tests/unit has all of them on threads. What only processes have: windows, and parameters that exist once.
"""

from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator
from tests import training

GPT: dict[str, Any] = {"kind": "gpt", "layers": 4, "dim": 32, "heads": 4, "sequence": 16}
TRAIN: dict[str, Any] = {"steps": 2, "micro_batch": 2, "global_batch": 8, "validate": {"every": 2, "batches": 1}}

FEW = {**TRAIN, "micro_batch": 4}  # two microbatches where all ranks compute on the same samples


def train(comm: Communicator, **sections: Any) -> Any:
    trainer = training.trainer(comm, **{"model": GPT, "train": TRAIN, **sections})
    records = list(trainer.run())
    return trainer, training.losses(records), [r.validation_loss for r in records if r.validation_loss is not None]


def compare(comm: Communicator, **sections: Any) -> Any:
    mine, losses, validation = train(comm, **sections)
    expected = training.alone(comm, model=GPT, train={**sections.get("train", TRAIN), "micro_batch": 4})
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-10)
    np.testing.assert_allclose(validation, expected.validation, rtol=1e-10)
    return mine


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(comm: Communicator, stage: int, replicate: bool) -> None:
    if 24 % comm.size:
        pytest.skip(f"24 samples do not divide over {comm.size} ranks")
    train = {**TRAIN, "global_batch": 24, "micro_batch": next(n for n in (4, 3, 2, 1) if 24 // comm.size % n == 0)}
    trainer = compare(comm, parallel={"data_parallel": f"zero{stage}", "replicate": replicate}, train=train)
    if comm.size > 1:
        assert all(group.is_shared != replicate for group in trainer.flat.groups)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
def test_pipeline(comm: Communicator, schedule: str) -> None:
    if comm.size > 4:
        pytest.skip(f"{comm.size} stages of 4 blocks")
    compare(comm, parallel={"pp": comm.size}, pipeline={"schedule": schedule})


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor(comm: Communicator, sequence: bool) -> None:
    compare(comm, parallel={"tp": comm.size, "sequence": sequence}, train=FEW)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_context(comm: Communicator, kind: str) -> None:
    """The same bits in two runs, whenever messages came."""
    if kind == "ulysses" and comm.size > 4:
        pytest.skip(f"{comm.size} ranks share out 4 heads")
    parallel = {"cp": comm.size, "context": kind}
    first = compare(comm, parallel=parallel, train=FEW)
    second, _, _ = train(comm, parallel=parallel, train=FEW)
    for one, other in zip(first.flat.groups, second.flat.groups, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


@pytest.mark.parametrize("data_parallel", ["ddp", "zero2"])
def test_context_and_others(comm: Communicator, data_parallel: str) -> None:
    if comm.size not in (4, 8):
        pytest.skip("cp 2 x dp 2 x tp needs 4 or 8 ranks")
    compare(comm, parallel={"cp": 2, "dp": 2, "tp": comm.size // 4, "data_parallel": data_parallel})


@pytest.mark.parametrize("data_parallel", ["ddp", "zero1", "zero3"])
def test_three_dimensions(comm: Communicator, data_parallel: str) -> None:
    if comm.size not in (4, 8):
        pytest.skip("tp 2 x pp 2 x dp needs 4 or 8 ranks")
    compare(comm, parallel={"tp": 2, "pp": 2, "sequence": True, "data_parallel": data_parallel})


def test_ranks_that_share_see_what_one_writes(comm: Communicator) -> None:
    train = {**TRAIN, "global_batch": comm.size, "micro_batch": 1}
    trainer = training.trainer(comm, model=GPT, train=train, parallel={"data_parallel": "zero3"})
    if comm.size == 1:
        pytest.skip("one rank shares with nobody")
    group = trainer.flat.groups[0]
    comm.barrier()
    if comm.rank == 1:
        group.data[3] = 12345.0
    comm.barrier()
    assert group.data[3] == 12345.0
    assert "parameters once per node" in trainer.strategies[0].notes()[0]
