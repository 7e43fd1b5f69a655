"""The course's checks A1 to A8 on automatic differentiation (ZOMI, AISystem: AutoDiff, ComputationalGraph)."""

import itertools
import math

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.autograd import GraphError
from dtrain.tensor import Tensor
from dtrain.transforms import grad, jacobian, jacobian_plan, jvp, vjp

POINT = (np.array(2.0), np.array(5.0))


def f(x1, x2):
    return F.log(x1) + x1 * x2 - F.sin(x2)


def test_a1_one_function_three_ways():
    value, gradient = 11.652071455223084, (5.5, 1.7163378145367738)
    y, pullback = vjp(f, POINT)
    assert y.item() == pytest.approx(value, rel=1e-15)
    assert [float(g) for g in pullback(1.0)] == pytest.approx(gradient, rel=1e-15)
    for i, seed in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        y, slope = jvp(f, POINT, tuple([np.array(s) for s in seed]))
        assert (y.item(), slope.item()) == pytest.approx((value, gradient[i]), rel=1e-15)
    h = 1e-6
    numeric = [
        (f(Tensor(2.0 + h), Tensor(5.0)).item() - f(Tensor(2.0 - h), Tensor(5.0)).item()) / (2 * h),
        (f(Tensor(2.0), Tensor(5.0 + h)).item() - f(Tensor(2.0), Tensor(5.0 - h)).item()) / (2 * h),
    ]
    assert numeric == pytest.approx(gradient, rel=1e-8)


def test_a2_the_trace_and_its_adjoints():
    x1, x2 = (Tensor(float(x), requires_grad=True) for x in POINT)
    v1, v2, v3 = F.log(x1), x1 * x2, F.sin(x2)
    v4 = v1 + v2
    v5 = v4 - v3
    assert [round(v.item(), 3) for v in (v1, v2, v3, v4, v5)] == [0.693, 10.0, -0.959, 10.693, 11.652]
    adjoints = {}
    for name, v in (("v1", v1), ("v2", v2), ("v3", v3), ("v4", v4), ("v5", v5)):
        v.on_gradient(lambda g, name=name: adjoints.update({name: float(g)}))
    v5.backward()
    assert adjoints == {"v5": 1, "v4": 1, "v3": -1, "v1": 1, "v2": 1}
    assert next(iter(adjoints)) == "v5"  # newest first


def slope_of_error(difference, steps):
    """The exponent p of error ~ h^p, by least squares in log-log."""
    exact = float(grad(lambda x: F.sin(x) * F.exp(x))(np.array(0.7)))
    errors = [abs(difference(lambda x: math.sin(x) * math.exp(x), 0.7, h) - exact) for h in steps]
    return np.polyfit(np.log(steps), np.log(errors), 1)[0], errors


def ahead(g, x, h):
    return (g(x + h) - g(x)) / h


def behind(g, x, h):
    return (g(x) - g(x - h)) / h


def central(g, x, h):
    return (g(x + h) - g(x - h)) / (2 * h)


def test_a3_the_error_of_differences_falls_and_rises_again():
    assert slope_of_error(ahead, np.logspace(-5, -2, 10))[0] == pytest.approx(1, abs=0.02)
    assert slope_of_error(behind, np.logspace(-5, -2, 10))[0] == pytest.approx(1, abs=0.02)
    assert slope_of_error(central, np.logspace(-3, -1, 10))[0] == pytest.approx(2, abs=0.02)
    for difference in (ahead, behind, central):  # U-shape: round-off turns the curve up, the best h lies inside
        errors = slope_of_error(difference, np.logspace(-15, -1, 29))[1]
        assert 5 < int(np.argmin(errors)) < 25
        assert min(errors[:4]) > 100 * min(errors) < errors[-1]


def test_a4_passes_of_both_modes():
    n, m = 3, 7
    matrix = np.random.default_rng(0).standard_normal((m, n))
    g = lambda x: F.tanh(Tensor(matrix) @ x)  # noqa: E731
    x = np.array([0.1, -0.4, 0.9])
    np.testing.assert_allclose(jacobian(g, x, "forward"), jacobian(g, x, "reverse"), rtol=1e-14)
    assert jacobian_plan(g, x, "forward").passes == n and jacobian_plan(g, x, "reverse").passes == m
    assert jacobian_plan(g, x, "auto") == ("forward", n, n, m)
    random = np.random.default_rng(1)
    v, r = random.standard_normal(m), random.standard_normal(n)
    assert v @ jvp(g, x, r)[1].data == pytest.approx(vjp(g, x)[1](v) @ r, rel=1e-13)


def test_a5_sum_over_paths_and_a_freed_graph():
    x = Tensor(3.0, requires_grad=True)
    loss = (x + 1 - 2 * x) ** 2
    loss.backward()
    assert (loss.item(), float(x.grad)) == (4, 4)
    with pytest.raises(GraphError, match="retain_graph"):
        loss.backward()


