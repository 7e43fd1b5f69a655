"""Models against the papers in NumPy float64, published parameter counts and finite differences."""

import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from scipy.special import log_softmax

from dtrain import config as c
from dtrain import models, optimizers
from dtrain.collectives import single
from dtrain.errors import UserError
from dtrain.flat import FlatBuffers
from dtrain.gradcheck import gradcheck
from dtrain.modules import Context, Module, Parameter
from tests.papers import dense, gelu_exact, paper, weights

SMALL = {"layers": 2, "dim": 8, "heads": 4, "sequence": 6}
LLAMA = {"norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False}
CONFIGS = {
    "gpt2": c.GPTConfig(**SMALL),
    "llama": c.GPTConfig(**SMALL, **LLAMA, kv_heads=2, hidden=10),
    "bert": c.BERTConfig(**SMALL),
    "mixed": c.BERTConfig(**SMALL, kv_heads=1, position="rotary", mlp="swiglu", tied=False),
}
every = pytest.mark.parametrize("name", CONFIGS)


def sizes(vocabulary=11, features=0):
    return SimpleNamespace(vocabulary=vocabulary, features=features)


def build(name, dtype="float64", strong=True, **changes):
    """A model; `strong`: with values large enough that every part of it matters."""
    config = CONFIGS[name]
    if changes:
        from msgspec.structs import replace

        config = replace(config, **changes)
    model = models.build(config, sizes(), dtype, seed=5)
    if strong:
        generator = np.random.default_rng(1)
        for parameter in model.named_parameters().values():
            parameter.data = (parameter.data + generator.normal(size=parameter.shape) * 0.4).astype(parameter.dtype)
    return model


def ids(batch=3, length=6, seed=0):
    return np.random.default_rng(seed).integers(0, 11, size=(batch, length))


def batch_of(model, batch=3, length=6):
    targets = ids(batch, length, seed=1)
    targets[0, length // 2] = targets[-1, 0] = -1
    if isinstance(model, models.MODELS["bert"]):
        targets[np.random.default_rng(2).random(targets.shape) < 0.6] = -1
    return {"inputs": ids(batch, length), "targets": targets}


@every
@pytest.mark.parametrize("length", [6, 4, 1])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-11), ("float32", 2e-4)])
def test_logits_and_loss_are_those_of_the_papers(name, length, dtype, tolerance):
    model = build(name, dtype)
    batch = batch_of(model, length=length)
    want = paper(CONFIGS[name], weights(model), batch["inputs"])
    got = model(batch["inputs"])
    assert got.dtype == dtype
    np.testing.assert_allclose(got.data, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    asked = batch["targets"] >= 0
    logs = log_softmax(want, axis=-1)
    expected = -sum(logs[*index, batch["targets"][*index]] for index in np.argwhere(asked))
    assert model.loss(batch).item() == pytest.approx(expected, rel=tolerance)
    assert model.count(batch) == asked.sum()


@every
def test_half_precision_stays_near(name):
    want = build(name)(ids()).data
    for dtype, tolerance in (("float16", 0.02), ("bfloat16", 0.15)):
        model = build(name, dtype)
        loss = model.loss(batch_of(model))
        assert loss.dtype == np.float32
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.named_parameters().values())
        got = model(ids()).data.astype(np.float64)
        assert np.abs(got - want).max() < tolerance * np.abs(want).max()


# Gradients


def replaced(model, tensors):
    """Put these tensors in the places of the parameters."""
    by_id = {id(old): new for old, new in zip(model.named_parameters().values(), tensors, strict=True)}
    for module in model.named_modules().values():
        for attribute, value in vars(module).items():
            if id(value) in by_id:
                setattr(module, attribute, by_id[id(value)])


@every
def test_gradient_of_the_whole_model(name):
    model = build(name, layers=1, sequence=3, dim=4, heads=2, kv_heads=1, hidden=3)
    batch = batch_of(model, batch=2, length=3)
    assert model.count(batch) >= 1

    def loss(*tensors):
        before = [module.__dict__.copy() for module in model.named_modules().values()]
        modules = list(model.named_modules().values())
        replaced(model, tensors)
        try:
            return model.loss(batch)
        finally:
            for module, attributes in zip(modules, before, strict=True):
                module.__dict__.update(attributes)

    errors = gradcheck(loss, tuple(p.data for p in model.named_parameters().values()))
    assert len(errors) == len(model.named_parameters())


