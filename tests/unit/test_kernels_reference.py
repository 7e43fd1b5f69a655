"""The reference kernels against formulas from elsewhere in float64: SciPy, numerical derivatives, published words."""

import inspect
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from dtrain.arrays import Array
from dtrain.kernels import interface, reference
from dtrain.kernels.philox import philox, threshold


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def derivative(function: Any, x: Array, g: Array) -> Array:
    """The gradient of sum(g * function(x)) by central differences: x is changed in place, element by element."""
    gradient, step = np.zeros_like(x), 1e-6
    for index in np.ndindex(x.shape):
        before = x[index]
        x[index] = before + step
        above = (g * function()).sum()
        x[index] = before - step
        gradient[index] = (above - (g * function()).sum()) / (2 * step)
        x[index] = before
    return gradient


def assert_derivatives(function: Any, g: Array, pairs: list[tuple[Array, Array]]) -> None:
    for x, got in pairs:
        assert got.shape == x.shape
        np.testing.assert_allclose(got, derivative(function, x, g), rtol=1e-6, atol=1e-8)


def test_offers_the_whole_table() -> None:
    for name in interface.NAMES:
        want = list(inspect.signature(getattr(interface.Kernels, name)).parameters.items())[1:]  # without self
        assert list(inspect.signature(getattr(reference, name)).parameters.items()) == want, name


def test_values_against_scipy() -> None:
    x, b = 3 * normal(4, 7), normal(7)
    np.testing.assert_allclose(reference.softmax(x), special.softmax(x, axis=-1), rtol=1e-14)
    np.testing.assert_allclose(reference.log_softmax(x), special.log_softmax(x, axis=-1), rtol=1e-13)
    np.testing.assert_allclose(reference.gelu(x, b, False), (x + b) * stats.norm.cdf(x + b), rtol=1e-13)
    np.testing.assert_allclose(reference.gelu(x, None, True), reference.gelu(x, None, False), atol=5e-4)
    z = 0.7978845608028654 * (x + 0.044715 * x**3)
    np.testing.assert_allclose(reference.gelu(x, None, True), 0.5 * x * (1 + np.tanh(z)), rtol=1e-13)
    np.testing.assert_allclose(reference.silu(x), x * special.expit(x), rtol=1e-13)
    np.testing.assert_allclose(reference.swiglu(x, x + 1), x * special.expit(x) * (x + 1), rtol=1e-13)
    losses, logsumexp = reference.cross_entropy(x, np.array([0, 3, -1, 6]), -1)
    np.testing.assert_allclose(logsumexp, special.logsumexp(x, axis=-1), rtol=1e-14)
    expected = -special.log_softmax(x, axis=-1)[[0, 1, 3], [0, 3, 6]]
    np.testing.assert_allclose(losses[[0, 1, 3]], expected, rtol=1e-13)
    assert losses[2] == 0


def test_norms_have_the_moments_they_promise() -> None:
    x, w, b = 5 + 2 * normal(6, 50), normal(50), normal(50, seed=1)
    y, mean, rstd = reference.layer_norm(x, None, None, 0.0)
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-14)
    np.testing.assert_allclose(y.std(axis=-1), 1, rtol=1e-13)
    np.testing.assert_allclose(mean, x.mean(axis=-1))
    np.testing.assert_allclose(rstd, 1 / x.std(axis=-1), rtol=1e-13)
    np.testing.assert_allclose(reference.layer_norm(x, w, b, 0.0)[0], y * w + b)
    np.testing.assert_allclose(np.square(reference.rms_norm(x, None, 0.0)[0]).mean(axis=-1), 1, rtol=1e-13)
    assert reference.layer_norm(x * 0, None, None, 0.25)[2][0] == 2


def test_gradients_of_norms() -> None:
    x, w, b, g = normal(3, 5), normal(5, seed=1), normal(5, seed=2), normal(3, 5, seed=3)
    _, mean, rstd = reference.layer_norm(x, w, b, 1e-3)
    dx, dw, db = reference.layer_norm_vjp(g, x, w, mean, rstd)
    assert dw is not None
    assert_derivatives(lambda: reference.layer_norm(x, w, b, 1e-3)[0], g, [(x, dx), (w, dw), (b, db)])
    dx, dw, _ = reference.layer_norm_vjp(g, x, None, mean, rstd)
    assert dw is None
    assert_derivatives(lambda: reference.layer_norm(x, None, None, 1e-3)[0], g, [(x, dx)])
    dx, dw = reference.rms_norm_vjp(g, x, w, reference.rms_norm(x, w, 1e-3)[1])
    assert dw is not None
    assert_derivatives(lambda: reference.rms_norm(x, w, 1e-3)[0], g, [(x, dx), (w, dw)])


