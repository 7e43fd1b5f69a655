import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from dtrain.config import TextConfig
from dtrain.data import Sampler, load_tokenizer, open_data, unigram_entropy
from dtrain.data.sources import files_of, standard_library
from dtrain.data.tokenizer import ByteTokenizer, train_bpe
from dtrain.errors import UserError

STRANGE = "plain, naïve, Ωμέγα, 漢字, 🙂👩‍🚀, \x00\x7f, tabs\t\tand\r\nlines\n\n  x=1"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    return folder


def write(path, content=b"hello world, " * 40):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_windows_are_slices_of_the_file_and_targets_the_next_bytes(folder):
    content = bytes(range(256)) * 3
    data = open_data(TextConfig(path=write(folder / "a.txt", content), validation=0.25), sequence=10)
    kept = round(len(content) * 0.25)
    for dataset, part in ((data.train, content[:-kept]), (data.validation, content[-kept:])):
        assert len(dataset) == (len(part) - 1) // 10
        indices = np.array([len(dataset) - 1, 0, 3, 3])
        batch = dataset.batch(indices)
        for row, i in enumerate(indices):
            assert batch["inputs"][row].tolist() == list(part[i * 10 : i * 10 + 10])
            assert batch["targets"][row].tolist() == list(part[i * 10 + 1 : i * 10 + 11])
        assert all(a.dtype == np.int32 and a.flags.c_contiguous and a.shape == (4, 10) for a in batch.values())
        batch["inputs"][:] = 0  # a batch is a copy
        assert dataset.batch(indices)["inputs"][1].tolist() == list(part[:10])
    assert data.vocabulary == 256 and data.mask_token is None and data.features == 0
    assert dataset.batch(np.zeros(0, dtype=np.int64))["inputs"].shape == (0, 10)
    for wrong in (-1, len(dataset)):
        with pytest.raises(AssertionError):
            dataset.batch(np.array([wrong]))


def test_validation_is_one_window_at_least_and_none_for_zero(folder):
    path = write(folder / "a.txt", bytes(1000 % 256 for _ in range(1000)))
    data = open_data(TextConfig(path=path, validation=0.001), sequence=100)
    assert len(data.validation) == 1 and len(data.train) == (1000 - 101 - 1) // 100
    whole = open_data(TextConfig(path=path, validation=0.0), sequence=100)
    assert whole.validation is None and len(whole.train) == 9


@pytest.mark.parametrize("tokens, fits", [(22, True), (21, False), (1, False)])
def test_a_text_that_is_too_short_names_both_numbers(folder, tokens, fits):
    config = TextConfig(path=write(folder / "a.txt", b"x" * tokens))
    if fits:
        assert len(open_data(config, sequence=10).train) == 1
        return
    with pytest.raises(UserError, match=r"data.path") as caught:
        open_data(config, sequence=10)
    assert str(tokens) in str(caught.value) and "22" in str(caught.value) and "model.sequence: 10" in str(caught.value)


def test_files_folders_and_globs_give_the_same_stream(folder):
    write(folder / "b" / "2.txt", b"second" * 30)
    write(folder / "b" / "1.txt", b"first" * 30)
    write(folder / "c.md", b"third" * 30)
    write(folder / ".hidden" / "x.txt", b"no" * 30)
    write(folder / ".hidden.txt", b"no" * 30)
    write(folder / "d.bin", b"no\0" * 30)  # not text
    expected = b"first" * 30 + b"second" * 30 + b"third" * 30
    for path in (str(folder), str(folder) + "/", os.path.relpath(folder), str(folder / "**" / "*.[tm][xd]*")):
        data = open_data(TextConfig(path=path, validation=0.0), sequence=len(expected) - 1)
        batch = data.train.batch(np.array([0]))
        assert bytes(batch["inputs"][0].astype(np.uint8)) + expected[-1:] == expected
        assert data.fingerprint == open_data(TextConfig(path=str(folder), validation=0.0), sequence=5).fingerprint


