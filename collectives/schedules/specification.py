"""What each collective promises: the chunks a rank has before, those it wants after, and whose contributions they sum.

                     before (given)        after (wanted)         whose sum
    all_reduce       all                   all                    of all ranks
    reduce_scatter   all                   block r                of all ranks
    scan             all                   all                    of ranks 0 to r
    all_gather       block r               all                    (only moved)
    all_to_all       (r, 0) ... (r, p-1)   (0, r) ... (p-1, r)    (only moved)

Chunks are numbered; where the vector has a block per rank, block r is chunks r*k to (r+1)*k - 1, and chunk (i, j) of
all_to_all is i*p + j. In the order of these numbers lie the given chunks in a rank's input array and the wanted ones in
its result. The elements are cut by the one rule of `dtypes.cut`: the first (count mod parts) parts get one more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.collectives.dtypes import Array, cut

Of = Callable[["Specification", int], range]  # (specification, rank) -> chunks or ranks


def _all(spec: "Specification", rank: int) -> range:
    return range(spec.parts)


def _block(spec: "Specification", rank: int) -> range:
    length = spec.parts // spec.size
    return range(rank * length, (rank + 1) * length)


def _all_at_root(spec: "Specification", rank: int) -> range:
    return _all(spec, rank) if rank == spec.root else range(0)


def _all_but_first(spec: "Specification", rank: int) -> range:
    return _all(spec, rank) if rank else range(0)


def _row(spec: "Specification", rank: int) -> range:
    return range(rank * spec.size, (rank + 1) * spec.size)


def _column(spec: "Specification", rank: int) -> range:
    return range(rank, spec.parts, spec.size)


def _everyone(spec: "Specification", rank: int) -> range:
    return range(spec.size)


def _up_to(spec: "Specification", rank: int) -> range:
    return range(rank + 1)


def _before(spec: "Specification", rank: int) -> range:
    return range(rank)


@dataclass(frozen=True, slots=True)
class Promise:
    """One collective: its pre-condition, its post-condition, and how its vector is cut."""

    given: Of
    wanted: Of
    contributors: Of | None = None  # None: chunks are only moved, there is one right content
    blocks: bool = False  # the vector has one block per rank
    rooted: bool = False
    pairs: bool = False  # one block per pair of ranks
    idempotent: bool = False  # a contribution may come twice: only that it came counts


PROMISES: dict[str, Promise] = {
    "all_reduce": Promise(_all, _all, _everyone),
    "reduce_scatter": Promise(_all, _block, _everyone, blocks=True),
    "all_gather": Promise(_block, _all, blocks=True),
    "all_to_all": Promise(_row, _column, pairs=True),
    "broadcast": Promise(_all_at_root, _all, rooted=True),
    "reduce": Promise(_all, _all_at_root, _everyone, rooted=True),
    "gather": Promise(_block, _all_at_root, blocks=True, rooted=True),
    "scatter": Promise(_all_at_root, _block, blocks=True, rooted=True),
    "scan": Promise(_all, _all, _up_to),
    "exscan": Promise(_all, _all_but_first, _before),  # nothing is said about rank 0, as in MPI
    "barrier": Promise(_all, _all, _everyone, idempotent=True),  # one chunk of no bytes: "I have come"
}


@dataclass(frozen=True, slots=True)
class Specification:
    """The promise of a collective for one size, root and number of chunks."""

    collective: str
    size: int
    parts: int
    root: int
    promise: Promise

    def given(self, rank: int) -> range:
        """The chunks that the rank has before; with reductions, each is its own contribution."""
        return self.promise.given(self, rank)

    def wanted(self, rank: int) -> range:
        """The chunks that the rank must have after."""
        return self.promise.wanted(self, rank)

    def contributors(self, rank: int) -> range:
        """The ranks whose contributions the wanted chunks of `rank` sum up; empty where chunks are only moved."""
        return self.promise.contributors(self, rank) if self.promise.contributors else range(0)

    @property
    def reduces(self) -> bool:
        """Whether chunks are added up."""
        return self.promise.contributors is not None

    @property
    def turns(self) -> bool:
        """Whether the promise is the same for all ranks, counted from each: that of rank 0, ranks and blocks turned."""
        promise = self.promise
        return (
            not promise.idempotent
            and self.parts % self.size == 0
            and {promise.given, promise.wanted} <= ({_row, _column} if promise.pairs else {_all, _block})
            and promise.contributors in (None, _everyone)
        )

    @property
    def rooted(self) -> bool:
        """Whether one rank is the root."""
        return self.promise.rooted

    @property
    def weight(self) -> float:
        """The share of n in one chunk of equal parts; see `Cost` for n."""
        if self.collective == "barrier":
            return 0.0
        return 1 / self.size if self.promise.pairs else 1 / self.parts

    def lengths(self, counts: int | Sequence[int] | Array) -> Array:
        """The elements of every chunk, shape (parts,), for a vector of `counts` elements.

        counts: the length of the vector; or of every rank's block (where there are blocks); or of every pair's
        (size, size) for all_to_all, where one number is the length of a rank's whole send buffer.
        """
        given = np.asarray(counts, np.int64)
        if self.promise.pairs:
            matrix = np.tile(cut(int(given), self.size), (self.size, 1)) if given.ndim == 0 else given
            self._check(matrix, (self.size, self.size))
            return matrix.reshape(-1)
        if not self.promise.blocks:
            self._check(given, ())
            return np.array(cut(int(given), self.parts), np.int64)
        blocks = np.array(cut(int(given), self.size)) if given.ndim == 0 else given
        self._check(blocks, (self.size,))
        return np.concatenate([cut(int(block), self.parts // self.size) for block in blocks]).astype(np.int64)

    def _check(self, counts: Array, shape: tuple[int, ...]) -> None:
        if counts.shape != shape or counts.min(initial=0) < 0:
            raise ValueError(
                f"{self.collective}: counts of shape {counts.shape}; allowed: numbers from 0, shape {shape}"
            )


def specification(collective: str, size: int, parts: int, root: int = 0) -> Specification:
    """The specification with `parts` chunks per vector, block or pair; ValueError for an unknown collective."""
    if collective not in PROMISES:
        raise ValueError(f"collective={collective!r}: not a collective; allowed: {', '.join(PROMISES)}")
    promise = PROMISES[collective]
    if promise.pairs and parts != 1:
        raise ValueError(f"{collective}: parts={parts}: the block of a pair is not cut; allowed: 1")
    total = parts * (size * size if promise.pairs else size if promise.blocks else 1)
    return Specification(collective, size, total, root, promise)
