"""vjp, jvp, grad, jacobian, hvp: against each other, central differences and closed forms."""

import tracemalloc

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.autograd import GraphError
from dtrain.gradcheck import gradcheck
from dtrain.op import Op
from dtrain.tensor import OpError, Tensor, apply
from dtrain.transforms import grad, hvp, jacobian, jacobian_plan, jvp, vjp


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def little_gpt(x, qkv, out, up, down, gain, bias, head, targets):
    """Everything a block has: norm, packed attention with rotary, residual, GELU, tied sizes, cross-entropy."""
    angles = np.outer(np.arange(x.shape[1]), [1.0])
    h = F.layer_norm(x, gain, bias)
    h = F.packed_attention(F.linear(h, qkv), 2, 1, rotary=(np.cos(angles), np.sin(angles)))
    x = F.bias_residual(F.linear(h, out), bias, x)
    h = F.linear(F.gelu(F.linear(F.rms_norm(x, gain), up), approximate=True), down)
    return F.cross_entropy(F.linear(x + F.silu(h), head), targets)


WEIGHTS = [numbers(8, 4), numbers(4, 4), numbers(6, 4), numbers(4, 6), numbers(4), numbers(4), numbers(5, 4)]
X, TARGETS = numbers(2, 3, 4), np.array([[0, 4, -1], [2, 2, 1]])


def gpt(*arrays):
    return little_gpt(*arrays, TARGETS)


def test_forward_and_reverse_over_a_gpt_agree():
    arrays = (X, *WEIGHTS)
    r = tuple([numbers(*a.shape, seed=1) for a in arrays])
    y, tangent = jvp(gpt, arrays, r)
    y2, pullback = vjp(gpt, arrays)
    assert y.item() == y2.item()
    assert tangent.item() == pytest.approx(
        sum([(a * b).sum() for a, b in zip(pullback(1.0), r, strict=True)]), rel=1e-12
    )


def test_hessian_vector_products_through_a_gpt():
    gradcheck(gpt, (X, *WEIGHTS), second_order=True, rtol=1e-4, atol=1e-6)
    arrays = (X, *WEIGHTS)
    v, w = ([numbers(*a.shape, seed=s) for a in arrays] for s in (1, 2))
    hv, hw = hvp(gpt, arrays, tuple(v)), hvp(gpt, arrays, tuple(w))
    # a Hessian is symmetric
    left = sum([(a * b).sum() for a, b in zip(hv, w, strict=True)])
    assert left == pytest.approx(sum([(a * b).sum() for a, b in zip(hw, v, strict=True)]), rel=1e-9)
    # and the derivative of the gradient
    h = 1e-5
    ahead = grad(gpt)(*[a + h * d for a, d in zip(arrays, v, strict=True)])
    behind = grad(gpt)(*[a - h * d for a, d in zip(arrays, v, strict=True)])
    for ours, plus, minus in zip(hv, ahead, behind, strict=True):
        np.testing.assert_allclose(ours, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-7)


def test_hvp_of_a_quadratic_form_is_its_matrix():
    a = numbers(4, 4)
    v = numbers(4, seed=3)
    ours = hvp(lambda x: x @ a @ x, numbers(4), v)
    np.testing.assert_allclose(ours, (a + a.T) @ v, rtol=1e-13)
    np.testing.assert_array_equal(hvp(lambda x: x.sum(), numbers(3), np.ones(3)), 0)


@pytest.mark.parametrize(("inputs", "outputs", "chosen"), [(3, 5, "forward"), (5, 3, "reverse"), (4, 4, "reverse")])
def test_jacobian_modes_agree_and_count_their_passes(inputs, outputs, chosen):
    matrix, calls = numbers(outputs, inputs), []

    def f(x):
        calls.append(x.tangent is not None)
        return (Tensor(matrix) @ x).sin()

    x = numbers(inputs, seed=2)
    expected = np.cos(matrix @ x)[:, None] * matrix
    for mode in ("forward", "reverse", "auto"):
        np.testing.assert_allclose(jacobian(f, x, mode=mode), expected, rtol=1e-13)
    plan = jacobian_plan(f, x)
    assert (plan.mode, plan.passes) == (chosen, min(inputs, outputs))
    assert jacobian_plan(f, x, "forward").passes == inputs and jacobian_plan(f, x, "reverse").passes == outputs
    calls.clear()
    jacobian(f, x, mode="forward")
    assert sum(calls) == inputs  # one run with a tangent per input


def test_jacobian_in_reverse_mode_walks_once_per_output():
    walks = []
    spy = Op("spy", lambda a: (a * a, a), lambda node, g: (walks.append(1), (2 * g * node.saved,))[1])
    np.testing.assert_allclose(jacobian(lambda x: apply(spy, x), np.array([1.0, 3.0])), np.diag([2.0, 6.0]))
    assert len(walks) == 2


def test_jacobian_of_several_inputs_and_shapes():
    a, b = numbers(2, 3), numbers(3)
    for mode in ("forward", "reverse"):
        ja, jb = jacobian(lambda x, y: x * y, (a, b), mode=mode)
        assert ja.shape == (2, 3, 2, 3) and jb.shape == (2, 3, 3)
        np.testing.assert_allclose(np.einsum("ijij->ij", ja), np.broadcast_to(b, (2, 3)))
        np.testing.assert_allclose(np.einsum("ijj->ij", jb), a)
        assert jacobian(lambda x: x * 2, numbers(0), mode=mode).shape == (0, 0)
    with pytest.raises(ValueError, match="sideways"):
        jacobian(lambda x: x, a, mode="sideways")


