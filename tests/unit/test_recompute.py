"""Recomputation: the bits of the plain graph, less memory, and what it refuses."""

import tracemalloc

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.autograd import GraphError, no_grad, tracing
from dtrain.tensor import Tensor


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng([seed, *shape]).standard_normal(shape), requires_grad=True)


def network(count, checkpointed, width=32):
    weights = [leaf(width, width, seed=i) for i in range(count)]
    shared = leaf(width, width, seed=99)

    def block(x, w):
        h = F.gelu(F.linear(F.layer_norm(x, None, None), w))
        return F.bias_residual(F.linear(h, shared), None, x)

    def run(x):
        for w in weights:
            x = F.checkpoint(lambda t, w=w: block(t, w), x) if checkpointed else block(x, w)
        return (F.linear(x, shared) ** 2).sum()

    return run, [*weights, shared]


@pytest.mark.parametrize("buffered", [True, False])
def test_recomputed_gradients_are_the_same_bits(buffered):
    results = []
    for checkpointed in (False, True):
        run, parameters = network(4, checkpointed)
        for p in parameters if buffered else ():
            p.buffer = np.empty_like(p.data)
        calls = []
        for i, p in enumerate(parameters):
            p.on_gradient(lambda g, i=i, calls=calls: calls.append((i, g.copy())))
        x = leaf(8, 32)
        loss = run(x)
        loss.backward()
        assert len(calls) == len(parameters)
        for i, g in calls:  # complete when they were called
            np.testing.assert_array_equal(g, parameters[i].grad)
        results.append([loss.data, x.grad, *[p.grad for p in parameters]])
    for plain, recomputed in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, recomputed)


def test_recomputation_lowers_the_peak():
    peaks = []
    for checkpointed in (False, True):
        run, _ = network(8, checkpointed)
        x = leaf(2048, 32)
        tracemalloc.start()
        run(x).backward()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.6 * peaks[0]


def test_nested_recomputation():
    def results(wrap):
        run, parameters = network(2, wrap)
        x = leaf(4, 32)
        segment = (lambda t: F.checkpoint(run, t)) if wrap else run
        (F.checkpoint(segment, x * 1) if wrap else segment(x * 1)).backward()
        return [x.grad, *[p.grad for p in parameters]]

    for plain, nested in zip(results(False), results(True), strict=True):
        np.testing.assert_array_equal(plain, nested)


def test_recomputation_redraws_the_same_dropout():
    x, rows = leaf(16, 8), np.arange(16)
    a = F.dropout(x * 1, 0.5, 5, rows).tanh().sum()
    b = F.checkpoint(lambda t: F.dropout(t, 0.5, 5, rows).tanh(), x * 1).sum()
    a.backward()
    first, x.grad = x.grad, None
    b.backward()
    np.testing.assert_array_equal(first, x.grad)


def test_recomputation_refuses_tensors_from_outside():
    x = leaf(3)
    outside = x * 2
    with pytest.raises(GraphError, match=r"result of scale.*pass it as an input"):
        F.checkpoint(lambda t: t * outside, x)
    F.checkpoint(lambda t, o: t * o, x, outside).sum().backward()
    np.testing.assert_allclose(x.grad, 4 * x.data)
    with pytest.raises(TypeError, match="tuple"):
        F.checkpoint(lambda t: (t, t), x)


def test_recomputation_notices_a_changed_input():
    x = leaf(3)
    y = F.checkpoint(lambda t: t.exp(), x).sum()
    with no_grad():
        x *= 2
    with pytest.raises(GraphError, match=r"checkpoint\(\[3\]\).*changed in place"):
        y.backward()


def test_recomputation_of_what_needs_no_gradient_leaves_no_node():
    assert F.checkpoint(lambda t: t * 2, Tensor(np.ones(3))).node is None
    x = leaf(3)
    with no_grad():
        assert F.checkpoint(lambda t: t * x, x).node is None
    with tracing():
        assert F.checkpoint(lambda t: t.exp(), x).node.op.name == "exp"  # its inside is to be seen
