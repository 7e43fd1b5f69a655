import numpy as np
import pytest

from dtrain.config import TableConfig
from dtrain.data import open_data
from dtrain.errors import UserError

TEXT = """sepal,petal,species
5.1,1.4,setosa
7.0,4.7,versicolor
6.3,6.0,virginica
4.9,1.5,setosa
6.4,4.5,versicolor
5.8,5.1,virginica
"""
X = np.array([[5.1, 1.4], [7.0, 4.7], [6.3, 6.0], [4.9, 1.5], [6.4, 4.5], [5.8, 5.1]])
Y = [0, 1, 2, 0, 1, 2]


def write(folder, text):
    (folder / "a.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / "a.csv")


def whole(config, **arguments):
    """All rows in the order of the file: none are kept for validation."""
    data = open_data(config, **arguments)
    return data, data.train.batch(np.arange(len(data.train)))


def standardised(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


@pytest.mark.parametrize("target", ["species", None])
@pytest.mark.parametrize(
    "change", [str, lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t.rstrip()]
)
def test_csv(folder, target, change):
    data, batch = whole(TableConfig(path=write(folder, change(TEXT)), target=target, validation=0.0))
    np.testing.assert_allclose(batch["inputs"], standardised(X), rtol=1e-6)
    assert batch["targets"].tolist() == Y
    assert batch["inputs"].dtype == np.float32 and batch["targets"].dtype == np.int32
    assert data.vocabulary == 3 and data.features == 2 and data.entropy == pytest.approx(np.log(3))


def test_any_column_may_be_the_target(folder):
    text = "species,a,b\n" + "".join(f'"{y}",{a},{b}\n' for y, (a, b) in zip("xyzxyz", X, strict=True))
    data, batch = whole(TableConfig(path=write(folder, text), target="species", validation=0.0))
    np.testing.assert_allclose(batch["inputs"], standardised(X), rtol=1e-6)
    assert batch["targets"].tolist() == Y and data.features == 2


def test_numbers_are_classes_in_numeric_order(folder):
    text = "a,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate([10, 9, 2, 10.0, -1, 9]))
    data, batch = whole(TableConfig(path=write(folder, text), validation=0.0))
    assert batch["targets"].tolist() == [3, 2, 1, 3, 0, 2] and data.vocabulary == 4


def test_the_split_standardises_with_the_training_rows_alone(folder):
    x = np.random.default_rng(0).normal([1e9, 1e-3], [10.0, 1e-5], (200, 2))
    text = "a,b,constant,y\n" + "".join(f"{float(a)!r},{float(b)!r},0.1,{i % 2}\n" for i, (a, b) in enumerate(x))
    data = open_data(TableConfig(path=write(folder, text), validation=0.3), seed=4)
    train, kept = data.train.rows, data.validation.rows
    assert len(kept) == 60 and not set(train) & set(kept) and set(train) | set(kept) == set(range(200))
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    for dataset, rows in ((data.train, train), (data.validation, kept)):
        batch = dataset.batch(np.arange(len(rows)))
        np.testing.assert_allclose(batch["inputs"][:, :2], (x[rows] - mean) / deviation, rtol=1e-5, atol=1e-5)
        assert (batch["inputs"][:, 2] == 0).all(), "a constant column says nothing"
        assert batch["targets"].tolist() == [row % 2 for row in rows]


@pytest.mark.parametrize("target", ["y", "kind"])
@pytest.mark.parametrize("words", [False, True])
def test_npz(folder, target, words):
    y = np.array(["setosa", "versicolor", "virginica"])[Y] if words else np.array(Y) * 10
    np.savez(folder / "a.npz", x=X, **{target: y})
    config = TableConfig(path=str(folder / "a.npz"), target=None if target == "y" else target, validation=0.0)
    _, batch = whole(config)
    np.testing.assert_allclose(batch["inputs"], standardised(X), rtol=1e-6)
    assert batch["targets"].tolist() == Y


@pytest.mark.parametrize(
    "text, target, problem",
    [
        ("", None, "first line must name two columns"),
        ("a,b\n", None, "no rows"),
        ("a;b\n1;2\n", None, "separated by commas"),
        ("a,a,b\n1,2,3\n", None, "names a twice"),
        (TEXT, "specie", "data.target: specie; no such column.*sepal, petal, species"),
        (TEXT + "1.0,,setosa\n", None, "line 8, column petal: the value is missing"),
        (TEXT + "1.0,2.0, \n", None, "line 8, column species: the value is missing"),
        (TEXT + "1.0,2.0\n", None, "line 8: 2 values, but the header has 3"),
        (TEXT + "1.0,2.0,setosa,4\n", None, "line 8: 4 values"),
        (TEXT.replace("4.7", "many"), None, "line 3, column petal: many is not a finite number"),
        (TEXT.replace("4.7", "nan"), None, "line 3, column petal: nan is not a finite"),
        (TEXT.replace("4.7", "inf"), None, "line 3, column petal: inf"),
        (TEXT, "petal", "column species: setosa is not a finite number"),
        ("a,y\n1,0.5\n2,1.5\n", None, "data.target: y: sample 0 is 0.5; classes must be whole"),
        ("a,y\n1,inf\n2,1\n", None, "y: sample 0 is inf; classes must be whole"),
        ('a,y\n1,"open\n', None, "line 2"),
        ("a,y\n1,2\n", None, "too short: 1 samples"),
    ],
)
def test_bad_tables(folder, text, target, problem):
    with pytest.raises(UserError, match=problem) as caught:
        open_data(TableConfig(path=write(folder, text), target=target))
    assert "data." in str(caught.value)


def test_bad_files(folder):
    np.savez(folder / "none.npz", x=X)
    np.savez(folder / "words.npz", x=np.array([["a"]]), y=[1])
    np.savez(folder / "floats.npz", x=X, y=X[:, 0])
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.csv").symlink_to(folder / "nowhere")
    (folder / "c.csv").mkdir()
    for name, problem in {
        "none.npz": "needed are x and y",
        "words.npz": "must be numbers",
        "floats.npz": "classes must be whole",
        "a.txt": "must be one file .csv or .npz",
        "b.csv": "cannot read",
        "c.csv": "has no files",
        "missing.csv": "there is no",
    }.items():
        with pytest.raises(UserError, match=problem):
            open_data(TableConfig(path=str(folder / name)))


def test_more_classes_than_the_model_has_names_both(folder):
    with pytest.raises(UserError, match="3 classes, but the model has 2"):
        open_data(TableConfig(path=write(folder, TEXT)), vocabulary=2)
