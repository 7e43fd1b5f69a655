"""This layout = one process: data parallelism of any number of ranks against the reference without strategies."""

from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator
from dtrain.launch.environment import job
from tests import training

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "model": {
            "kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "sequence": 16, "norm": "rms",
            "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False, "hidden": 64,
        }
    },
    "dropout": {"model": {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 16, "dropout": 0.2}},
    "bert": {"model": {"kind": "bert", "layers": 2, "dim": 32, "heads": 4, "sequence": 16}},
    "recompute": {"train": {"recompute": True}},
    "lamb": {"optimizer": {"kind": "lamb", "learning_rate": 3e-3, "clip_norm": 1.0}},
    "adafactor": {"optimizer": {"kind": "adafactor", "learning_rate": 3e-3}},
    "sgd": {"optimizer": {"kind": "sgd", "learning_rate": 0.1}},
}  # fmt: skip


def micro_batch(comm: Communicator, portions: int) -> int:
    """So that a rank's share of 24 samples is `portions` microbatches (as far as it divides)."""
    share = 24 // comm.size
    return max(share // portions, 1)


def fits(comm: Communicator) -> None:
    if 24 % comm.size:
        pytest.skip(f"24 samples do not divide over {comm.size} ranks")


def train(comm: Communicator, steps: int, data_parallel: str = "ddp", portions: int = 2, **sections: Any) -> Any:
    sections["train"] = {**sections.get("train", {}), "steps": steps, "micro_batch": micro_batch(comm, portions)}
    sections["parallel"] = {"data_parallel": data_parallel, "bucket_mb": 0.05}
    trainer = training.trainer(comm, **sections)
    records = list(trainer.run())
    return trainer, training.losses(records), [r.validation_loss for r in records if r.validation_loss is not None]


def alone(comm: Communicator, steps: int, **sections: Any) -> training.Alone:
    sections["train"] = {**sections.get("train", {}), "steps": steps, "micro_batch": 12}
    return training.alone(comm, **sections)


# Every model on every number of ranks, every strategy there too, and every model with every strategy on two of them.
PAIRS = [(name, ("naive", "ddp")[(number + (job().size in (3, 4))) % 2]) for number, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "data_parallel"), PAIRS)
def test_n_ranks_equal_one_process(comm: Communicator, name: str, data_parallel: str) -> None:
    fits(comm)
    mine, losses, validation = train(comm, 5, data_parallel, **MODELS[name])
    reference = alone(comm, 5, **MODELS[name])
    np.testing.assert_allclose(losses, reference.losses, rtol=1e-10)
    np.testing.assert_allclose(validation, reference.validation, rtol=1e-10)
    for name, parameter in reference.parameters.items():
        np.testing.assert_allclose(training.parameters(mine)[name], parameter, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance", "sizes"), [("float64", 1e-10, (1, 4)), ("float32", 1e-4, (1, 2))])
def test_fifty_steps_of_all_ranks_agree_with_one(
    comm: Communicator, dtype: str, tolerance: float, sizes: tuple[int, ...]
) -> None:
    if comm.size not in sizes:
        pytest.skip(f"fifty steps in {dtype} on {sizes[-1]} ranks; five on any number")
    _, losses, _ = train(comm, 50, train={"dtype": dtype})
    expected = alone(comm, 50, train={"dtype": dtype}).losses
    np.testing.assert_allclose(losses[:, 0], expected[:, 0], rtol=tolerance)
    assert expected[-1, 0] < expected[0, 0] - 1, "the test is void if the model does not learn"


def test_gradient_accumulation_equals_one_large_microbatch(comm: Communicator) -> None:
    fits(comm)
    _, whole, _ = train(comm, 5, portions=1)
    _, portions, _ = train(comm, 5, portions=3)
    np.testing.assert_allclose(portions, whole, rtol=1e-10)


def test_gradients_and_parameters_are_the_same_bits_on_all_ranks(comm: Communicator) -> None:
    fits(comm)
    mine, _, _ = train(comm, 3, train={"dtype": "float32"})
    for name, parameter in training.parameters(mine).items():
        bits = parameter.view(np.uint32).astype(np.int64)
        np.testing.assert_array_equal(comm.all_reduce(bits, "max"), comm.all_reduce(bits, "min"), err_msg=name)


def test_the_same_run_twice_is_the_same_bits(comm: Communicator) -> None:
    fits(comm)
    _, first, _ = train(comm, 5, train={"dtype": "float32"})
    _, second, _ = train(comm, 5, train={"dtype": "float32"})
    np.testing.assert_array_equal(first, second)
