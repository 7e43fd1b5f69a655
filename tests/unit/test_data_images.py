import gzip
import struct
import sys

import numpy as np
import pytest
from scipy import stats

from dtrain.config import ImagesConfig
from dtrain.data import open_data
from dtrain.data.images import read_idx
from dtrain.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 3, 9] * 4, dtype=np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def idx(array, magic=None):
    magic = 0x800 + array.ndim if magic is None else magic
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def write_pair(folder, prefix="train", images=None, labels=None, packed=False):
    images, labels = idx(PIXELS) if images is None else images, idx(LABELS) if labels is None else labels
    for name, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        path = folder / f"{prefix}-{name}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return str(folder / f"{prefix}-images-idx3-ubyte{'.gz' if packed else ''}")


def everything(data):
    """All samples of both splits as (rows of pixels, label), sorted."""
    batches = [split.batch(np.arange(len(split))) for split in (data.train, data.validation)]
    return sorted((*x.tolist(), int(y)) for b in batches for x, y in zip(b["inputs"], b["targets"], strict=True))


def expected(x, y):
    return sorted((*row.tolist(), int(label)) for row, label in zip(x.astype(np.float32), y, strict=True))


ALL = expected(PIXELS.reshape(20, 12) / 255, LABELS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by", ["file", "folder", "glob"])
def test_idx_round_trip(folder, packed, by):
    path = write_pair(folder, packed=packed)
    write_pair(folder, "t10k", images=idx(PIXELS[:5]), labels=idx(LABELS[:5]))  # a folder's training set is taken
    path = {"file": path, "folder": str(folder), "glob": str(folder / "train-*")}[by]
    data = open_data(ImagesConfig(path=path, validation=0.25), seed=1)
    assert (len(data.train), len(data.validation)) == (15, 5)
    assert everything(data) == ALL
    assert data.vocabulary == 10 and data.features == 12 and data.tokenizer is None
    batch = data.train.batch(np.array([3, 0, 3]))
    assert batch["inputs"].shape == (3, 12) and batch["inputs"].dtype == np.float32
    assert batch["targets"].shape == (3,) and batch["targets"].dtype == np.int32
    assert batch["inputs"].min() >= 0 and batch["inputs"].max() <= 1
    assert np.array_equal(batch["inputs"][0], batch["inputs"][2])


def test_labels_may_lie_elsewhere(folder, tmp_path):
    path = write_pair(folder)
    (folder / "train-labels-idx1-ubyte").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.labels: there is no .*train-labels-idx1-ubyte"):
        open_data(ImagesConfig(path=path))
    assert everything(open_data(ImagesConfig(path=path, labels=str(tmp_path / "other")))) == ALL


def test_the_split_is_seeded_disjoint_and_mixed(folder):
    path = write_pair(folder)
    splits = []
    for seed in (0, 0, 1):
        data = open_data(ImagesConfig(path=path, validation=0.25), seed=seed)
        train, kept = set(data.train.rows.tolist()), set(data.validation.rows.tolist())
        assert not train & kept and train | kept == set(range(20)) and kept != set(range(15, 20))
        splits.append(kept)
    assert splits[0] == splits[1] != splits[2]
    assert open_data(ImagesConfig(path=path, validation=0.0)).validation is None
    assert len(open_data(ImagesConfig(path=path, validation=0.001)).validation) == 1


def test_entropy_is_that_of_the_training_classes(folder):
    data = open_data(ImagesConfig(path=write_pair(folder), validation=0.25), seed=1)
    labels = data.train.batch(np.arange(15))["targets"]
    assert data.entropy == pytest.approx(stats.entropy(np.bincount(labels)), rel=1e-12)


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("x_train", "y_train")])
@pytest.mark.parametrize("kind", ["uint8", "int64", "float64", "column"])
def test_npz(folder, names, kind):
    x, y = PIXELS, LABELS
    if kind == "int64":
        x = np.where(np.arange(20 * 12).reshape(20, 4, 3) == 0, 255, PIXELS.astype(np.int64))
    if kind == "float64":
        x = PIXELS / 255
    if kind == "column":
        y = LABELS.astype(np.int64)[:, None]
    np.savez(folder / "a.npz", **{names[0]: x, names[1]: y})
    for path in (folder / "a.npz", folder):
        data = open_data(ImagesConfig(path=str(path)))
        assert everything(data) == expected(x.reshape(20, 12) / (1 if kind == "float64" else 255), LABELS)


