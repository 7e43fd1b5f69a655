import numpy as np
import pytest

from dtrain.data import Sampler, masked, share


def tokens(rows, length, vocabulary=256, seed=0):
    return {"inputs": np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).astype(np.int32)}


def test_the_rates_are_those_of_bert():
    batch = tokens(400, 512)
    out = masked(batch, seed=1, positions=np.arange(400), mask_token=256)
    asked = out["targets"] != -1
    before, after = batch["inputs"], out["inputs"]
    n = asked.sum()
    assert abs(asked.mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / asked.size)
    assert np.array_equal(out["targets"][asked], before[asked])
    assert np.array_equal(after[~asked], before[~asked])
    assert not (after[~asked] == 256).any()
    hidden = (after[asked] == 256).mean()
    changed = ((after[asked] != 256) & (after[asked] != before[asked])).mean()
    assert abs(hidden - 0.8) < 5 * np.sqrt(0.8 * 0.2 / n)
    assert abs(changed - 0.1 * 255 / 256) < 5 * np.sqrt(0.1 * 0.9 / n)
    assert out["inputs"].dtype == out["targets"].dtype == np.int32


def test_replacements_are_uniform_over_the_vocabulary_without_the_mask():
    batch = {"inputs": np.full((600, 512), 7, dtype=np.int32)}
    out = masked(batch, seed=1, positions=np.arange(600), mask_token=16, rate=0.9)
    hidden = (out["inputs"] == 16).sum() / (out["targets"] != -1).sum()
    assert abs(hidden - 0.8) < 5 * np.sqrt(0.8 * 0.2 / (out["targets"] != -1).sum()), "none is hidden by chance"
    others = out["inputs"][(out["inputs"] != 7) & (out["inputs"] != 16)]
    counts = np.bincount(others, minlength=17)
    mean = counts.sum() / 15
    kept = counts[[i for i in range(16) if i != 7]]
    assert np.sum((kept - mean) ** 2 / mean) < 14 + 6 * np.sqrt(28)  # chi², 14 degrees of freedom


def test_the_selection_has_no_pattern():
    """Places of one sample, and the same place of neighbouring samples, are independent."""
    out = masked(tokens(2000, 128), seed=0, positions=np.arange(2000), mask_token=256)
    asked = (out["targets"] != -1).astype(float)
    for a, b in ((asked[:, :-1], asked[:, 1:]), (asked[:-1], asked[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert np.abs(asked.mean(axis=0) - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 2000)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_masks_do_not_depend_on_the_layout(size):
    start, count = 5000, 11
    sampler, batch = Sampler(40, seed=2), tokens(40, 33)
    rows = sampler.indices(start, count)
    whole = masked({"inputs": batch["inputs"][rows]}, 3, np.arange(start, start + count), 256)
    parts = []
    for rank in range(size):
        first, length = share(start, count, rank, size)
        mine = {"inputs": batch["inputs"][sampler.indices(first, length)]}
        parts.append(masked(mine, 3, np.arange(first, first + length), 256))
    for name in ("inputs", "targets"):
        assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_seeds_and_positions_give_other_masks():
    batch = {"inputs": np.tile(tokens(1, 64)["inputs"], (2, 1))}
    a = masked(batch, 0, np.array([0, 1]), 256)["targets"]
    b = masked(batch, 1, np.array([0, 1]), 256)["targets"]
    assert not np.array_equal(a[0], a[1]) and not np.array_equal(a, b)


def test_the_batch_is_left_alone_and_every_sample_asks_something():
    batch = tokens(500, 3)
    before = batch["inputs"].copy()
    out = masked(batch, 0, np.arange(500), 256, rate=0.01)
    assert np.array_equal(batch["inputs"], before)
    assert ((out["targets"] != -1).sum(axis=1) >= 1).all()