@pytest.mark.parametrize("approximate", [False, True])
def test_gradients_of_gelu(approximate: bool) -> None:
    x, b, g = 2 * normal(3, 5), normal(5), normal(3, 5, seed=3)
    dx, db = reference.gelu_vjp(g, x, b, approximate)
    assert db is not None
    assert_derivatives(lambda: reference.gelu(x, b, approximate), g, [(x, dx), (b, db)])
    assert reference.gelu_vjp(g, x, None, approximate)[1] is None


def test_gradients_of_the_rest() -> None:
    x, up, g = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=3)
    assert_derivatives(lambda: reference.silu(x), g, [(x, reference.silu_vjp(g, x))])
    dgate, dup = reference.swiglu_vjp(g, x, up)
    assert_derivatives(lambda: reference.swiglu(x, up), g, [(x, dgate), (up, dup)])
    assert_derivatives(lambda: reference.softmax(x), g, [(x, reference.softmax_vjp(g, reference.softmax(x)))])
    gradient = reference.log_softmax_vjp(g, reference.log_softmax(x))
    assert_derivatives(lambda: reference.log_softmax(x), g, [(x, gradient)])
    targets, weights = np.array([1, -1, 4]), normal(3)
    gradient = reference.cross_entropy_vjp(weights, x, targets, special.logsumexp(x, axis=-1), -1)
    assert_derivatives(lambda: reference.cross_entropy(x, targets, -1)[0], weights, [(x, gradient)])
    np.testing.assert_allclose(reference.column_sum(normal(2, 3, 4)), normal(2, 3, 4).sum(axis=(0, 1)))