@every
def test_gradients_of_microbatches_add_up_to_that_of_the_batch(name):
    model = build(name, dropout=0.4)
    batch = batch_of(model, batch=4)

    def gradients(parts):
        for parameter in model.named_parameters().values():
            parameter.zero_grad()
        total = 0.0
        for part in parts:
            loss = model.loss({k: v[part] for k, v in batch.items()}, Context(0, 1, np.arange(7, 11)[part]))
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.copy() for name, p in model.named_parameters().items()}

    whole_loss, whole = gradients([slice(0, 4)])
    parts_loss, parts = gradients([slice(0, 1), slice(1, 2), slice(2, 4)])
    assert parts_loss == pytest.approx(whole_loss, rel=1e-12)
    for key, gradient in whole.items():
        np.testing.assert_allclose(parts[key], gradient, rtol=1e-9, atol=1e-12, err_msg=key)


@every
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(name, dropout):
    results = []
    for recompute in (False, True):
        model = build(name, "float32", dropout=dropout)
        model.recompute = recompute
        loss = model.loss(batch_of(model), Context(0, 2, np.arange(3)))
        loss.backward()
        results.append([loss.data, *[p.grad for p in model.named_parameters().values()]])
    for plain, recomputed in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, recomputed)


@every
def test_dropout_is_on_with_a_context_only(name):
    model = build(name, dropout=0.5)
    batch = batch_of(model)
    plain = build(name).loss(batch).item()
    assert model.loss(batch).item() == plain
    first, again, other = (model.loss(batch, Context(0, step, np.arange(3))).item() for step in (1, 1, 2))
    assert first == again != plain and first != other


# What a model sees


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_does_not_see_what_comes_later(name):
    model, inputs = build(name), ids()
    changed = inputs.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    before, after = model(inputs).data, model(changed).data
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]).max(axis=2) > 1e-6).all()


@pytest.mark.parametrize("name", ["bert", "mixed"])
def test_an_encoder_sees_everything(name):
    model, inputs = build(name), ids()
    changed = inputs.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    assert (np.abs(model(inputs).data - model(changed).data).max(axis=2) > 1e-6).all()


def test_bert_without_a_question_has_no_loss():
    model = build("bert")
    batch = {"inputs": ids(), "targets": np.full((3, 6), -1)}
    loss = model.loss(batch)
    loss.backward()
    assert loss.item() == 0 and model.count(batch) == 0
    assert all(not p.grad.any() for p in model.named_parameters().values())


def test_too_many_tokens():
    with pytest.raises(ValueError, match=r"inputs of 7 tokens; the model was built for at most 6 \(model.sequence\)"):
        build("gpt2")(ids(length=7))


# Sizes and initial values


def count(vocabulary, **options):
    return models.outline(c.GPTConfig(**options), sizes(vocabulary)).num_parameters()