# A6: a symbolic differentiator of ten lines, to see expressions swell. An expression is a number, "x" or (op, a, b).


def derivative(e):
    if not isinstance(e, tuple):
        return 1.0 if e == "x" else 0.0
    op, a, b = e
    da, db = derivative(a), derivative(b)
    return ("+", ("*", da, b), ("*", a, db)) if op == "*" else (op, da, db)


def evaluate(e, x):
    if not isinstance(e, tuple):
        return x if e == "x" else e
    a, b = evaluate(e[1], x), evaluate(e[2], x)
    return {"+": a + b, "-": a - b, "*": a * b}[e[0]]


def count(e):
    return 1 + count(e[1]) + count(e[2]) if isinstance(e, tuple) else 1


def test_a6_symbolic_expressions_swell_where_the_tape_grows_by_a_constant():
    x, symbols, tape = 0.2, [], []
    for n in range(1, 6):
        expression, leaf = "x", Tensor(x, requires_grad=True)
        value = leaf
        for _ in range(n - 1):  # l_{n+1} = 4 l_n (1 - l_n)
            expression = ("*", ("*", 4.0, expression), ("-", 1.0, expression))
            value = 4 * value * (1 - value)
        if n > 1:
            value.backward()
            assert float(leaf.grad) == pytest.approx(evaluate(derivative(expression), x), rel=1e-12)
        symbols.append(count(derivative(expression)))
        tape.append(3 * (n - 1))
    # the closed form of the course: l4 = 64 x (1 - x) (1 - 2x)^2 (1 - 8x + 8x^2)^2
    l4 = lambda t: 64 * t * (1 - t) * (1 - 2 * t) ** 2 * (1 - 8 * t + 8 * t * t) ** 2  # noqa: E731
    chain = lambda t, n: t if n == 1 else chain(4 * t * (1 - t), n - 1)  # noqa: E731
    assert chain(x, 4) == pytest.approx(l4(x), rel=1e-13)
    assert float(grad(lambda t: chain(t, 4))(np.array(x))) == pytest.approx(float(grad(l4)(np.array(x))), rel=1e-12)
    growth = [b / a for a, b in itertools.pairwise(symbols[1:])]
    assert min(growth) > 2  # more than doubles with every iteration
    assert np.diff(tape).tolist() == [3, 3, 3, 3] and count_nodes(lambda t: chain(t, 5), x) == tape[-1]


def count_nodes(function, x):
    seen, stack = set(), [function(Tensor(x, requires_grad=True)).node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [source for source in node.inputs if not isinstance(source, Tensor)]
    return len(seen)


def test_a7_limits_of_float16():
    """What loss scaling is for: below 5.96e-8 a gradient is lost, above 65504 it is infinite."""
    assert float(np.finfo(np.float16).smallest_subnormal) == pytest.approx(5.96e-8, rel=1e-3)
    assert float(np.finfo(np.float16).max) == 65504
    x = Tensor(np.ones(1, np.float16), requires_grad=True)
    (x.astype(np.float32) * 2e-8).sum().backward()
    assert x.grad[0] == 0  # lost
    x.zero_grad()
    (x.astype(np.float32) * 2e-8).sum().backward(np.float32(2.0**10))
    assert float(x.grad[0]) / 2**10 == pytest.approx(2e-8, rel=1e-2)  # saved by scaling the loss
    x.zero_grad()
    with np.errstate(over="ignore"):
        (x.astype(np.float32) * 2e-8).sum().backward(np.float32(2.0**42))
    assert np.isinf(x.grad[0])


def loss_of(x, weights, targets, recompute=False):
    for w in weights:
        layer = lambda t, w=w: t + F.gelu(F.linear(F.layer_norm(t, None, None), w))  # noqa: E731
        x = F.checkpoint(layer, x) if recompute else layer(x)
    return F.cross_entropy(x, targets, reduction="sum")


def test_a8_accumulation_is_one_larger_batch_and_recomputation_changes_nothing():
    random = np.random.default_rng(0)
    x, targets = random.standard_normal((12, 6)), random.integers(0, 6, 12)
    gradients = []
    for parts, recompute in ((1, False), (4, False), (1, True), (4, True)):
        weights = [Tensor(np.random.default_rng(i).standard_normal((6, 6)), requires_grad=True) for i in range(3)]
        for some, labels in zip(np.split(x, parts), np.split(targets, parts), strict=True):
            loss_of(Tensor(some), weights, labels, recompute).backward()
        gradients.append([w.grad for w in weights])
    whole, accumulated, recomputed, both = gradients
    for a, b, c, d in zip(whole, accumulated, recomputed, both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)
        np.testing.assert_array_equal(a, c)  # bit for bit
        np.testing.assert_array_equal(b, d)