def test_the_stream_follows_its_sources(folder):
    path = write(folder / "a.txt", b"abc" * 100)
    first = open_data(TextConfig(path=path), sequence=5)
    write(folder / "a.txt", b"abd" * 100)
    os.utime(path, ns=(1, 1))
    second = open_data(TextConfig(path=path), sequence=5)
    assert first.fingerprint != second.fingerprint
    assert second.train.batch(np.array([0]))["inputs"].tolist() == [list(b"abdab")]


def test_the_standard_library_is_real_text_and_opens_at_once():
    files = standard_library()
    assert files == sorted(files) and any(name.endswith("argparse.py") for name in files)
    assert not [name for name in files if "/test/" in name or "site-packages" in name]
    config = TextConfig(path="stdlib")
    data = open_data(config, sequence=128)
    assert 2e6 < len(data.train) * 128 < 2e7 and 2.5 < data.entropy < 3.6
    assert "def " in data.tokenizer.decode(data.train.batch(np.arange(50))["inputs"].ravel())
    before = time.perf_counter()
    again = open_data(config, sequence=128)
    print(f"cached stdlib opened in {(time.perf_counter() - before) * 1e3:.1f} ms")  # measured, not asserted on
    assert again.fingerprint == data.fingerprint


def test_entropy_is_that_of_the_frequencies(folder):
    random = np.random.default_rng(0)
    tokens = random.choice(256, size=5000, p=random.dirichlet(np.full(256, 0.1))).astype(np.uint8)
    expected = stats.entropy(np.bincount(tokens, minlength=256))
    assert unigram_entropy(tokens, 256) == pytest.approx(expected, rel=1e-12)
    assert unigram_entropy(tokens.reshape(50, 100).astype(np.int32), 300) == pytest.approx(expected, rel=1e-12)
    data = open_data(TextConfig(path=write(folder / "a.txt", tokens.tobytes())), sequence=10)
    assert data.entropy == pytest.approx(expected, rel=1e-12)
    assert unigram_entropy(np.zeros(9, dtype=np.int64), 4) == 0
    assert unigram_entropy(np.arange(8), 8) == pytest.approx(np.log(8))


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(STRANGE)
    assert ids.dtype == np.int32 and ids.tolist() == list(STRANGE.encode()) and tokenizer.decode(ids) == STRANGE
    assert tokenizer.decode(np.array([104, 255, 105, 256, 300])) == "h\ufffdi\ufffd\ufffd"
    assert tokenizer.encode("\udcff").tolist() == [255], "an argument of the command line that was no UTF-8"


def test_bytes_of_any_encoding_are_learnt_as_they_are(folder):
    content = "naïve ".encode("latin-1") * 20
    data = open_data(TextConfig(path=write(folder / "a.txt", content), validation=0.0), sequence=6)
    assert bytes(data.train.batch(np.array([1]))["inputs"][0].astype(np.uint8)) == content[:6]


def test_bpe_round_trips_every_text_and_is_kept(folder, tmp_path):
    text = "the quick brown fox jumps over the lazy dog; the fox thinks. " * 50
    config = TextConfig(path=write(folder / "a.txt", text.encode()), tokenizer="bpe", vocabulary=280)
    data = open_data(config, sequence=8)
    tokenizer = data.tokenizer
    assert data.vocabulary == tokenizer.vocabulary == 280
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.encode(text).dtype == np.int32
    for other in (text, STRANGE, "", " ", "  leading"):
        assert tokenizer.decode(tokenizer.encode(other)) == other
    stream = data.train.tokens
    assert stream.dtype == np.uint16 and text.startswith(tokenizer.decode(stream))
    for written in (tokenizer, ByteTokenizer()):
        written.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded.vocabulary == written.vocabulary
        assert loaded.encode(STRANGE).tolist() == written.encode(STRANGE).tolist()
    again = open_data(config, sequence=8)
    assert (
        again.fingerprint == data.fingerprint
        and again.tokenizer.encode(text).tolist() == tokenizer.encode(text).tolist()
    )


def test_bpe_is_the_same_each_time_and_no_larger_than_the_text_allows():
    pieces = [f"word{i % 37} and {i % 11} " for i in range(500)]
    first, second = (train_bpe(iter(pieces), 320) for _ in range(2))
    assert first.definition == second.definition
    assert 256 <= train_bpe(iter(["aab"]), 1000).vocabulary < 260


