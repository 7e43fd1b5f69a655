import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from dtrain import random


def test_key_depends_on_every_argument_and_on_their_borders():
    keys = {
        random.key(seed, purpose, *indices)
        for seed in (0, 1, 11, -1)
        for purpose in ("a", "b", "1a", "")
        for indices in ((), (0,), (1,), (1, 2), (12,), (2, 1))
    }
    assert len(keys) == 4 * 4 * 6
    assert all(0 <= k < 2**64 for k in keys)
    assert random.key(0, "a", np.int64(3)) == random.key(0, "a", 3)


def test_key_does_not_depend_on_the_process():
    program = "from dtrain import random; print(random.key(7, 'dropout', 3, 1), random.words(7, 'x', count=2).tolist())"
    command = [sys.executable, "-c", program]
    other = [subprocess.run(command, env={"PYTHONHASHSEED": s}, capture_output=True, text=True) for s in ("1", "2")]
    here = f"{random.key(7, 'dropout', 3, 1)} {random.words(7, 'x', count=2).tolist()}\n"
    assert [o.stdout for o in other] == [here, here], other[0].stderr


def test_words_are_those_of_philox_4x64_10():
    """Known answer of the Random123 library for counter 0 and key 0 (NumPy counts up before its first block)."""
    bits = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert bits.tolist() == expected
    k = random.key(3, "p", 4)
    assert random.words(3, "p", 4, count=5).tolist() == np.random.Philox(key=k).random_raw(5).tolist()
    assert random.generator(3, "p", 4).random() == np.random.Generator(np.random.Philox(key=k)).random()


def test_normal_is_standard_and_differs_by_name_and_seed():
    a = random.normal(0, "a", (300, 700), std=0.5, dtype=np.float64)
    assert stats.kstest(a.ravel() / 0.5, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(a.ravel()[:-1], a.ravel()[1:])[0, 1]) < 0.01
    for other in (random.normal(0, "b", (300, 700), 0.5), random.normal(1, "a", (300, 700), 0.5)):
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.01
    # Blocks are independent of one another as well.
    assert abs(np.corrcoef(a.ravel()[: random.BLOCK], a.ravel()[random.BLOCK : 2 * random.BLOCK])[0, 1]) < 0.02


@pytest.mark.parametrize("shape", [(1000, 300), (5,), (7, 3, 40000), (0, 3), (3, 0), ()])
def test_any_slice_of_normal_is_the_slice_of_the_whole(shape):
    whole = random.normal(5, "w", shape, std=0.02)
    assert whole.shape == shape and whole.dtype == np.float32
    if not shape:
        return
    n, m = shape[0], shape[-1]
    for part in [(slice(0, n // 2),), (slice(n // 2, n),), (slice(n, n),), (slice(3, 2),), (slice(None),)]:
        assert np.array_equal(random.normal(5, "w", shape, std=0.02, part=part), whole[part])
    if len(shape) > 1:
        part = (slice(1, n), *(slice(None) for _ in shape[1:-1]), slice(m // 3, m // 2))
        piece = random.normal(5, "w", shape, std=0.02, part=part)
        assert np.array_equal(piece, whole[part]) and piece.flags.c_contiguous


def test_normal_starts_from_the_same_point_in_every_dtype():
    wide = random.normal(1, "w", (50, 20), dtype=np.float64)
    assert wide.dtype == np.float64
    assert np.array_equal(random.normal(1, "w", (50, 20), dtype=np.float32), wide.astype(np.float32))
    assert np.array_equal(random.normal(1, "w", (50, 20), dtype=np.float16), wide.astype(np.float16))
