"""Categorical columns: words to ids, counted and hashed; bags; mistakes in a file."""

import numpy as np
import pytest

from dtrain.config import TableConfig
from dtrain.data import open_data
from dtrain.data.categories import bags_of
from dtrain.errors import UserError

TEXT = "genre,year,country,seen\ncomedy,1990,fr,yes\ndrama|comedy,2001,,no\naction,1977,de,yes\n"


def opened(folder, text=TEXT, **options):
    (folder / "a.csv").write_text(text)
    options = {"categories": ("genre", "country"), "validation": 0.0, **options}
    data = open_data(TableConfig(path=str(folder / "a.csv"), **options))
    return data, data.train.batch(np.arange(len(data.train)))


def test_every_word_has_a_row(folder):
    data, batch = opened(folder)
    assert data.tables == (3, 2) and data.features == 1 and data.vocabulary == 2
    assert batch["ids"].dtype == np.int32
    assert batch["ids"].tolist() == [[[1, -1], [1, -1]], [[2, 1], [-1, -1]], [[0, -1], [0, -1]]]
    year = np.array([1990, 2001, 1977])
    np.testing.assert_allclose(batch["inputs"][:, 0], (year - year.mean()) / year.std(), rtol=1e-5)
    assert batch["targets"].tolist() == [1, 0, 1]


def test_hashed_words_share_a_given_number_of_rows(folder):
    data, batch = opened(folder, hash_rows=2)
    assert data.tables == (2, 2)
    comedy = batch["ids"][0, 0, 0]
    assert batch["ids"][1, 0, 1] == comedy, "a word has one row, wherever it stands"
    assert batch["ids"].max() <= 1
    again = bags_of({"x": ["comedy"]}, 2, "|", "p")[0]
    assert again.ravel().tolist() == [comedy], "a function of the word alone"


def test_another_separator_and_other_options_are_other_data(folder):
    first, _ = opened(folder)
    second, batch = opened(folder, separator=";")
    assert second.tables == (3, 2) and batch["ids"].shape[2] == 1, "drama|comedy is one word now"
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"categories": ("gnre",)}, TEXT, r"data\.categories: gnre; no such column in .*allowed: genre, year, country"),
        ({"categories": ("seen",)}, TEXT, r"data\.categories: seen; is the target"),
        (
            {},
            TEXT.replace("drama|", "drama||"),
            r"row 2, column genre: 'drama\|\|comedy' has an empty value between two",
        ),
        ({}, TEXT.replace("fr", "").replace("de", ""), r"data\.categories: country: .*no values at all"),
        ({"categories": ("genre",)}, TEXT, r"line 2, column country: fr is not a finite number"),
    ],
)
def test_mistakes(folder, options, text, message):
    with pytest.raises(UserError, match=message):
        opened(folder, text, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ("a", "a")}, r"data\.categories: a; named twice"),
        ({"categories": ("a",), "target": "a"}, r"data\.categories: a; is the target"),
        ({"hash_rows": 0}, r"data\.hash_rows: 0"),
        ({"separator": ""}, r"data\.separator"),
    ],
)
def test_values(options, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(path="x.csv", **options)


def test_only_a_csv_has_names(folder):
    np.savez(folder / "a.npz", x=np.ones((4, 2)), y=np.arange(4))
    with pytest.raises(UserError, match=r"data\.categories: genre; only a CSV has columns with names"):
        open_data(TableConfig(path=str(folder / "a.npz"), categories=("genre",)))
