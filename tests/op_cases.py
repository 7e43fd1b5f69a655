"""One row per op of `dtrain/ops/`: functions of tensors, each with the arrays at which its derivatives are checked."""

import numpy as np

import dtrain.functional as F
from dtrain.ops import OPS
from dtrain.tensor import apply


def numbers(*shape, seed=0, low=None):
    random = np.random.default_rng([seed, *shape])
    return random.standard_normal(shape) if low is None else random.uniform(low, low + 2, shape)


def distinct(*shape):
    """No ties and nothing near zero: for max, relu, abs."""
    count = int(np.prod(shape))
    return np.random.default_rng(1).permutation(count).reshape(shape) / 4.0 - count / 8.0 + 0.06


IDS = np.array([[0, 3, 3], [1, 0, 3]])
BAGS = np.array([[0, 3, 3], [-1, -1, -1], [1, -1, 0]])
TARGETS = np.array([[0, -1, 4], [2, 2, -1]])
ANGLES = np.outer(np.arange(3), [1.0, 0.1])
TURN = (np.cos(ANGLES), np.sin(ANGLES))


# name of the op -> cases: (function of tensors, input arrays)
CASES = {
    "add": [
        (lambda a, b: a + b, numbers(2, 3), numbers(2, 3)),
        (lambda a, b: a + b, numbers(2, 1, 4), numbers(3, 1)),
        (lambda a, b: a + b, numbers(1), numbers(2, 3)),
        (lambda a, b: a + b, numbers(0, 3), numbers(3)),
        (lambda a: 1.5 + a + np.arange(3) + a, numbers(2, 3)),
    ],
    "sub": [
        (lambda a, b: a - b, numbers(2, 3), numbers(3)),
        (lambda a, b: a - b, numbers(3), numbers(2, 1)),
        (lambda a: 1 - a - 2, numbers(2)),
    ],
    "mul": [
        (lambda a, b: a * b, numbers(2, 3), numbers(2, 3)),
        (lambda a, b: a * b, numbers(2, 1, 4), numbers(3, 1)),
        (lambda a, b: a * b, numbers(), numbers(2, 3)),
        (lambda a: a * a * np.arange(3), numbers(2, 3)),
        (lambda a, b: a * b, numbers(2, 0), numbers(1, 1)),
    ],
    "scale": [(lambda a: a * 3, numbers(2, 3)), (lambda a: -0.5 * a, numbers())],
    "div": [
        (lambda a, b: a / b, numbers(2, 3), numbers(2, 3, low=1)),
        (lambda a, b: a / b, numbers(3), numbers(2, 1, low=1)),
        (lambda a: 2 / a / 3, numbers(4, low=1)),
    ],
    "neg": [(lambda a: -a, numbers(2, 3))],
    "pow": [
        (lambda a: a**2, numbers(2, 3)),
        (lambda a: a**3, numbers(2, 3)),
        (lambda a: a**-0.5, numbers(2, 3, low=1)),
        (lambda a: a**0 + a**1, numbers(3)),
    ],
    "power": [
        (lambda a, b: a**b, numbers(2, 3, low=0.5), numbers(3)),
        (lambda a: 2**a, numbers(3)),
        (lambda a: a ** np.array([2, 3]), numbers(2)),
    ],
    "maximum": [
        (lambda a, b: F.maximum(a, b), distinct(2, 3), distinct(3)),
        (lambda a: F.maximum(a, 0.2), distinct(2, 3)),
    ],
    "where": [
        (lambda a, b: F.where(np.array([True, False, True]), a, b), numbers(2, 3), numbers(3)),
        (lambda a: F.where(np.array([[True], [False]]), a, 0.0), numbers(3)),
        (lambda a: F.where(np.array([True, False]), 2.0, a), numbers(2)),
    ],
    "astype": [(lambda a: a.astype(np.longdouble).astype(a.dtype), numbers(2, 3))],
    "exp": [(lambda a: a.exp(), numbers(2, 3))],
    "log": [(lambda a: a.log(), numbers(2, 3, low=0.5))],
    "sqrt": [(lambda a: a.sqrt(), numbers(2, 3, low=0.5))],
    "tanh": [(lambda a: a.tanh(), numbers(2, 3))],
    "sigmoid": [(lambda a: a.sigmoid(), numbers(2, 3))],
    "erf": [(lambda a: a.erf(), numbers(2, 3)), (lambda a: a.erf(), np.array([0.0, 0.2499, 0.2501, -3.0]))],
    "relu": [(lambda a: a.relu(), distinct(2, 3))],
    "abs": [(lambda a: abs(a), distinct(2, 3))],
    "sin": [(lambda a: a.sin(), numbers(2, 3))],
    "cos": [(lambda a: a.cos(), numbers(2, 3))],
    "sum": [
        (lambda a: a.sum(), numbers(2, 3)),
        (lambda a: a.sum(dim=0), numbers(2, 3)),
        (lambda a: a.sum(dim=(0, -1), keepdims=True), numbers(2, 3, 4)),
        (lambda a: a.sum(dim=(1,)), numbers(2, 3, 4)),
        (lambda a: a.sum(dim=1), numbers(2, 0)),
        (lambda a: a.sum(), numbers()),
    ],
    "mean": [
        (lambda a: a.mean(), numbers(2, 3)),
        (lambda a: a.mean(dim=-1), numbers(2, 3)),
        (lambda a: a.mean(dim=(0, 2), keepdims=True), numbers(2, 3, 4)),
    ],
    "max": [
        (lambda a: a.max(), distinct(2, 3)),
        (lambda a: a.max(dim=1), distinct(2, 3)),
        (lambda a: a.max(dim=(0, 2), keepdims=True), distinct(2, 3, 4)),
    ],
    "min": [(lambda a: a.min(), distinct(2, 3)), (lambda a: a.min(dim=-2, keepdims=True), distinct(2, 3))],
    "reshape": [
        (lambda a: a.reshape(3, -1), numbers(2, 3)),
        (lambda a: a.T.reshape((6,)), numbers(2, 3)),
        (lambda a: a.reshape(0, 5), numbers(2, 0)),
    ],
    "permute": [
        (lambda a: a.permute(2, 0, 1), numbers(2, 3, 4)),
        (lambda a: a.transpose(1, -1, 0), numbers(2, 3, 4)),
        (lambda a: a.swapaxes(0, -1), numbers(2, 3, 4)),
        (lambda a: a.T, numbers(2, 3, 1)),
    ],
    "broadcast_to": [(lambda a: a.broadcast_to((2, 4, 3)), numbers(4, 1)), (lambda a: a.broadcast_to((3,)), numbers())],
    "index": [
        (lambda a: a[1], numbers(3, 2)),
        (lambda a: a[..., ::-2, None], numbers(3, 4)),
        (lambda a: a[np.array([0, 2, 0])], numbers(3, 2)),
        (lambda a: a[[0, 0], 1:], numbers(3, 2)),
        (lambda a: a[(0, 0), 1], numbers(3, 2)),
        (lambda a: a[range(2), (1, 1)], numbers(3, 2)),
        (lambda a: a[np.array([[0], [2]]), np.array([1, 1])], numbers(3, 2)),
        (lambda a: a[np.array([True, False, True])], numbers(3, 2)),
        (lambda a: a[2:2], numbers(3, 2)),
    ],
    "concat": [
        (lambda a, b: F.concat([a, b], dim=-1), numbers(2, 3), numbers(2, 1)),
        (lambda a, b: F.concat([a, b, a]), numbers(2, 3), numbers(0, 3)),
    ],
    "stack": [(lambda a, b: F.stack([a, b], dim=-1), numbers(2, 3), numbers(2, 3))],
    "gather": [
        (lambda a: F.gather(a, np.array([[0, 0], [3, 1]]), dim=1), numbers(2, 4)),
        (lambda a: F.gather(a, np.array([[1, 1, 0, 1]]), dim=0), numbers(2, 4)),
    ],
    "matmul": [
        (lambda a, b: a @ b, numbers(2, 3), numbers(3, 4)),
        (lambda a, b: a @ b, numbers(5, 2, 3), numbers(3, 4)),
        (lambda a, b: a @ b, numbers(5, 1, 2, 3), numbers(2, 3, 4)),
        (lambda a, b: a @ b, numbers(2, 3), numbers(5, 3, 1)),
        (lambda a, b: a @ b, numbers(3), numbers(3)),
        (lambda a, b: a @ b, numbers(3), numbers(5, 3, 2)),
        (lambda a, b: a @ b, numbers(5, 2, 3), numbers(3)),
        (lambda a, b: a.T @ b.swapaxes(-1, -2), numbers(3, 2), numbers(5, 4, 3)),
        (lambda a, b: a @ b, numbers(2, 0), numbers(0, 3)),
        (lambda a, b: a @ b, numbers(0, 2, 3), numbers(3, 4)),
        (lambda a: np.ones((2, 3), int) @ a @ np.ones((2, 1), int), numbers(3, 2)),
    ],
    "linear": [
        (lambda x, w: F.linear(x, w), numbers(2, 5, 3), numbers(4, 3)),
        (lambda x, w, b: F.linear(x, w, b), numbers(5, 3), numbers(4, 3), numbers(4)),
        (lambda x, w, b: F.linear(x.swapaxes(0, 1), w.T, b), numbers(5, 2, 3), numbers(3, 4), numbers(4)),
        (lambda x, w, b: F.linear(x, w, b), numbers(3), numbers(4, 3), numbers(4)),
        (lambda x, w, b: F.linear(x, w, b), numbers(0, 3), numbers(4, 3), numbers(4)),
        (lambda x, w: F.linear(x, w), numbers(2, 0), numbers(4, 0)),
    ],
    "grouped_linear": [
        (lambda x, w: apply(OPS["grouped_linear"], x, w, counts=np.array([2, 0, 3])), numbers(5, 2), numbers(3, 4, 2)),
        (lambda x, w: apply(OPS["grouped_linear"], x, w, counts=np.array([0])), numbers(0, 2), numbers(1, 4, 2)),
    ],
    "combine_rows": [
        (
            lambda x, g: apply(OPS["combine_rows"], x, g, tokens=np.array([3, 0, 3, 1]), size=5),
            numbers(4, 2),
            numbers(4),
        ),
    ],
    "reorder_rows": [
        (lambda x: apply(OPS["reorder_rows"], x, order=np.array([2, 0, 1]), back=np.array([1, 2, 0])), numbers(3, 2)),
    ],
    "embedding_bag": [
        (lambda w: F.embedding_bag(w, BAGS), numbers(4, 2)),
        (lambda w: F.embedding_bag(w, BAGS[:, :1]), numbers(4, 2)),
        (lambda w: F.embedding_bag(w, IDS[:, :1]), numbers(4, 2)),
        (lambda w: F.embedding_bag(w, BAGS[:0]), numbers(4, 2)),
        (lambda w: F.embedding_bag(w, BAGS[1:2]), numbers(0, 2)),
    ],
    "embedding": [(lambda w: F.embedding(w, IDS), numbers(4, 2)), (lambda w: F.embedding(w, IDS[:0]), numbers(4, 2))],
    "gelu": [
        (lambda x: F.gelu(x), numbers(2, 3)),
        (lambda x: F.gelu(x.T, approximate=True), numbers(2, 3)),
        (lambda x, b: F.gelu(x, b), numbers(2, 2, 3), numbers(3)),
        (lambda x, b: F.gelu(x, b, approximate=True), numbers(2, 3), numbers(3)),
        (lambda x: F.gelu(x), numbers(0, 3)),
    ],
    "silu": [(lambda x: F.silu(x), numbers(2, 3)), (lambda x: F.silu(x.T), numbers(2, 1))],
    "swiglu": [
        (lambda a, b: F.swiglu(a, b), numbers(2, 3), numbers(2, 3)),
        (lambda x: F.swiglu(x[:, :3], x[:, 3:]), numbers(2, 6)),
    ],
    "bias_residual": [
        (lambda x, b, r: F.bias_residual(x, b, r), numbers(2, 2, 3), numbers(3), numbers(2, 2, 3)),
        (lambda x, r: F.bias_residual(x, None, r), numbers(2, 3), numbers(2, 3)),
        (lambda x, b: F.bias_residual(x, b, x), numbers(2, 3), numbers(3)),
    ],
    "dropout": [
        (lambda x: F.dropout(x, 0.5, 7, np.arange(6)), numbers(2, 3, 4)),
        (lambda x: F.dropout(x, 0.25, 7, np.array([9, 2])), numbers(2, 5)),
    ],
    "layer_norm": [
        (lambda x, w, b: F.layer_norm(x, w, b, 1e-5), numbers(2, 2, 5), numbers(5), numbers(5)),
        (lambda x, w: F.layer_norm(x, w, None, 1e-5), numbers(2, 5), numbers(5)),
        (lambda x: F.layer_norm(x.T, None, None, 1e-3), numbers(5, 2)),
        (lambda x, w, b: F.layer_norm(x, w, b, 1e-5), numbers(0, 5), numbers(5), numbers(5)),
    ],
    "rms_norm": [
        (lambda x, w: F.rms_norm(x, w), numbers(2, 2, 5), numbers(5)),
        (lambda x: F.rms_norm(x.T, None), numbers(5, 2)),
    ],
    "softmax": [
        (lambda x: F.softmax(x), numbers(2, 4)),
        (lambda x: F.softmax(x, dim=0), numbers(3, 2)),
        (lambda x: F.softmax(x), numbers(2, 1)),
    ],
    "log_softmax": [(lambda x: F.log_softmax(x), numbers(2, 4)), (lambda x: F.log_softmax(x, dim=1), numbers(2, 3, 2))],
    "cross_entropy": [
        (lambda x: F.cross_entropy(x, TARGETS), numbers(2, 3, 5)),
        (lambda x: F.cross_entropy(x, TARGETS, reduction="sum"), numbers(2, 3, 5)),
        (lambda x: F.cross_entropy(x, TARGETS, reduction="none"), numbers(2, 3, 5)),
        (lambda x: F.cross_entropy(x, abs(TARGETS), ignore=2), numbers(2, 3, 5)),
        (lambda x: F.cross_entropy(x, TARGETS[:0]), numbers(0, 3, 5)),
        (lambda x: F.cross_entropy(x, np.full(2, -1)), numbers(2, 5)),
    ],
    "attention": [
        (lambda q, k, v: F.attention(q, k, v), numbers(2, 3, 2, 4), numbers(2, 3, 2, 4), numbers(2, 3, 2, 4, seed=1)),
        (
            lambda q, k, v: F.attention(q, k, v, causal=False),
            numbers(1, 3, 4, 2),
            numbers(1, 5, 2, 2),
            numbers(1, 5, 2, 2, seed=1),
        ),
        (
            lambda q, k, v: F.attention(q, k, v, scale=0.3),
            numbers(1, 2, 2, 3),
            numbers(1, 4, 1, 3),
            numbers(1, 4, 1, 3, seed=1),
        ),
        (
            lambda q, k, v: F.attention(q.swapaxes(1, 2), k.swapaxes(1, 3), v.swapaxes(1, 3)),
            numbers(1, 2, 3, 4),
            numbers(1, 4, 2, 3),
            numbers(1, 4, 2, 3, seed=1),
        ),
    ],
    "packed_attention": [
        (lambda x: F.packed_attention(x, 2, 2), numbers(2, 3, 18)),
        (lambda x: F.packed_attention(x, 4, 2, causal=False), numbers(1, 3, 16)),
        (lambda x: F.packed_attention(x, 2, 1, rotary=TURN), numbers(2, 3, 16)),
    ],
    "rotary": [
        (lambda x: F.rotary(x, *TURN), numbers(2, 3, 2, 4)),
        (lambda x: F.rotary(x[..., ::-1], *TURN), numbers(1, 3, 1, 4)),
    ],
}
