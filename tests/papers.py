"""The papers in NumPy float64, one sample and one head at a time: the oracle of the models."""

import math

import numpy as np
from scipy.special import erf


def weights(model):
    return {name: parameter.data.astype(np.float64) for name, parameter in model.named_parameters().items()}


def layer_norm(w, name, x):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def rms_norm(w, name, x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * w[f"{name}.weight"]


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def gelu_exact(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x):
    """Rotary positions as rotations of complex numbers: x (T, D) -> (T, D)."""
    length, width = x.shape
    z = x[:, : width // 2] + 1j * x[:, width // 2 :]
    angles = np.array([[t * 10000 ** (-2 * i / width) for i in range(width // 2)] for t in range(length)])
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=1)


def attend(w, name, x, heads, kv_heads, causal, rotary):
    """One sample x (T, C) -> (T, C), before the output projection."""
    width = x.shape[1] // heads
    packed = dense(w, name, x)
    out = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q, k, v = (
            packed[:, start * width : (start + 1) * width] for start in (head, heads + group, heads + kv_heads + group)
        )
        if rotary:
            q, k = turn(q), turn(k)
        scores = q @ k.T / math.sqrt(width)
        if causal:
            scores[np.triu_indices(len(x), 1)] = -np.inf
        e = np.exp(scores - scores.max(1, keepdims=True))
        out.append(e / e.sum(1, keepdims=True) @ v)
    return np.concatenate(out, axis=1)


def trunk(config, w, sample, causal):
    norm = layer_norm if config.norm == "layer" else rms_norm
    rotary = config.position == "rotary"
    x = w["embedding.weight"][sample]
    if not rotary:
        x = x + w["positions.weight"][: len(sample)]
    for i in range(config.layers):
        b = f"blocks.{i}"
        h = norm(w, f"{b}.norm1", x)
        h = attend(w, f"{b}.attention.qkv", h, config.heads, config.kv_heads or config.heads, causal, rotary)
        x = x + dense(w, f"{b}.attention.out", h)
        h = norm(w, f"{b}.norm2", x)
        if config.mlp == "swiglu":
            gate = dense(w, f"{b}.mlp.gate", h)
            h = gate / (1 + np.exp(-gate)) * dense(w, f"{b}.mlp.up", h)
        else:
            h = (gelu_exact if config.mlp == "gelu" else gelu_tanh)(dense(w, f"{b}.mlp.up", h))
        x = x + dense(w, f"{b}.mlp.down", h)
    return norm(w, "norm", x)


def paper(config, w, inputs):
    logits = []
    for sample in inputs:
        x = trunk(config, w, sample, causal=config.kind == "gpt")
        if config.kind == "bert":
            x = gelu_exact(dense(w, "transform", x))
            x = layer_norm(w, "transform_norm", x)
        head = w["embedding.weight"] if config.tied else w["head.weight"]
        logits.append(x @ head.T + w.get("head.bias", 0))
    return np.array(logits)