@pytest.mark.parametrize(
    "layers, dim, heads, parameters",
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(layers, dim, heads, parameters):
    assert count(50257, layers=layers, dim=dim, heads=heads, sequence=1024) == parameters


@pytest.mark.parametrize(
    "vocabulary, hidden, kv_heads, parameters",
    [
        (32000, 11008, 32, 6_738_415_616),  # Llama 2 7B
        (32000, 14336, 8, 7_241_732_096),  # Mistral 7B
        (128256, 14336, 8, 8_030_261_248),  # Llama 3 8B
    ],
)
def test_llama_has_its_published_number_of_parameters(vocabulary, hidden, kv_heads, parameters):
    options = {"layers": 32, "dim": 4096, "heads": 32, "sequence": 4096, "hidden": hidden, "kv_heads": kv_heads}
    assert count(vocabulary, **options, **LLAMA) == parameters


def test_bert_base():
    # Published for BertForMaskedLM: 109,514,298, with two segment embeddings of 768 that this model does not have.
    config = c.BERTConfig(layers=12, dim=768, heads=12, sequence=512)
    assert models.outline(config, sizes(30522)).num_parameters() == 109_514_298 - 2 * 768


def test_the_course_model():
    # Check 31: 57,950,208 parameters for 8 layers of dim 512, untied vocabulary of 32000, no positions, no biases in
    # the linear layers; its two norms per layer have biases, and it has no last norm.
    config = c.GPTConfig(layers=8, dim=512, heads=8, sequence=128, position="rotary", bias=False, tied=False)
    model = models.outline(config, sizes(32000))
    shapes = {name: parameter.size for name, parameter in model.named_parameters().items()}
    assert sum(size for name, size in shapes.items() if name.startswith("blocks.0.attention")) == 1_048_576
    assert sum(size for name, size in shapes.items() if name.startswith("blocks.0.mlp")) == 2_097_152
    assert model.num_parameters() + 8 * 2 * 512 - shapes["norm.weight"] == 57_950_208


def test_names_are_readable_and_the_tied_head_is_the_embedding():
    names = list(build("gpt2").named_parameters())
    assert names[:14] == ["embedding.weight", "positions.weight"] + [
        f"blocks.0.{name}.{kind}"
        for name in ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.up", "mlp.down")
        for kind in ("weight", "bias")
    ]
    assert names[-2:] == ["norm.weight", "norm.bias"]
    assert "head.weight" in build("llama").named_parameters()


def test_initial_values_are_gpt2s():
    config = c.GPTConfig(layers=8, dim=64, heads=4, sequence=32)
    model = models.build(config, sizes(256), "float32", seed=1)
    for name, parameter in model.named_parameters().items():
        values = parameter.data
        if name.endswith("bias"):
            assert not values.any()
        elif "norm" in name:
            assert (values == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert values.std() == pytest.approx(std, rel=0.05) and abs(values.mean()) < 5 * std / math.sqrt(
                values.size
            )
    other = models.build(config, sizes(256), "float64", seed=1).named_parameters()
    assert all((other[k].data.astype(np.float32) == p.data).all() for k, p in model.named_parameters().items())
    reseeded = models.build(config, sizes(256), "float32", seed=2)
    assert (reseeded.embedding.weight.data != model.embedding.weight.data).any()


def test_vocabularies():
    assert models.build(c.GPTConfig(**SMALL), sizes(9)).embedding.weight.shape == (9, 8)
    assert models.build(c.GPTConfig(**SMALL, vocabulary=16), sizes(9)).embedding.weight.shape == (16, 8)
    with pytest.raises(UserError, match=r"model\.vocabulary: 5; must be 9 or more"):
        models.build(c.BERTConfig(**SMALL, vocabulary=5), sizes(9))


def test_every_kind_of_the_configuration_has_a_row():
    assert set(models.MODELS) == {member.__struct_config__.tag for member in get_args(c.ModelConfig)}


# The classifier

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu_exact,
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden, bias", [((5, 7), True), ((6,), False), ((), True)])
def test_mlp_against_numpy(activation, hidden, bias):
    config = c.MLPConfig(hidden=hidden, activation=activation, bias=bias)
    model = models.build(config, sizes(3, features=12), "float64", seed=0)
    w = weights(model)
    inputs = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    x = inputs.reshape(4, 12).astype(np.float64)
    for i in range(len(hidden)):
        x = ACTIVATIONS[activation](dense(w, f"blocks.{i}.linear", x))
    want = dense(w, "head", x)
    np.testing.assert_allclose(model(inputs).data, want, rtol=1e-12, atol=1e-14)
    batch = {"inputs": inputs, "targets": np.array([0, 2, 1, 2])}
    expected = -log_softmax(want, axis=1)[np.arange(4), batch["targets"]].sum()
    assert model.loss(batch).item() == pytest.approx(expected, rel=1e-12) and model.count(batch) == 4


def test_mlp_signals_neither_die_nor_grow():
    model = models.build(c.MLPConfig(hidden=(256,) * 8, activation="relu"), sizes(10, features=256), seed=0)
    logits = model(np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)).data
    assert 0.2 < logits.std() < 5


# All together


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_model_learns_a_batch_by_heart(name):
    model = build(name, "float32", strong=False, dim=32, hidden=64)
    flat = FlatBuffers(model.named_parameters(), single())
    optimizer = optimizers.build(c.AdamWConfig(learning_rate=0.01), flat)
    batch = batch_of(model)
    batch["inputs"][:, 0] = [0, 4, 7]  # what begins alike cannot be told apart by a decoder: neither samples, nor "0 0"
    losses = []
    for _ in range(60):
        loss = model.loss(batch)
        loss.backward(np.float32(1 / model.count(batch)))
        optimizer.step(0.01, optimizers.clip_factor(optimizers.global_norm(flat), 1.0))
        flat.zero_grad()
        losses.append(loss.item() / model.count(batch))
    assert losses[0] == pytest.approx(math.log(11), abs=0.15)  # at the start all tokens are as likely
    assert losses[-1] < 0.05


def test_models_contain_no_hidden_state():
    model = build("gpt2", dropout=0.2)
    assert all(
        isinstance(value, Module | Parameter | list | int | float | str | bool | type(None) | tuple)
        for module in model.named_modules().values()
        for value in vars(module).values()
    )
    first = model(ids(), Context(0, 0, np.arange(3))).data
    model(ids(seed=9), Context(0, 5, np.arange(3)))
    np.testing.assert_array_equal(model(ids(), Context(0, 0, np.arange(3))).data, first)