def test_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = open_data(ImagesConfig(path="digits", validation=0.2))
    assert everything(data) == expected(x / 16, y)
    assert data.vocabulary == 10 and data.features == 64
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    again = open_data(ImagesConfig(path="digits", validation=0.2))
    assert again.fingerprint == data.fingerprint, "from the cache, without scikit-learn"


def test_without_scikit_learn_digits_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dtrain\[digits\]'"):
        open_data(ImagesConfig(path="digits"))


@pytest.mark.parametrize(
    "images, labels, problem",
    [
        (b"", None, "starts with "),
        (idx(PIXELS)[:7], None, "cut off inside its header"),
        (idx(PIXELS)[:-1], None, "asks for 256"),
        (idx(PIXELS) + b"x", None, "asks for 256"),
        (idx(PIXELS, magic=0x803 + 0x100), None, "starts with 00000903"),
        (idx(LABELS), None, "starts with 00000801"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), None, "asks for 79228"),
        (None, idx(LABELS)[:-3], "asks for 28"),
        (None, idx(LABELS[:-1]), "20 images, but 19 labels"),
        (None, idx(PIXELS), "starts with 00000803"),
        (idx(PIXELS[:0]), idx(LABELS[:0]), "no images"),
        (gzip.compress(idx(PIXELS), mtime=0)[:40], None, "gzip"),
        (gzip.compress(idx(PIXELS), mtime=0)[:-6] + b"broken", None, "gzip"),
        (b"\x1f\x8bnot gzip at all", None, "gzip"),
    ],
)
def test_damaged_idx_files(folder, images, labels, problem):
    path = write_pair(folder, images=images, labels=labels)
    for _ in range(2):  # nothing broken stays in the cache
        with pytest.raises(UserError, match=problem) as caught:
            open_data(ImagesConfig(path=path))
        assert "data.path" in str(caught.value)


@pytest.mark.parametrize(
    "arrays, problem",
    [
        ({"a": PIXELS}, "has the arrays a; needed are x and y or"),
        ({"x": PIXELS}, "has the arrays x"),
        ({"x": PIXELS, "y": LABELS[:-1]}, "20 targets are needed"),
        ({"x": PIXELS.ravel(), "y": LABELS}, "of shape"),
        ({"x": PIXELS.astype(object), "y": LABELS}, "cannot be read"),
        ({"x": PIXELS.astype(str), "y": LABELS}, "must be numbers"),
        ({"x": PIXELS.astype(float), "y": LABELS}, r"floats in \[0, 1\]"),
        ({"x": -PIXELS.astype(int), "y": LABELS}, "integers from 0 on"),
        ({"x": np.full((20, 3), np.nan), "y": LABELS}, "sample 0 .* not finite"),
        ({"x": PIXELS, "y": LABELS.astype(int) - 1}, "labels must be whole numbers from 0 on"),
        ({"x": PIXELS, "y": LABELS + 0.5}, "labels must be whole"),
        ({"x": PIXELS, "y": LABELS.astype(int) + (1 << 20)}, "the label 10485.*allowed: below 1048576"),
        ({"x": PIXELS[:0], "y": LABELS[:0]}, "no images"),
    ],
)
def test_bad_npz(folder, arrays, problem):
    np.savez(folder / "a.npz", allow_pickle=True, **arrays)
    with pytest.raises(UserError, match=problem) as caught:
        open_data(ImagesConfig(path=str(folder / "a.npz")))
    assert "data.path" in str(caught.value)


def test_bad_paths(folder):
    (folder / "text.npz").write_text("no archive")
    (folder / "empty.npz").write_bytes(b"")
    np.savez(folder / "cut.npz", x=PIXELS, y=LABELS)
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:300])
    for name, problem in {
        "text.npz": "cannot be read",
        "empty.npz": "cannot be read",
        "cut.npz": "cannot be read",
        "none.npz": "there is no",
        "": "name one file of images",
    }.items():
        with pytest.raises(UserError, match=problem) as caught:
            open_data(ImagesConfig(path=str(folder / name)))
        assert "data.path" in str(caught.value)


def test_the_header_may_not_lie_about_the_kind(folder):
    path = folder / "labels"
    path.write_bytes(idx(LABELS))
    assert np.array_equal(read_idx(str(path), dims=1), LABELS)
    with pytest.raises(UserError, match="00000803"):
        read_idx(str(path), dims=3)


def test_more_classes_than_the_model_has_names_both(folder):
    config = ImagesConfig(path=write_pair(folder))
    with pytest.raises(UserError, match="10 classes, but the model has 5"):
        open_data(config, vocabulary=5)
    assert open_data(config, vocabulary=10).vocabulary == 10