def attention_by_loops(q: Array, k: Array, v: Array, causal: bool, scale: float) -> tuple[Array, Array]:
    """The definition, one query at a time."""
    (batch, length, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    out, logsumexp = np.zeros_like(q), np.full((batch, heads, length), -np.inf)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = [s for s in range(keys) if not causal or s <= t + keys - length]
        scores = [scale * float(q[b, t, h] @ k[b, s, h * groups // heads]) for s in seen]
        for s, weight in zip(seen, special.softmax(scores) if seen else [], strict=True):
            out[b, t, h] += weight * v[b, s, h * groups // heads]
        logsumexp[b, h, t] = special.logsumexp(scores) if seen else -np.inf
    return out, logsumexp


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(1, 3, 3, 2, 2, 2), (2, 2, 5, 4, 2, 3), (1, 4, 2, 2, 1, 2)])
def test_attention(causal: bool, sizes: tuple[int, ...]) -> None:
    batch, length, keys, heads, groups, depth = sizes
    q, k, v = normal(batch, length, heads, depth), *normal(2, batch, keys, groups, depth)
    g = normal(batch, length, heads, depth, seed=4)
    out, logsumexp = reference.attention(q, k, v, causal, 0.7)
    for got, want in zip((out, logsumexp), attention_by_loops(q, k, v, causal, 0.7), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    gradients = reference.attention_vjp(g, q, k, v, out, logsumexp, causal, 0.7)
    pairs = list(zip((q, k, v), gradients, strict=True))
    assert_derivatives(lambda: reference.attention(q, k, v, causal, 0.7)[0], g, pairs)


def test_rotary_turns_pairs_and_turns_them_back() -> None:
    x, angles = normal(2, 3, 2, 4), normal(3, 2)
    y = reference.rotary(x, np.cos(angles), np.sin(angles))
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angles)[:, None, :]
    np.testing.assert_allclose(y, np.concatenate((turned.real, turned.imag), axis=-1), rtol=1e-13)
    np.testing.assert_allclose(reference.rotary(y, np.cos(angles), np.sin(angles), inverse=True), x, rtol=1e-12)


def test_philox_gives_the_words_of_random123() -> None:
    """Random123, tests/kat_vectors, philox4x32 10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for counter, key, words in (
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi[:4], pi[4:], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        c0, c1, c2, c3 = (np.uint64(c) for c in counter)
        got = philox((c0, c1, c2, c3), (key[0], key[1]))
        assert " ".join(f"{int(word):08x}" for word in got) == words


def test_dropout_is_the_documented_function_of_row_and_column() -> None:
    x, ids, key = np.ones((2, 7)), np.array([3, 2**35 + 1]), 0x0123456789ABCDEF
    y = reference.dropout(x, 0.4, key, ids)
    for r, j in np.ndindex(2, 7):
        row, block = int(ids[r]), j // 4
        counter = (np.uint64(row & 0xFFFFFFFF), np.uint64(row >> 32), np.uint64(block), np.uint64(0))
        word = int(philox(counter, (key & 0xFFFFFFFF, key >> 32))[j % 4])
        assert y[r, j] == (1 / 0.6 if word >= 0.4 * 2**32 else 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should(p: float) -> None:
    y = reference.dropout(np.ones((1000, 300)), p, 7, np.arange(1000))
    deviation = (np.count_nonzero(y) - y.size * (1 - p)) / np.sqrt(y.size * p * (1 - p))
    assert abs(deviation) < 4
    assert abs(y.mean() - 1) < 4 * np.sqrt(p / (1 - p) / y.size)


def test_dropout_at_its_ends() -> None:
    x, ids = normal(3, 5), np.arange(3)
    np.testing.assert_array_equal(reference.dropout(x, 0.0, 1, ids), x)
    np.testing.assert_array_equal(reference.dropout(x, 1.0, 1, ids), 0)
    assert [threshold(p) for p in (0.0, 2.0**-32, 2.0**-33, 0.5, 1.0)] == [0, 1, 1, 2**31, 2**32]


def test_embedding_and_its_gradient() -> None:
    weight, ids = normal(5, 3), np.array([[4, 0], [4, 4]])
    np.testing.assert_array_equal(reference.embedding(weight, ids)[1, 0], weight[4])
    g = normal(2, 2, 3)
    onehot = np.eye(5)[ids.reshape(-1)]
    np.testing.assert_allclose(reference.embedding_vjp(g, ids, 5), onehot.T @ g.reshape(4, 3), rtol=1e-13)
    total = np.ones((5, 3))
    reference.embedding_vjp(g, ids, 5, total)
    np.testing.assert_allclose(total, 1 + onehot.T @ g.reshape(4, 3), rtol=1e-13)


def test_optimizers_by_hand() -> None:
    p, g, m, v = (np.array([value]) for value in (2.0, 4.0, 0.5, 0.25))
    reference.adam(p, g, m, v, 0.1, 0.5, 0.75, 1.0, 0.2, True, 0.5, 0.25, 0.5)  # gradient 2, m 1.25, v 1.1875
    assert m[0] == 1.25 and v[0] == 1.1875
    np.testing.assert_allclose(p, 2 - 0.1 * (2.5 / (np.sqrt(4.75) + 1) + 0.2 * 2))
    p, m, v = (np.array([value]) for value in (2.0, 0.5, 0.25))
    reference.adam(p, g, m, v, 0.1, 0.5, 0.75, 1.0, 0.25, False, 0.5, 0.25, 0.5)  # gradient 2.5, m 1.5, v 1.75
    np.testing.assert_allclose(p, 2 - 0.1 * 3 / (np.sqrt(7) + 1))
    p, m, v, out = (np.array([value]) for value in (2.0, 0.5, 0.25, 0.0))
    reference.adam_direction(g, m, v, p, 0.5, 0.75, 1.0, 0.2, 0.5, 0.25, 0.5, out)
    np.testing.assert_allclose(out, 2.5 / (np.sqrt(4.75) + 1) + 0.2 * 2)
    p, m = np.array([2.0]), np.array([1.0])
    reference.sgd(p, g, m, 0.1, 0.5, True, 0.25, 0.5)  # gradient 2.5, m 3, step 4
    np.testing.assert_allclose((p[0], m[0]), (1.6, 3.0))
    reference.axpy(p, g, 0.1)
    np.testing.assert_allclose(p, 2.0)
    assert reference.sum_squares(np.full(3, 1e25, np.float32)) == pytest.approx(3e50, rel=1e-6)
