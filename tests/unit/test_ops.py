"""Every row of the table of ops: derivatives against central differences, values against NumPy and SciPy."""

import ml_dtypes
import numpy as np
import pytest
import scipy.special

import dtrain.functional as F
from dtrain.gradcheck import GradcheckError, gradcheck
from dtrain.op import Op
from dtrain.ops import OPS
from dtrain.ops.attention import composed
from dtrain.tensor import OpError, Tensor, apply
from dtrain.transforms import jvp, vjp
from tests.op_cases import CASES, IDS, TARGETS, TURN, numbers

ROWS = [(name, *case) for name, cases in CASES.items() for case in cases]
IDENTITY = [f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))]


def test_the_table_of_cases_covers_the_table_of_ops():
    assert CASES.keys() == OPS.keys()
    assert [name for name, op in OPS.items() if op.name != name] == []


@pytest.mark.parametrize(("name", "function", "arrays"), [(n, f, tuple(a)) for n, f, *a in ROWS], ids=IDENTITY)
class TestRow:
    def test_uses_its_op(self, name, function, arrays):
        seen, stack = set(), [function(*[Tensor(a, requires_grad=True) for a in arrays]).node]
        while stack:
            node = stack.pop()
            seen.add(node.op.name)
            stack += [source for source in node.inputs if not isinstance(source, Tensor)]
        assert name in seen

    def test_derivatives(self, name, function, arrays):
        gradcheck(function, arrays, second_order=True, rtol=1e-5, atol=2e-7)

    def test_forward_and_reverse_agree(self, name, function, arrays):
        """v^T (J r) by the jvp equals (v^T J) r by the vjp (course check A4)."""
        random = np.random.default_rng(3)
        r = tuple([random.standard_normal(a.shape) for a in arrays])
        y, pullback = vjp(function, arrays)
        v = random.standard_normal(y.shape)
        left = (v * jvp(function, arrays, r)[1].data).sum()
        right = sum([(a * b).sum() for a, b in zip(pullback(v), r, strict=True)])
        assert left == pytest.approx(right, rel=1e-10, abs=1e-12)

    def test_float32_stays_float32_and_is_close(self, name, function, arrays):
        narrow = [a.astype(np.float32) for a in arrays]
        leaves = [Tensor(a, requires_grad=True) for a in narrow]
        y = function(*leaves)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y.data, function(*[Tensor(a) for a in arrays]).data, rtol=2e-4, atol=2e-5)
        y.backward(np.ones_like(y.data))
        assert all(leaf.grad is None or leaf.grad.dtype == np.float32 for leaf in leaves)
        assert jvp(function, tuple(narrow), tuple(narrow))[1].dtype == np.float32


VALUES = {
    "exp": (lambda x: x.exp(), np.exp),
    "tanh": (lambda x: x.tanh(), np.tanh),
    "sigmoid": (lambda x: x.sigmoid(), scipy.special.expit),
    "erf": (lambda x: x.erf(), scipy.special.erf),
    "softmax": (lambda x: F.softmax(x), lambda x: scipy.special.softmax(x, axis=-1)),
    "log_softmax": (lambda x: F.log_softmax(x, dim=0), lambda x: scipy.special.log_softmax(x, axis=0)),
    "logsumexp": (lambda x: F.logsumexp(x), lambda x: scipy.special.logsumexp(x, axis=-1)),
    "gelu": (lambda x: F.gelu(x), lambda x: x * scipy.special.ndtr(x)),
    "silu": (lambda x: F.silu(x), lambda x: x * scipy.special.expit(x)),
    "sum": (lambda x: x.sum(dim=(0, 1)), lambda x: x.sum(axis=(0, 1))),
    "mean": (lambda x: x.mean(dim=0, keepdims=True), lambda x: x.mean(axis=0, keepdims=True)),
    "max": (lambda x: x.max(dim=0), lambda x: x.max(axis=0)),
    "min": (lambda x: x.min(dim=(0, 1), keepdims=True), lambda x: x.min(axis=(0, 1), keepdims=True)),
    "gather": (
        lambda x: F.gather(x, IDS[:1], dim=1),
        lambda x: np.take_along_axis(x, IDS[:1], axis=1),
    ),
    "layer_norm": (
        lambda x: F.layer_norm(x, None, None, 0.0),
        lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
    ),
    "rms_norm": (lambda x: F.rms_norm(x, None, 0.0), lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True))),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_numpy_and_scipy(name):
    ours, oracle = VALUES[name]
    x = 3 * numbers(5, 7)
    np.testing.assert_allclose(ours(Tensor(x)).data, oracle(x), rtol=1e-12, atol=1e-15)


