import numpy as np
import pytest

from dtrain.data.sampler import SORTED, Permutation, Sampler, share


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100, 4097, SORTED, SORTED + 1, 100_003, 2**17])
def test_a_permutation_has_every_index_once(n):
    order = Permutation(n, key=9)(np.arange(n))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(Permutation(n, key=9)(np.arange(n)[::-1]), order[::-1]), "an evaluation at any places"
    if n > 10:
        other = Permutation(n, key=10)(np.arange(n))
        assert np.mean(order == other) < 0.5 and np.mean(order == np.arange(n)) < 0.5


@pytest.mark.parametrize("n", [2, 3, 4, 5, 17, 31, 32, 33])
def test_cycle_walking_ends_inside_also_for_one_place_at_a_time(n, monkeypatch):
    monkeypatch.setattr("dtrain.data.sampler.SORTED", 1)
    for key in range(10):
        permutation = Permutation(n, key)
        assert sorted(int(permutation(np.array([place]))[0]) for place in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [5000, 100_003])
def test_a_permutation_looks_random(n):
    """Fixed points, neighbours, correlation and 8 x 8 counts of sorted and of Feistel permutations."""
    fixed = []
    for key in range(40):
        order = Permutation(n, key)(np.arange(n))
        fixed.append(np.sum(order == np.arange(n)))
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(n)
        assert np.sum(np.diff(order) == 1) < 10
        counts = np.histogram2d(np.arange(n), order, bins=8)[0]
        assert np.sum((counts - n / 64) ** 2 / (n / 64)) < 49 + 6 * np.sqrt(2 * 49)  # chi² with 49 degrees of freedom
    assert 0.4 < np.mean(fixed) < 1.7, "the number of fixed points is Poisson(1)"


def test_small_permutations_are_uniform():
    seen = [tuple(Permutation(3, key)(np.arange(3)).tolist()) for key in range(1200)]
    counts = [seen.count(p) for p in set(seen)]
    assert len(counts) == 6 and min(counts) > 140 and max(counts) < 265


def test_a_huge_permutation_needs_no_array():
    n = 3_000_000_000_000
    places = np.concatenate([np.arange(1000), np.arange(n - 1000, n)])
    order = Permutation(n, key=1)(places)
    assert order.min() >= 0 and order.max() < n and len(np.unique(order)) == 2000
    assert abs(order.mean() / n - 0.5) < 0.05


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_samples, batch", [(10, 4), (7, 16), (1, 3), (70_000, 4096)])
def test_the_order_is_free_of_the_number_of_ranks(size, num_samples, batch):
    whole = Sampler(num_samples, seed=3).indices(0, 5 * batch)
    ranks = [Sampler(num_samples, seed=3) for _ in range(size)]
    steps = [
        np.concatenate([s.indices(*share(step * batch, batch, rank, size)) for rank, s in enumerate(ranks)])
        for step in range(5)
    ]
    assert np.array_equal(np.concatenate(steps), whole)


def test_every_epoch_has_every_sample_once_and_its_own_order():
    sampler, n = Sampler(13, seed=0), 13
    stream = np.concatenate([sampler.indices(start, 5) for start in range(0, 130, 5)])  # batches cross the borders
    epochs = stream[: 10 * n].reshape(10, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (10, 1)))
    assert len({tuple(e) for e in epochs.tolist()}) == 10
    assert not np.array_equal(Sampler(13, seed=1).indices(0, 13), epochs[0])


def test_resuming_anywhere_goes_on_with_the_same_samples():
    whole = Sampler(11, seed=2).indices(0, 100)
    for start in (0, 1, 10, 11, 12, 57):
        assert np.array_equal(Sampler(11, seed=2).indices(start, 100 - start), whole[start:])
    assert Sampler(11, seed=2).indices(5, 0).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_contiguous_cover_all_and_differ_by_at_most_one(count, size):
    parts = [share(100, count, rank, size) for rank in range(size)]
    positions = [p for start, length in parts for p in range(start, start + length)]
    assert positions == list(range(100, 100 + count))
    lengths = [length for _, length in parts]
    assert max(lengths) - min(lengths) <= 1