def test_jvp_keeps_no_tape():
    nodes = []
    spy = Op("spy", lambda a: (a * 1, None), lambda node, g: (g,), lambda i, t, o: nodes.append(o.node) or t[0] * 1)
    weight = Tensor(numbers(3), requires_grad=True)
    y, tangent = jvp(lambda x: apply(spy, x * weight), numbers(3), np.ones(3))
    assert nodes == [None] and y.node is None and tangent.node is None
    assert not y.requires_grad and y.tangent is None
    np.testing.assert_array_equal(tangent.data, weight.data)

    def deep(x):
        for _ in range(50):
            x = x.tanh()
        return x

    x = numbers(20_000)
    tracemalloc.start()
    jvp(deep, x, np.ones_like(x))
    assert tracemalloc.get_traced_memory()[1] < 12 * x.nbytes  # and not 50 times x
    tracemalloc.stop()


def test_parameters_keep_their_gradients_and_callbacks_stay_silent():
    w = Tensor(numbers(3), requires_grad=True)
    w.on_gradient(lambda g: pytest.fail("called"))
    w.buffer = np.full(3, 7.0)
    for f in (lambda x: (x * w).sum(), lambda x: F.checkpoint(lambda t: (t * w).exp(), x).sum()):
        grad(f)(numbers(3))
        hvp(f, numbers(3), np.ones(3))
    assert w.grad is None
    np.testing.assert_array_equal(w.buffer, 7)


def test_what_writes_in_place_leaves_parameters_and_outer_graphs_alone():
    """Weight gradients go straight into buffers and onto gradients in a backward, but not here."""
    w = Tensor(numbers(3, 3), requires_grad=True)
    w.buffer = np.full((3, 3), 7.0)
    outside = w * 2

    def f(x):
        return (F.linear(x, w) * F.embedding(w, np.array([0, 0])) * outside[1]).sum()

    x = numbers(2, 3)
    for state in (None, np.full((3, 3), 5.0)):
        w.grad = state
        grad(f)(x)
        hvp(lambda t: f(t * t), x, x)
        assert w.grad is state and (state is None or (state == 5).all())
        np.testing.assert_array_equal(w.buffer, 7)
    w.zero_grad()
    outside.sum().backward()  # its graph was not freed
    np.testing.assert_array_equal(w.grad, 2)


def test_a_checkpoint_inside_is_differentiated():
    x = numbers(3)
    f = lambda t: F.checkpoint(lambda s: F.checkpoint(lambda r: r.exp(), s) * s, t).sum()  # noqa: E731
    np.testing.assert_allclose(grad(f)(x), np.exp(x) * (1 + x))
    np.testing.assert_allclose(hvp(f, x, np.ones(3)), np.exp(x) * (2 + x))
    np.testing.assert_allclose(jvp(f, x, np.ones(3))[1].item(), (np.exp(x) * (1 + x)).sum())


def test_a_pullback_may_be_called_again():
    y, pullback = vjp(lambda x: x * x, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(y.data, [1, 4])
    np.testing.assert_array_equal(pullback(np.array([1.0, 0.0])), [2, 0])
    np.testing.assert_array_equal(pullback(np.array([0.0, 1.0])), [0, 4])
    with pytest.raises(GraphError, match=r"\(2,\).*\(3,\)"):
        pullback(np.ones(3))


def test_reverse_over_forward_by_hand():
    x = Tensor(np.array([0.3, 0.7]), requires_grad=True)
    _, slope = jvp(lambda t: (t**3).sum(), x, np.array([1.0, 0.0]))
    slope.backward()
    np.testing.assert_allclose(x.grad, [6 * 0.3, 0])


def test_what_cannot_be_nested_is_refused_and_not_silently_zero():
    x, one = numbers(2), np.ones(2)
    with pytest.raises(GraphError, match="hvp"):
        jvp(lambda t: jvp(lambda s: s * s, t, one)[1], x, one)
    with pytest.raises(GraphError, match="hvp"):
        jvp(lambda t: Tensor(grad(lambda s: (s * s).sum())(t)), x, one)
    with pytest.raises(GraphError, match="hvp"):
        grad(lambda t: Tensor(grad(lambda s: (s * s).sum())(t)).sum())(x)
    jvp(lambda t: t * t, x, one)  # the refusals left no mode behind


def test_functions_of_the_wrong_kind():
    with pytest.raises(GraphError, match=r"one output element.*\(2,\).*jacobian"):
        grad(lambda t: t * 2)(numbers(2))
    with pytest.raises(GraphError, match="one Tensor, not tuple"):
        vjp(lambda t: (t, t), numbers(2))
    with pytest.raises(GraphError, match=r"\(2,\).*\(3,\)"):
        jvp(lambda t: t, numbers(2), numbers(3))
    with pytest.raises(GraphError, match="2 inputs, got 1"):
        jvp(lambda s, t: s, (numbers(2), numbers(2)), numbers(2))
    no_jvp = Op("lame", lambda a: (a * 1, None), lambda node, g: (g,))
    with pytest.raises(OpError, match="lame has no jvp"):
        jvp(lambda t: apply(no_jvp, t), numbers(2), numbers(2))


def test_functions_that_do_not_depend_on_x():
    constant = Tensor(np.ones(2))
    np.testing.assert_array_equal(jvp(lambda t: constant * 2, numbers(3), numbers(3))[1].data, 0)
    np.testing.assert_array_equal(grad(lambda t: constant.sum())(numbers(3)), np.zeros(3))
    np.testing.assert_array_equal(grad(lambda t: t.sum())(numbers(3)), np.ones(3))
