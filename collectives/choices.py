"""What `algorithm=` asks for, where it is a schedule: a row of the catalogue or of the user's own, with its parameters.

    comm.all_reduce(x, algorithm="ring")                              a row of the catalogue
    comm.broadcast(x, algorithm="chain:segments=16")                  with its parameters, one after each colon
    comm.all_reduce(x, algorithm="ring:segment_bytes=65536")          messages cut into segments of so many bytes
    comm.all_reduce(x, algorithm=ROW)                                 a row or function of one's own, proven first

What is done with it: `scheduled.py`.
"""

from dataclasses import dataclass
from functools import lru_cache

from dtrain.collectives.call import Call
from dtrain.collectives.counters import Volume
from dtrain.collectives.schedules.catalogue import ALGORITHMS
from dtrain.collectives.schedules.schedule import Algorithm, Steps
from dtrain.collectives.schedules.segments import SEGMENT_BYTES
from dtrain.collectives.work import Request

Own = Algorithm | Steps
"""A user's algorithm: a row, or the function alone."""


@dataclass(frozen=True)
class Choice:
    """An algorithm of one collective with the parameters that were given."""

    collective: str
    name: str
    text: str
    """With its parameters, as in `algorithm=`."""
    row: Own
    parameters: dict[str, int]
    segment_bytes: int = SEGMENT_BYTES
    own: bool = False
    """Not in the catalogue, and so not proven by its tests."""

    def start(self, call: Call) -> Request:
        """Start the call."""
        assert call.channel is not None
        return call.channel().start(call, self)

    def run(self, call: Call) -> None:
        """Do the call."""
        self.start(call).wait()

    def volume(self, call: Call) -> Volume:
        """Steps and bytes of the call, which has been started."""
        assert call.moved is not None
        return call.moved


def find(collective: str, algorithm: str | Own) -> Choice:
    """What `algorithm` asks for; ValueError for what is in no catalogue or has no such parameter."""
    return _parse(collective, algorithm) if isinstance(algorithm, str) else _own(collective, algorithm)


def names(collective: str) -> tuple[str, ...]:
    """The algorithms of the catalogue for a collective."""
    return tuple(ALGORITHMS.get(collective, ()))


@lru_cache(maxsize=256)
def _parse(collective: str, text: str) -> Choice:
    name, *assignments = text.split(":")
    rows = ALGORITHMS[collective]
    if name not in rows:
        raise ValueError(f"algorithm={name!r}: not an algorithm of {collective}; allowed: {', '.join(rows)}")
    allowed = (*rows[name].parameters, "segment_bytes")
    parameters: dict[str, int] = {}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in allowed or not value.isdecimal() or (key != "local" and int(value) < 1):
            raise ValueError(
                f"algorithm={text!r}: {assignment}: allowed after {name}: "
                f"{', '.join(f':{key}=NUMBER' for key in allowed)}"
            )
        parameters[key] = int(value)
    segment_bytes = parameters.pop("segment_bytes", SEGMENT_BYTES)
    return Choice(collective, name, text, rows[name], parameters, segment_bytes)


def _own(collective: str, row: Own) -> Choice:
    steps = row.steps if isinstance(row, Algorithm) else row
    if not callable(steps):
        raise ValueError(
            f"algorithm={row!r}: allowed: a name, a row of dtrain.collectives.schedules.Algorithm, or a function "
            "(rank, size) -> steps"
        )
    name = getattr(steps, "__name__", "own")
    return Choice(collective, name, name, row, {}, own=True)
