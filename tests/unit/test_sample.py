"""Text from a trained model: the draw against NumPy's softmax, the window, and a run folder made by hand."""

from pathlib import Path

import numpy as np
import pytest

from dtrain import checkpoint, models, random
from dtrain.collectives import single
from dtrain.config import AdamWConfig, Config, GPTConfig, ImagesConfig, MLPConfig, TextConfig, TrainConfig
from dtrain.data.tokenizer import ByteTokenizer
from dtrain.errors import UserError
from dtrain.launch import configuration
from dtrain.launch.sample import choose, generate, load, sample
from dtrain.tensor import Tensor


class Sizes:
    vocabulary, features = 256, 0


class Successor:
    """A model that is sure of the byte after the last one, and keeps what it was asked."""

    def __init__(self, sequence=4, vocabulary=256, step=1):
        self.sequence, self.vocabulary, self.step, self.asked = sequence, vocabulary, step, []

    def __call__(self, inputs, context=None):
        assert context is None  # dropout stays off
        self.asked.append(inputs.copy())
        logits = np.zeros((*inputs.shape, self.vocabulary), np.float32)
        np.put_along_axis(logits, ((inputs + self.step) % self.vocabulary)[..., None], 50.0, axis=-1)
        return Tensor(logits)


# --- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_draws_follow_the_softmax(temperature, top_k):
    logits = np.array([1.0, 3.0, 2.0, -1.0, 2.5])
    expected = np.exp(logits / temperature)
    if top_k is not None:
        expected[np.argsort(logits)[:-top_k]] = 0
    expected /= expected.sum()
    generator = random.generator(0, "test")
    draws = 20000
    counts = np.bincount([choose(logits, temperature, top_k, generator) for _ in range(draws)], minlength=5)
    assert np.all(np.abs(counts / draws - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12)


def test_temperature_0_and_top_1_take_the_likeliest():
    generator = random.generator(0, "test")
    logits = np.array([0.0, 7.0, 7.0, 1.0])
    assert {choose(logits, 0, None, generator) for _ in range(20)} == {1}
    assert {choose(logits, 5.0, 1, generator) for _ in range(20)} == {1}


def test_large_logits_do_not_overflow():
    for temperature in (1e-3, 1e-310):
        assert choose(np.array([1e4, -1e4], np.float32), temperature, None, random.generator(0, "test")) == 0


# --- the text ---------------------------------------------------------------------------------------------------------


def test_prompt_and_continuation_through_a_sliding_window():
    model = Successor(sequence=4)
    assert generate(model, ByteTokenizer(), "ab", 5, temperature=0) == "abcdefg"
    assert [asked.tolist()[0] for asked in model.asked] == [list(t) for t in (b"ab", b"abc", b"abcd", b"bcde", b"cdef")]
    assert all(asked.shape[0] == 1 for asked in model.asked)


def test_a_prompt_longer_than_the_window():
    assert generate(Successor(sequence=2), ByteTokenizer(), "abcdef", 1, temperature=0) == "abcdefg"


def test_an_empty_prompt_is_not_part_of_the_text():
    assert generate(Successor(), ByteTokenizer(), "", 3, temperature=0) == "\x0b\x0c\r"


def test_bytes_that_are_no_utf8_are_replaced():
    assert generate(Successor(step=0x80), ByteTokenizer(), "a", 1, temperature=0) == "a\ufffd"


def test_ids_of_a_padded_vocabulary_are_never_drawn():
    assert generate(Successor(vocabulary=300, step=299), ByteTokenizer(), "\x00", 1, temperature=0) == "\x00\x00"


def test_the_seed_decides():
    class Even(Successor):
        def __call__(self, inputs, context=None):
            return Tensor(np.zeros((*inputs.shape, 256), np.float32))

    texts = [generate(Even(), ByteTokenizer(), "", 20, 1.0, None, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# --- run folders ------------------------------------------------------------------------------------------------------


def make_config(tmp_path, **changes):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    values = {
        "name": "tiny",
        "model": GPTConfig(layers=1, dim=16, heads=2, sequence=8),
        "data": TextConfig(path=str(text)),
        "optimizer": AdamWConfig(learning_rate=1e-3),
        "train": TrainConfig(steps=1, global_batch=1, micro_batch=1),
    }
    return Config(**(values | changes))


def make_run(tmp_path, config, step=1, seed=7):
    """A run folder with a checkpoint of a model that was initialised from `seed`; returns folder and model."""
    folder = tmp_path / "runs" / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configuration.dump(config))
    ByteTokenizer().save(folder / "tokenizer.json")
    model = models.build(config.model, Sizes(), seed=seed)
    pieces = [
        checkpoint.Piece(name, p.data, (0,) * p.data.ndim, p.data.shape) for name, p in model.named_parameters().items()
    ]
    checkpoint.save(folder / "checkpoints", step, single(), pieces, {"step": step}, keep=0)
    return folder, model


def test_the_newest_checkpoint_speaks(tmp_path, capfdbinary):
    config = make_config(tmp_path)
    make_run(tmp_path, config, step=1, seed=1)
    folder, model = make_run(tmp_path, config, step=2, seed=2)
    loaded, tokenizer = load(folder)
    for name, parameter in model.named_parameters().items():
        np.testing.assert_array_equal(loaded.named_parameters()[name].data, parameter.data)
    sample(folder, "the ", 12, temperature=1.0, seed=3)
    expected = generate(model, tokenizer, "the ", 12, 1.0, None, 3)
    assert capfdbinary.readouterr().out.decode() == expected + "\n"
    assert len(expected.encode()) >= 16 and expected.startswith("the ")


def test_no_such_run(tmp_path):
    folder, _ = make_run(tmp_path, make_config(tmp_path))
    with pytest.raises(UserError, match=r"tinny: no such run .*there are: .*tiny"):
        sample(folder.with_name("tinny"), "", 1)


def test_no_checkpoint(tmp_path):
    config = make_config(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config))
    with pytest.raises(UserError, match="no complete checkpoint"):
        sample(folder, "", 1)


def test_a_model_that_writes_no_text(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = make_config(tmp_path, model=MLPConfig(), data=ImagesConfig(path="digits"))
    (folder / "config.yaml").write_text(configuration.dump(config))
    with pytest.raises(UserError, match=r"model\.kind: mlp; only gpt"):
        sample(folder, "", 1)


def test_a_checkpoint_of_another_model(tmp_path):
    config = make_config(tmp_path)
    folder, _ = make_run(tmp_path, config)
    for change, message in (({"dim": 32}, "has shape"), ({"norm": "layer", "layers": 2}, "has no tensor")):
        model = GPTConfig(**({"layers": 1, "dim": 16, "heads": 2, "sequence": 8} | change))
        (folder / "config.yaml").write_text(configuration.dump(make_config(tmp_path, model=model)))
        with pytest.raises(UserError, match=message):
            load(folder)


def test_tokens_without_a_text_cannot_speak(tmp_path):
    folder, _ = make_run(tmp_path, make_config(tmp_path))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"whose tokens have no text"):
        load(folder)


def test_the_data_may_be_gone(tmp_path):
    config = make_config(tmp_path)
    folder, _ = make_run(tmp_path, config)
    Path(config.data.path).unlink(missing_ok=True)
    _, tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