def test_erf_near_zero_keeps_relative_precision():
    x = np.array([1e-300, 1e-9, 0.01, 0.1, 0.2499999, 0.25, 0.3, -0.3, 5.0, 40.0, -40.0])
    np.testing.assert_allclose(Tensor(x).erf().data, scipy.special.erf(x), rtol=2e-14)


def test_huge_logits_do_not_overflow():
    x = np.array([[1e4, -1e4, 9999.0], [-1e4, -1e4, -1e4]])
    targets = np.array([2, 0])
    loss = F.cross_entropy(Tensor(x, requires_grad=True), targets, reduction="none")
    np.testing.assert_allclose(loss.data, scipy.special.logsumexp(x, axis=-1) - x[[0, 1], targets], rtol=1e-12)
    np.testing.assert_allclose(F.logsumexp(Tensor(x)).data, scipy.special.logsumexp(x, axis=-1), rtol=1e-15)
    leaf = Tensor(x, requires_grad=True)
    F.cross_entropy(leaf, targets, reduction="sum").backward()
    assert np.isfinite(leaf.grad).all()
    np.testing.assert_allclose(leaf.grad.sum(axis=1), 0, atol=1e-11)


def test_ignored_targets_have_no_loss_and_no_gradient():
    x = Tensor(numbers(2, 3, 5), requires_grad=True)
    loss = F.cross_entropy(x, TARGETS)
    loss.backward()
    kept = TARGETS != -1
    rows, labels = x.data[kept], TARGETS[kept]
    expected = (scipy.special.logsumexp(rows, axis=1) - rows[np.arange(len(rows)), labels]).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert not x.grad[~kept].any() and x.grad[kept].all()
    assert F.cross_entropy(x, np.full((2, 3), -1)).item() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_its_composition(causal, heads, groups):
    q, k, v = numbers(2, 5, heads, 6), numbers(2, 7, groups, 6), numbers(2, 7, groups, 6, seed=1)
    leaves = [[Tensor(a, requires_grad=True) for a in (q, k, v)] for _ in range(2)]
    fused = F.attention(*leaves[0], causal=causal, scale=0.4)
    plain = composed(*leaves[1], causal, 0.4)[0]
    np.testing.assert_allclose(fused.data, plain.data, atol=1e-13)
    g = numbers(*fused.shape, seed=5)
    fused.backward(g)
    plain.backward(g)
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours.grad, theirs.grad, atol=1e-13)


def test_packed_attention_equals_attention_of_its_parts():
    heads, groups, width = 4, 2, 6
    qkv = numbers(2, 3, (heads + 2 * groups) * width)
    angles = np.outer(np.arange(3), [1.0, 0.3, 0.1])
    cos, sin = np.cos(angles), np.sin(angles)
    packed, parts = Tensor(qkv, requires_grad=True), Tensor(qkv, requires_grad=True)
    q, k, v = [
        parts[..., a * width : b * width].reshape(2, 3, b - a, width)
        for a, b in ((0, heads), (heads, heads + groups), (heads + groups, heads + 2 * groups))
    ]
    expected = F.attention(F.rotary(q, cos, sin), F.rotary(k, cos, sin), v).reshape(2, 3, -1)
    ours = F.packed_attention(packed, heads, groups, rotary=(cos, sin))
    np.testing.assert_allclose(ours.data, expected.data, atol=1e-14)
    g = numbers(*ours.shape, seed=5)
    ours.backward(g)
    expected.backward(g)
    np.testing.assert_allclose(packed.grad, parts.grad, atol=1e-14)


def test_dropout_depends_on_the_row_id_and_not_on_the_place():
    x = Tensor(np.ones((6, 8)))
    whole = F.dropout(x, 0.5, 3, np.arange(6)).data
    part = F.dropout(x[2:4], 0.5, 3, np.array([2, 3])).data
    np.testing.assert_array_equal(whole[2:4], part)
    assert set(np.unique(whole)) == {0.0, 2.0}
    assert F.dropout(x, 0.0, 3, np.arange(6)) is x


HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_stays_half_and_is_near_float64(dtype):
    """A small network of most kinds of ops: values and gradients within the rounding of the dtype."""

    def network(x, w, gain, table):
        h = F.layer_norm(x, gain, None) @ w.T + x.mean(dim=-1, keepdims=True)
        h = F.bias_residual(F.gelu(h), gain, x * 0.5) / 1.5 - F.softmax(x) * 2
        h = F.linear(h, w, gain).exp().sqrt() + F.embedding(table, IDS)
        h = F.concat([h[:, :2], h[:, 2:]], dim=1) + (h * h).sum(dim=0) / 8
        return F.cross_entropy(h, TARGETS, reduction="sum")

    arrays = [(numbers(2, 3, 6) / 2).astype(dtype), (numbers(6, 6) / 4).astype(dtype)]
    arrays += [numbers(6, low=0.5).astype(dtype), numbers(4, 6).astype(dtype)]
    half = [Tensor(a, requires_grad=True) for a in arrays]
    wide = [Tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    loss, exact = network(*half), network(*wide)
    assert loss.dtype == np.float32  # losses are accumulated in float32
    tolerance = 32 * float(ml_dtypes.finfo(dtype).eps)
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    loss.backward()
    exact.backward()
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.grad.dtype == dtype
        scale = np.abs(theirs.grad).max()
        np.testing.assert_allclose(ours.grad.astype(np.float64) / scale, theirs.grad / scale, atol=tolerance)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_long_half_precision_sum_does_not_stall(dtype):
    """Added up in the dtype itself, ones stop at 2048 (float16) or 256 (bfloat16)."""
    tall, row = Tensor(np.ones((4096, 2), dtype)), Tensor(np.ones(2, dtype), requires_grad=True)
    np.testing.assert_array_equal(tall.sum(dim=0).data.astype(float), 4096)
    np.testing.assert_array_equal(tall.mean(dim=0).data.astype(float), 1)
    np.testing.assert_array_equal((tall.T @ tall).data.astype(float), 4096)
    (tall * row).backward(np.ones((4096, 2), dtype))
    np.testing.assert_array_equal(row.grad.astype(float), 4096)


MISTAKES = [
    (lambda: Tensor(numbers(2, 3)) + Tensor(numbers(2, 4)), ["add", "float64[2, 3]", "float64[2, 4]"]),
    (lambda: Tensor(numbers(2, 3)) @ Tensor(numbers(2, 4)), ["matmul", "[2, 3]", "[2, 4]"]),
    (lambda: Tensor(numbers(2)) * Tensor(np.ones(2, np.float32)), ["mul", "float64[2]", "float32[2]", "astype"]),
    (lambda: Tensor(numbers(2, 3)).reshape(4, 2), ["reshape", "[2, 3]", "(4, 2)"]),
    (lambda: Tensor(numbers(2, 3)).sum(dim=5), ["sum", "[2, 3]", "dim=5"]),
    (lambda: Tensor(numbers(2, 3)).permute(0, 0), ["permute", "[2, 3]"]),
    (lambda: Tensor(numbers(2, 3))[7], ["index", "[2, 3]", "7"]),
    (lambda: Tensor(numbers(2, 0)).mean(), ["mean", "no elements"]),
    (lambda: F.concat([Tensor(numbers(2, 3)), Tensor(numbers(3, 2))]), ["concat", "[2, 3]", "[3, 2]"]),
    (lambda: F.linear(Tensor(numbers(2, 6)), Tensor(numbers(4, 3))), ["linear", "[2, 6]", "[4, 3]"]),
    (lambda: F.linear(Tensor(numbers(2, 3)), Tensor(numbers(4, 3)), Tensor(numbers(3))), ["linear", "bias", "[3]"]),
    (lambda: F.embedding(Tensor(numbers(4, 2)), np.array([1, 9])), ["embedding", "9", "vocabulary of 4"]),
    (lambda: F.embedding(Tensor(numbers(4, 2)), np.array([-1, 2])), ["embedding", "-1", "vocabulary of 4"]),
    (lambda: F.embedding_bag(Tensor(numbers(4, 2)), np.array([[-2]])), ["embedding_bag", "-2", "table of 4"]),
    (lambda: F.embedding_bag(Tensor(numbers(4, 2)), np.array([1])), ["embedding_bag", "integers", "(1,)"]),
    (lambda: F.embedding(Tensor(numbers(4, 2)), np.array([0.5])), ["embedding", "integers", "float64"]),
    (lambda: F.cross_entropy(Tensor(numbers(2, 3)), np.array([1, 3])), ["cross_entropy", "3", "3 classes"]),
    (lambda: F.cross_entropy(Tensor(numbers(2, 3)), np.array([1, -2])), ["cross_entropy", "-2"]),
    (lambda: F.cross_entropy(Tensor(numbers(2, 3)), np.array([1])), ["cross_entropy", "[2, 3]", "[1]"]),
    (lambda: F.cross_entropy(Tensor(numbers(2, 3)), np.array([1, 1]), reduction="avg"), ["reduction", "avg", "mean"]),
    (lambda: F.layer_norm(Tensor(numbers(2, 3)), Tensor(numbers(2)), None), ["layer_norm", "[2, 3]", "[2]"]),
    (lambda: F.gelu(Tensor(numbers(2, 3)), Tensor(numbers(2))), ["gelu", "[2, 3]", "[2]"]),
    (lambda: F.dropout(Tensor(numbers(2, 3)), 1.5, 1, np.arange(2)), ["dropout", "p=1.5"]),
    (lambda: F.dropout(Tensor(numbers(2, 3)), 0.5, 1, np.arange(3)), ["dropout", "row_ids"]),
    (lambda: F.packed_attention(Tensor(numbers(1, 2, 14)), 4, 3), ["packed_attention", "heads=4", "[1, 2, 14]"]),
    (lambda: F.packed_attention(Tensor(numbers(1, 2, 20)), 4, 3), ["4 query heads", "3 key/value heads"]),
    (lambda: F.attention(*[Tensor(numbers(1, 2, h, 4)) for h in (4, 3, 3)]), ["4 query heads", "3 key/value"]),
    (lambda: F.rotary(Tensor(numbers(1, 4, 1, 4)), *TURN), ["rotary", "(3, 2)"]),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
def test_mistakes_name_the_op_and_the_shapes(mistake, words):
    with pytest.raises(OpError) as caught:
        mistake()
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_wrong_vjp_and_a_wrong_jvp_are_found():
    x = numbers(3)
    right = dict(forward=lambda a: (a * a, a), vjp=lambda node, g: (2 * g * node.saved,))
    wrong_vjp = Op("square", right["forward"], lambda node, g: (3 * g * node.saved,))
    with pytest.raises(GradcheckError, match=r"reverse mode, input 0, element \(\d,\): computed .* central difference"):
        gradcheck(lambda a: apply(wrong_vjp, a), x, forward=False)
    wrong_jvp = Op("square", right["forward"], right["vjp"], lambda i, t, o: t[0] * i[0])
    with pytest.raises(GradcheckError, match="forward mode"):
        gradcheck(lambda a: apply(wrong_jvp, a), x)
    # right values, but a jvp that forgets that its result depends on x: only the second order shows it
    detached = Op("square", right["forward"], right["vjp"], lambda i, t, o: t[0] * (i[0].data * 2))
    gradcheck(lambda a: apply(detached, a), x)
    with pytest.raises(GradcheckError, match="second order"):
        gradcheck(lambda a: apply(detached, a), x, second_order=True)


def test_gradcheck_refuses_float32():
    with pytest.raises(TypeError, match=r"float32.*float64"):
        gradcheck(lambda a: a * a, np.ones(3, np.float32))


def test_ties_share_or_go_to_the_first():
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True)
    x.max(dim=1).backward(np.array([1.0, 3.0]))
    np.testing.assert_array_equal(x.grad, [[0, 0.5, 0.5], [1, 1, 1]])
    np.testing.assert_allclose(jvp(lambda t: t.min(dim=1), x.data, np.arange(6.0).reshape(2, 3))[1].data, [0, 4])
    a, b = Tensor(np.ones(2), requires_grad=True), Tensor(np.ones(2), requires_grad=True)
    F.maximum(a, b).sum().backward()
    np.testing.assert_array_equal((a.grad, b.grad), [[1, 1], [0, 0]])
