"""DDP from the inside (course checks E24, E25): what is posted when, what buckets are, what misuse meets."""

from typing import Any

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.collectives import Communicator, single
from dtrain.flat import FlatBuffers
from dtrain.mesh import Mesh
from dtrain.modules import Linear, Module
from dtrain.strategies import DistributedDataParallel, NaiveDataParallel
from dtrain.strategy import Strategy, UnusedParametersError
from dtrain.tensor import Tensor


class Chain(Module):
    """Linear layers one after the other; `skip` leaves one out."""

    def __init__(self, layers: int = 6, width: int = 32) -> None:
        self.layers = [Linear(width, width, dtype=np.float64) for _ in range(layers)]
        self.assign_names()

    def forward(self, x: Tensor, skip: int | None = None) -> Tensor:
        """(B, width) -> (B, width)."""
        for i, layer in enumerate(self.layers):
            if i != skip:
                x = F.tanh(layer(x))
        return x


def whole_batch(comm: Communicator) -> Any:
    return np.random.default_rng(5).normal(size=(4 * comm.size, 32))


def mine(comm: Communicator) -> Tensor:
    return Tensor(whole_batch(comm)[4 * comm.rank : 4 * comm.rank + 4])


def prepared(comm: Communicator, strategy: Strategy, seed: int = 1) -> Chain:
    model = Chain()
    strategy.apply(model, Mesh(comm, dp=-1))
    assert strategy.flat is not None
    strategy.flat.initialise(seed, comm)
    return model


def reference(comm: Communicator) -> dict[str, Any]:
    """The gradient of the whole batch in one process."""
    model = Chain()
    FlatBuffers(model.named_parameters(), single()).initialise(1, single())
    (model(Tensor(whole_batch(comm))) ** 2).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters().items()}


def record_posts(strategy: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    post = strategy._post
    monkeypatch.setattr(strategy, "_post", lambda bucket: (log.append(bucket.names[0]), post(bucket)))


@pytest.mark.parametrize("bucket_mb", [1e-6, 0.01, 0.02, 100.0])
def test_gradients_are_those_of_the_whole_batch_on_all_ranks(comm: Communicator, bucket_mb: float) -> None:
    strategy = DistributedDataParallel(bucket_mb)
    model = prepared(comm, strategy)
    for _ in range(3):  # buckets are used again
        for parameter in model.named_parameters().values():
            parameter.zero_grad()
        (model(mine(comm)) ** 2).sum().backward()
        strategy.reduce_gradients(model)
        for name, expected in reference(comm).items():
            gradient = model.named_parameters()[name].grad
            np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14, err_msg=name)
            np.testing.assert_array_equal(gradient, comm.broadcast(gradient), err_msg=name)


@pytest.mark.parametrize("strategy", [NaiveDataParallel, DistributedDataParallel])
def test_all_ranks_start_from_the_parameters_of_rank_0(comm: Communicator, strategy: type[Strategy]) -> None:
    model = Chain()
    for parameter in model.named_parameters().values():
        parameter.data = np.full(parameter.shape, 1.0 + comm.rank)
    chosen = strategy()
    chosen.apply(model, Mesh(comm, dp=-1))
    assert chosen.flat is not None
    chosen.flat.initialise(1, comm)
    for parameter in model.named_parameters().values():
        np.testing.assert_array_equal(parameter.data, 1.0)


def test_buckets_are_posted_last_layer_first_and_before_the_backward_ends(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = DistributedDataParallel(0.005)  # less than one matrix of 32 x 32 float64
    model = prepared(comm, strategy)
    log: list[str] = []
    record_posts(strategy, monkeypatch, log)
    first = model.layers[0].weight
    first.on_gradient(lambda gradient: log.append("the backward reached the first layer"))
    (model(mine(comm)) ** 2).sum().backward()
    matrices = [name for name in log if name.endswith("weight")]
    assert matrices == sorted(matrices, reverse=True) and len(matrices) >= 5
    assert log.index("layers.5.weight") < log.index("the backward reached the first layer")
    strategy.reduce_gradients(model)


def test_no_sync_accumulates_without_communication(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DistributedDataParallel(0.008)
    model = prepared(comm, strategy)
    log: list[str] = []
    record_posts(strategy, monkeypatch, log)
    x = mine(comm)
    with strategy.no_sync():
        (model(x[:1]) ** 2).sum().backward()
        (model(x[1:3]) ** 2).sum().backward()
    assert log == []
    (model(x[3:]) ** 2).sum().backward()
    strategy.reduce_gradients(model)
    assert len(log) == len(strategy.buckets)
    for name, expected in reference(comm).items():
        np.testing.assert_allclose(model.named_parameters()[name].grad, expected, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("strategy", [NaiveDataParallel, DistributedDataParallel])
def test_an_unused_parameter_is_named_on_every_rank_and_nobody_hangs(
    comm: Communicator, strategy: type[Strategy]
) -> None:
    chosen = strategy()
    model = prepared(comm, chosen)
    (model(mine(comm), skip=3) ** 2).sum().backward()
    with pytest.raises(UnusedParametersError, match=r"layers\.3\.weight, layers\.3\.bias"):
        chosen.reduce_gradients(model)


def test_a_second_backward_with_communication_is_refused(comm: Communicator) -> None:
    strategy = DistributedDataParallel(0.008)
    model = prepared(comm, strategy)
    (model(mine(comm)) ** 2).sum().backward()
    with pytest.raises(RuntimeError, match=r"a second gradient of layers\.5.*no_sync"):
        (model(mine(comm)) ** 2).sum().backward()


def test_buckets_tile_the_gradients(comm: Communicator) -> None:
    for bucket_mb in (1e-6, 0.008, 0.03, 100.0):
        strategy = DistributedDataParallel(bucket_mb)
        model = prepared(comm, strategy)
        assert strategy.flat is not None
        (group,) = strategy.flat.groups
        names = [name for bucket in strategy.buckets for name in bucket.names]
        assert sorted(names) == sorted(model.named_parameters())
        assert sum(bucket.gradient.size for bucket in strategy.buckets) == group.size
        group.grad[...] = 0
        for bucket in strategy.buckets:
            bucket.gradient[...] += 1
        np.testing.assert_array_equal(group.grad, 1)
