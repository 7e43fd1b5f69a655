"""A rank that is a letter: an algorithm run once with it yields the steps of all ranks.

    rank r of p      (rank + 1) % size         [r+1]            [r+a] is (r + a) mod p
                     rank * size + to          p[r] + [r+2]
                     rank < 2                  no number: TypeError

Only what gives every rank the same numbers, counted from itself, can be computed: sums, multiples, the remainder by the
number of ranks. Whatever else is asked of it (a comparison, a bit, a place in a list) is a TypeError: then the steps
may differ from rank to rank in other ways, and all ranks must be looked at.
"""

from typing import NoReturn


class Letter:
    """A sum of factor * [r + a] for each of the factors, and of `rest`; for rank 0 that is `first`."""

    __slots__ = ("factors", "first", "rest", "size")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, size: int, factors: tuple[int, ...] = (1,), first: int = 0, rest: int = 0) -> None:
        self.size, self.factors, self.first, self.rest = size, factors, first, rest

    def __add__(self, other: "int | Letter") -> "Letter":
        if isinstance(other, int):
            return Letter(self.size, self.factors, self.first + other, self.rest + other)
        if isinstance(other, Letter):
            return Letter(self.size, self.factors + other.factors, self.first + other.first, self.rest + other.rest)
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: int) -> "Letter":
        if not isinstance(other, int):
            return NotImplemented
        return Letter(self.size, self.factors, self.first - other, self.rest - other)

    def __mul__(self, other: int) -> "Letter":
        if not isinstance(other, int):
            return NotImplemented
        factors = tuple(factor * other for factor in self.factors)
        return Letter(self.size, factors, self.first * other, self.rest * other)

    __rmul__ = __mul__

    def __mod__(self, other: int) -> "Letter":
        if other != self.size or self.factors != (1,):
            self._refuse()
        return Letter(self.size, (1,), self.first % self.size)

    def _refuse(self, *other: object) -> NoReturn:
        raise TypeError("all ranks at once: this number differs from rank to rank")

    __eq__ = __ne__ = __bool__ = _refuse  # what has a default that is no error
