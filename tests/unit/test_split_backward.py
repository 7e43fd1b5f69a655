"""The backward in two halves: together they are one backward, and the first half gives what others wait for."""

from types import SimpleNamespace

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.autograd import GraphError, split_backward
from dtrain.config import GPTConfig
from dtrain.models.gpt import GPT
from dtrain.modules import Context
from dtrain.parameter import Normal, Parameter
from dtrain.tensor import Tensor


def parameter(shape, seed):
    made = Parameter(shape, Normal(1.0), np.float64)
    made.name = f"p{seed}"
    made.data = made.initial_values(seed)
    return made


def model(recompute=False, **options):
    config = GPTConfig(layers=3, dim=16, heads=2, sequence=8, dropout=0.1, **options)
    gpt = GPT(config, SimpleNamespace(vocabulary=13, features=0), np.float64)
    gpt.materialise(7)
    gpt.recompute = recompute
    return gpt


def batch():
    ids = np.random.default_rng(0).integers(0, 13, (4, 9))
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}, Context(seed=1, step=2, row_ids=np.arange(4))


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"norm": "rms", "mlp": "swiglu", "position": "rotary"}])
@pytest.mark.parametrize("recompute", [False, True])
def test_both_halves_are_one_backward(options, recompute):
    one, two = model(recompute, **options), model(recompute, **options)
    for _ in range(2):  # gradients add up over microbatches
        one.loss(*batch()).backward()
        split_backward([(two.loss(*batch()), np.ones(()))])()
    expected = {name: p.grad for name, p in one.named_parameters().items()}
    for name, p in two.named_parameters().items():
        np.testing.assert_allclose(p.grad, expected[name], rtol=1e-13, atol=1e-15, err_msg=name)


def test_the_first_half_gives_the_input_and_no_product_of_weights():
    x = Tensor(np.random.default_rng(1).normal(size=(5, 3)), requires_grad=True)
    first, second = parameter((4, 3), 1), parameter((2, 4), 2)
    called = []
    first.on_gradient(lambda g: called.append("first"))
    second.on_gradient(lambda g: called.append("second"))
    y = F.linear(F.linear(x, first, None), second, None)
    g = np.random.default_rng(2).normal(size=y.shape)
    weights = split_backward([(y, g)])
    np.testing.assert_allclose(x.grad, g @ second.data @ first.data, rtol=1e-13)
    assert first.grad is None and second.grad is None and called == []
    weights()
    assert called == ["second", "first"]  # in the order of the backward
    np.testing.assert_allclose(second.grad, g.T @ (x.data @ first.data.T), rtol=1e-13)
    np.testing.assert_allclose(first.grad, (g @ second.data).T @ x.data, rtol=1e-13)


def test_callbacks_of_recomputed_blocks_wait_for_the_second_half():
    gpt = model(recompute=True)
    called = []
    for name, p in gpt.named_parameters().items():
        p.on_gradient(lambda g, name=name: called.append(name))
    weights = split_backward([(gpt.loss(*batch()), np.ones(()))])
    early = set(called)
    assert not any("blocks" in name for name in early)
    weights()
    assert sorted(called) == sorted(gpt.named_parameters())  # each once


def test_weights_that_change_between_the_halves_are_noticed():
    x, weight = Tensor(np.ones((2, 3)), requires_grad=True), parameter((4, 3), 1)
    y = F.linear(x, weight, None)
    weights = split_backward([(y, np.ones(y.shape))])
    weight.version += 1
    with pytest.raises(GraphError, match="changed in place"):
        weights()
    with pytest.raises(GraphError, match="a second time"):
        y2 = F.linear(x, weight, None)
        split_backward([(y2, np.ones(y.shape))])()
        y2.backward(np.ones(y.shape))
