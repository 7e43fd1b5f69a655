"""Compressed training on real ranks, each taken for a node: it learns, it resumes, and lossless is the plain layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, single
from dtrain.strategies import DistributedDataParallel
from dtrain.strategies.compression import BetweenNodes
from tests import training

# Those that carry something from step to step: lots by its number, residuals, factors.
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8", "block": 64},
    "top_k": {"kind": "top_k", "fraction": 0.05},
    "power_sgd": {"kind": "power_sgd", "rank": 2},
}


def options(comm: Communicator, compression: dict[str, Any], steps: int = 8) -> dict[str, Any]:
    if 24 % comm.size or comm.size == 1:
        pytest.skip(f"24 samples on {comm.size} ranks: a divisor of 24 that is more than 1 is needed")
    train = {"steps": steps, "dtype": "float32", "micro_batch": 24 // comm.size, "validate": {"every": 0}}
    compression = compression | ({} if compression["kind"] == "none" else {"everywhere": True})
    return {"train": train, "parallel": {"compression": compression, "bucket_mb": 0.02}}


def compressor(trainer: Any) -> BetweenNodes:
    (strategy,) = trainer.strategies
    assert isinstance(strategy, DistributedDataParallel) and isinstance(strategy.compressor, BetweenNodes)
    return strategy.compressor


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(comm: Communicator, folder: Path, kind: str) -> None:
    sections = options(comm, KINDS[kind])
    whole = training.trainer(comm, **sections)
    expected = training.losses(list(whole.run()))[5:]
    first = training.trainer(comm, **sections)
    for record in first.run():
        if record.step == 5:
            break
    saved = first.save(folder)
    second = training.trainer(comm, **sections)
    second.load(saved)
    assert compressor(second).steps == 5
    np.testing.assert_array_equal(training.losses(list(second.run())), expected)
    for name, parameter in training.parameters(whole).items():
        np.testing.assert_array_equal(training.parameters(second)[name], parameter, err_msg=name)


def test_other_layouts_keep_what_was_not_sent_and_other_kinds_read_it(comm: Communicator, folder: Path) -> None:
    sections = options(comm, KINDS["top_k"])
    first = training.trainer(comm, **sections)
    for record in first.run():
        if record.step == 3:
            break
    saved = first.save(folder)
    kept = comm.all_reduce(residuals(first))
    assert np.abs(kept).max() > 0

    part = comm.split(color=comm.rank * 2 // comm.size)  # two halves, of one rank each on two
    assert part is not None
    if part.size > 1 and 24 % part.size == 0:
        sections["train"] = {**sections["train"], "micro_batch": 24 // part.size}
        half = training.trainer(part, **sections)
        half.load(saved)
        np.testing.assert_allclose(part.all_reduce(residuals(half)), kept, rtol=1e-5, atol=1e-9)

    other = training.trainer(comm, **options(comm, KINDS["power_sgd"]))  # another kind goes on from the residual
    other.load(saved)
    np.testing.assert_array_equal(residuals(other), residuals(first))
    alone = training.trainer(single(), **options(comm, {"kind": "none"}))  # and who does not compress, without it
    alone.load(saved)
    assert alone.step == 3 and np.isfinite(training.losses(list(alone.run()))).all()


def residuals(trainer: Any) -> Any:
    """What this rank has not sent, as flat as its gradients."""
    parts = compressor(trainer).parts
    return np.concatenate([part.residual for part in parts])


@pytest.mark.parametrize("kind", ["top_k", "power_sgd"])
def test_what_loses_nothing_trains_as_without_compression(comm: Communicator, kind: str) -> None:
    lossless = {"top_k": {"kind": "top_k", "fraction": 1.0}, "power_sgd": {"kind": "power_sgd", "rank": 1000}}
    found, expected = (training.trainer(comm, **options(comm, each)) for each in (lossless[kind], {"kind": "none"}))
    np.testing.assert_allclose(training.losses(list(found.run())), training.losses(list(expected.run())), rtol=2e-5)


# After 200 steps, the mean loss of the last 20 may be so much above that without compression.
MARGINS: list[tuple[dict[str, Any], float]] = [
    ({"kind": "int8"}, 0.02),
    ({"kind": "power_sgd", "rank": 4}, 0.05),
    ({"kind": "top_k", "fraction": 0.1}, 0.12),
]


def test_compressed_training_on_real_text_comes_near_the_plain_one(comm: Communicator) -> None:
    if comm.size != 2:
        pytest.skip("200 steps four times: once is enough, on 2 ranks")

    def final(compression: dict[str, Any]) -> float:
        sections = options(comm, compression, steps=200)
        sections["parallel"]["bucket_mb"] = 4.0
        return float(training.losses(list(training.trainer(comm, **sections).run()))[-20:, 0].mean())

    plain = final({"kind": "none"})
    for compression, margin in MARGINS:
        assert final(compression) < plain * (1 + margin), (compression, plain)
