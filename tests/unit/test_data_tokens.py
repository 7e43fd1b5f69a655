import numpy as np
import pytest
from scipy import stats

from dtrain.config import TokensConfig
from dtrain.data import open_data
from dtrain.errors import UserError


@pytest.mark.parametrize(
    "name, dtype", [("a.bin", "uint16"), ("a.bin", "uint32"), ("a.npy", "uint16"), ("a.npy", "int64")]
)
def test_token_files_are_used_where_they_lie(folder, name, dtype):
    tokens = np.random.default_rng(0).integers(0, 1000, 5000).astype(dtype)
    tokens.tofile(folder / name) if name == "a.bin" else np.save(folder / name, tokens)
    extra = {"dtype": dtype} if name == "a.bin" else {}
    data = open_data(TokensConfig(path=str(folder / name), validation=0.1, **extra), sequence=16)
    assert data.vocabulary == tokens.max() + 1 and data.tokenizer is None
    assert data.entropy == pytest.approx(stats.entropy(np.bincount(tokens.astype(int))), rel=1e-12)
    train, kept = tokens[:4500].astype(np.int32), tokens[4500:].astype(np.int32)
    for dataset, part in ((data.train, train), (data.validation, kept)):
        n = (len(part) - 1) // 16
        batch = dataset.batch(np.arange(n))
        assert np.array_equal(batch["inputs"], part[: 16 * n].reshape(n, 16))
        assert np.array_equal(batch["targets"], part[1 : 16 * n + 1].reshape(n, 16))
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert not (folder / "cache" / "tokens.bin").exists()


def test_one_content_has_one_fingerprint(folder):
    tokens = np.arange(100)
    tokens.astype(np.uint16).tofile(folder / "a.bin")
    tokens.astype(np.uint32).tofile(folder / "b.bin")
    np.save(folder / "c.npy", tokens)
    configs = [("a.bin", "uint16"), ("b.bin", "uint32"), ("c.npy", "uint16")]
    found = {open_data(TokensConfig(path=str(folder / n), dtype=d), sequence=4).fingerprint for n, d in configs}
    assert len(found) == 1


def test_a_stream_longer_than_a_chunk_is_measured_whole(folder, monkeypatch):
    monkeypatch.setattr("dtrain.data.tokens.CHUNK", 64)
    tokens = np.concatenate([np.zeros(100), np.full(50, 3), [999], np.ones(10)]).astype(np.uint16)
    tokens.tofile(folder / "a.bin")
    data = open_data(TokensConfig(path=str(folder / "a.bin")), sequence=4)
    assert data.vocabulary == 1000
    assert data.entropy == pytest.approx(stats.entropy(np.bincount(tokens)), rel=1e-12)


def test_tokens_that_do_not_fit_name_both_numbers(folder):
    np.array([*range(50), 700], dtype=np.uint16).tofile(folder / "a.bin")
    path = str(folder / "a.bin")
    for _ in range(2):  # measured, then from the cache
        with pytest.raises(UserError, match=r"model.vocabulary: 512;.*700.*701 or more"):
            open_data(TokensConfig(path=path), sequence=4, vocabulary=512)
        with pytest.raises(UserError, match=r"data.vocabulary: 600;.*700"):
            open_data(TokensConfig(path=path, vocabulary=600), sequence=4)
        with pytest.raises(UserError, match=r"data.vocabulary: 700;.*700"):
            open_data(TokensConfig(path=path, vocabulary=700), sequence=4)
    assert open_data(TokensConfig(path=path), sequence=4, vocabulary=701).vocabulary == 701
    assert open_data(TokensConfig(path=path, vocabulary=1024), sequence=4).vocabulary == 1024
    data = open_data(TokensConfig(path=path, vocabulary=1024), sequence=4, mask=True)
    assert (data.vocabulary, data.mask_token) == (1025, 1024)


def test_a_wrong_dtype_is_noticed(folder):
    np.arange(300, dtype=np.uint16).tofile(folder / "a.bin")
    with pytest.raises(UserError, match=r"data.dtype"):
        open_data(TokensConfig(path=str(folder / "a.bin"), dtype="uint32"), sequence=4)
    (folder / "b.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 bytes are no whole number of uint16"):
        open_data(TokensConfig(path=str(folder / "b.bin")), sequence=4)


@pytest.mark.parametrize(
    "array, problem",
    [
        (np.zeros((3, 4), np.uint16), "one dim"),
        (np.zeros(30), "integers"),
        (np.array([None] * 30), "cannot be read"),
        (np.array([1, 2, -3] * 10), "0 or more"),
        (np.zeros(0, np.uint16), "empty"),
    ],
)
def test_bad_arrays(folder, array, problem):
    np.save(folder / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=problem) as caught:
        open_data(TokensConfig(path=str(folder / "a.npy")), sequence=4)
    assert "data.path" in str(caught.value)


def test_bad_files(folder):
    (folder / "text.npy").write_text("no array")
    (folder / "empty.bin").write_bytes(b"")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "a.txt").write_text("text")
    (folder / "broken.bin").symlink_to(folder / "nowhere")
    np.save(folder / "cut.npy", np.arange(1000))
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:500])
    np.savez(folder / "z", a=np.arange(9))
    (folder / "z.npz").rename(folder / "z.npy")
    np.save(folder / "below.npy", np.arange(-3, 100))
    cases = {
        "text.npy": "cannot be read",
        "empty.bin": "is empty",
        "empty.npy": "cannot be read",
        "a.txt": "must be one file .bin or .npy",
        "broken.bin": "cannot read",
        "cut.npy": "cannot be read",
        "z.npy": "must be one array",
        "below.npy": "below.npy: a token is -3",
        "none.bin": "there is no",
        "*.npy": "must be one file",
    }
    for name, problem in cases.items():
        with pytest.raises(UserError, match=problem) as caught:
            open_data(TokensConfig(path=str(folder / name)), sequence=4)
        assert "data.path" in str(caught.value)
