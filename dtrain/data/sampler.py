"""The global order of the samples: position in the run -> index of the sample.

    position   0  1  2  3  4 | 5  6  7  8  9 | 10 ...        num_samples = 5
    epoch      0             | 1             | 2
    index      3  0  4  1  2 | 2  4  0  3  1 | 1  ...        each epoch its own permutation

    step of 4 positions on 2 ranks:   rank 0: 0 1   rank 1: 2 3   (`share`); the next step crosses the border

Invariant: the order depends on (seed, position) alone. Ranks only decide who takes which positions, so a run resumed on
another number of ranks goes on with the same samples; all the state there is, is the number of consumed samples.

Small sets (up to 2**16) sort random words: uniform over all permutations. Larger ones need no array: a keyed Feistel
network is a permutation of 2**bits, and an index that falls outside is encrypted again until it falls inside (cycle
walking; as 2**bits < 2 n, at most twice on average).
Reference: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).
"""

import numpy as np

from dtrain import random
from dtrain.arrays import Array

SORTED = 1 << 16  # 64 bit random words for so many samples sort in a few milliseconds
ROUNDS = 8


def share(start: int, count: int, rank: int, size: int) -> tuple[int, int]:
    """(start, count) of the contiguous positions of `rank` of `size`; the first count % size ranks take one more."""
    each, more = divmod(count, size)
    return start + rank * each + min(rank, more), each + (rank < more)


class Permutation:
    """A random permutation of 0..n-1 that depends on `key` (64 bits) alone, evaluated at any places."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._order: Array | None = None
        if n <= SORTED:
            # The stable sort makes even equal words (probability n² / 2**65) no matter of the sorting algorithm.
            self._order = np.argsort(random.words(key, "permutation", count=n), kind="stable")
        else:
            bits = (n - 1).bit_length()
            self._low, self._high = bits // 2, bits - bits // 2
            self._round_keys = random.words(key, "feistel", count=ROUNDS)

    def __call__(self, places: Array) -> Array:
        """The indices (int64) at `places` (int64, 0 <= place < n), same shape."""
        if self._order is not None:
            return self._order[places]
        values = self._encrypt(places.astype(np.uint64))
        outside = values >= self.n
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.n
        return values.astype(np.int64)

    def _encrypt(self, values: Array) -> Array:
        """One pass of the network. A round xors one part with a hash of the other and can be undone."""
        low_bits, high_bits = np.uint64(self._low), np.uint64(self._high)
        low, high = values & ((np.uint64(1) << low_bits) - np.uint64(1)), values >> low_bits
        for i, round_key in enumerate(self._round_keys):
            if i % 2 == 0:
                high ^= _mix(low + round_key) >> (np.uint64(64) - high_bits)
            else:
                low ^= _mix(high + round_key) >> (np.uint64(64) - low_bits)
        mixed: Array = (high << low_bits) | low
        return mixed


def _mix(x: Array) -> Array:
    """splitmix64's finalizer: a bit of the input flips half of the output. Arrays of uint64 wrap without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Sampler:
    """The order of `num_samples` samples under `seed`, epoch after epoch without end."""

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples > 0, f"a sampler needs samples, not {num_samples}"
        self.num_samples, self.seed = num_samples, seed
        self._permutations: dict[int, Permutation] = {}

    def indices(self, start: int, count: int) -> Array:
        """The sample indices (count,) int64 of the consumed positions start..start+count-1."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.num_samples)
            part = min(count - done, self.num_samples - place)
            out[done : done + part] = self._permutation(epoch)(np.arange(place, place + part))
            done += part
        return out

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a batch at a border needs two epochs; older ones do not come back
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = Permutation(self.num_samples, random.key(self.seed, "epoch", epoch))
        return self._permutations[epoch]