def test_bpe_reads_what_is_not_utf8_with_replacement_characters(folder):
    path = write(folder / "a.txt", b"abc \xff\xfe def\r\n" * 30)
    data = open_data(TextConfig(path=path, tokenizer="bpe", vocabulary=260, validation=0.0), sequence=4)
    assert data.tokenizer.decode(data.train.tokens) == "abc \ufffd\ufffd def\r\n" * 30


def test_long_texts_are_tokenised_in_pieces_without_loss(folder):
    text = "".join(f"{i} Ω\n" for i in range(60_000))  # pieces are 65536 characters
    config = TextConfig(path=write(folder / "a.txt", text.encode()), tokenizer="bpe", vocabulary=300, validation=0.0)
    data = open_data(config, sequence=8)
    assert data.tokenizer.decode(data.train.tokens) == text


def test_without_the_library_bpe_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'dtrain\[bpe\]'"):
        open_data(TextConfig(path=write(folder / "a.txt"), tokenizer="bpe"), sequence=8)


def test_a_vocabulary_larger_than_the_models_names_both(folder):
    config = TextConfig(path=write(folder / "a.txt"))
    with pytest.raises(UserError, match=r"model.vocabulary: 100;.*256"):
        open_data(config, sequence=8, vocabulary=100)
    assert open_data(config, sequence=8, vocabulary=256).vocabulary == 256
    assert open_data(config, sequence=8, vocabulary=50304).vocabulary == 256, "padding is allowed"
    with pytest.raises(UserError, match=r"model.vocabulary: 256;.*257"):
        open_data(config, sequence=8, vocabulary=256, mask=True)
    data = open_data(config, sequence=8, vocabulary=257, mask=True)
    assert (data.vocabulary, data.mask_token) == (257, 256)


def test_bad_paths_name_the_key_and_the_path(folder, tmp_path):
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "empty folder").mkdir()
    write(folder / "empty.txt", b"")
    write(folder / "empties" / "1.txt", b"")
    write(folder / "empties" / "2.txt", b"")
    write(folder / "binaries" / "1.txt", b"\0\1")
    write(folder / "binaries" / "2.txt", b"\0\1")
    cases = {
        "missing.txt": "there is no",
        "*.nothing": "no file matches",
        "broken": "cannot read .*No such file",
        "empty folder": "has no files",
        "empty.txt": "no text",
        "empties": "no text",
        "binaries": "no text",
        "empty.txt/below": "there is no",
    }
    for path, problem in cases.items():
        for tokenizer in ("byte", "bpe"):
            with pytest.raises(UserError, match=problem) as caught:
                open_data(TextConfig(path=str(folder / path), tokenizer=tokenizer), sequence=4)
            assert "data.path" in str(caught.value) and path in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    path = write(folder / "a.txt")
    real = open

    def refuse(name, *args, **kwargs):
        if str(name) == path:
            raise PermissionError(13, "Permission denied", path)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)  # chmod would not stop root
    for tokenizer in ("byte", "bpe"):
        with pytest.raises(UserError, match=r"data.path: cannot read .*a.txt: Permission denied"):
            open_data(TextConfig(path=path, tokenizer=tokenizer), sequence=4)


def test_a_file_with_magic_in_its_name_is_a_file(folder):
    path = write(folder / "a[1].txt", b"abc")
    assert files_of(path) == [path]


def test_processes_that_make_the_cache_at_once_agree(folder):
    path = write(folder / "a.txt", os.urandom(3_000_000))
    program = f"""
from dtrain.config import TextConfig
from dtrain.data import open_data
import numpy as np
data = open_data(TextConfig(path={path!r}), sequence=64)
print(data.fingerprint, int(data.train.batch(np.arange(len(data.train)))["inputs"].sum()))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in running}
    data = open_data(TextConfig(path=path), sequence=64)
    total = int(data.train.batch(Sampler(len(data.train), 0).indices(0, len(data.train)))["inputs"].sum())
    assert answers == {f"{data.fingerprint} {total}\n"}
