"""What all structs of the configuration share: their two bases, the checks of values, the words of messages."""

from msgspec import Struct


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message where something does not hold."""
    if not holds:
        raise ValueError(message)


def at_least(minimum: int, section: str, **values: float) -> None:
    """Check values of a section against their least."""
    for name, value in values.items():
        require(value >= minimum, f"{section}.{name}: {value}; must be {minimum} or more")


def fraction(section: str, **values: float) -> None:
    """Check that values of a section are in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name}: {value}; must be in [0, 1)")


def divides(section: str, name: str, value: int, of: str, total: int) -> None:
    """Check that a value divides another of its section."""
    legal = nearest(value, divisors(total))
    require(total % value == 0, f"{section}.{name}: {value}; must divide {section}.{of}: {total}, nearest: {legal}")


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration without members: parallel, train, log."""


class Member(Section, frozen=True, kw_only=True, tag_field="kind"):
    """One member of a family."""

    @property
    def kind(self) -> str:
        """The value of the key `kind` that chose this struct."""
        return str(self.__struct_config__.tag)


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around `number`, in words."""
    below, above = number // unit * unit, -(-number // unit) * unit
    return listed([multiple for multiple in (below, above) if multiple])


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def nearest(value: int, legal: list[int]) -> str:
    """The two legal values nearest to `value`, in words."""
    return listed(sorted(sorted(legal, key=lambda candidate: abs(candidate - value))[:2]))


def listed(values: list[int]) -> str:
    """Values in words: 1, 2 or 4."""
    return " or ".join([", ".join(map(str, values[:-1]))] * (len(values) > 1) + [str(values[-1])])
