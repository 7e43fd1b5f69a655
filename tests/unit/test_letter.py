"""What an algorithm computes with a letter for its rank is what it computes with each rank, or a TypeError."""

import numpy as np
import pytest

from dtrain.collectives.schedules import Send, Step, bind, schedule
from dtrain.collectives.schedules.letter import Letter
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.ring import all_gather
from dtrain.collectives.schedules.ring import all_reduce as ring
from dtrain.collectives.schedules.turning import prove_turning
from tests.unit.test_prover_oracle import ALIKE


def of_rank(number, rank, size):
    """The value of a letter's number: its first one has as many turns of each factor as fit in it."""
    found, first = number.rest, number.first - number.rest
    for factor in number.factors:
        turns, first = divmod(first, factor)
        found += factor * ((turns + rank) % size)
    return found


@pytest.mark.parametrize("collective, name", ALIKE)
def test_a_letter_stands_for_every_rank(collective, name):
    for size in (3, 4, 7, 12):
        plan = schedule(collective, name, size)
        from_above = list(plan.generate(Letter(size)))
        for rank in range(size):
            for step, letters in zip(plan.of(rank), from_above, strict=True):
                ours = [*letters.sends, *letters.receives]
                for message, lettered in zip([*step.sends, *step.receives], ours, strict=True):
                    assert message.peer == of_rank(lettered.peer, rank, size)
                    assert message.chunks == tuple(of_rank(chunk, rank, size) for chunk in lettered.chunks)


NO_LETTERS = {
    "equal": lambda rank, size: rank == 2,
    "unequal": lambda rank, size: not rank != 2,
    "less": lambda rank, size: rank < 1,
    "more": lambda rank, size: size - 1 <= rank,
    "zero": lambda rank, size: not rank,
    "in a list": lambda rank, size: rank in [2, 5],
    "in a set": lambda rank, size: rank in {2, 5},
    "in a range": lambda rank, size: rank in range(2),
    "key": lambda rank, size: {2: True}.get(rank, False),
    "place": lambda rank, size: ([False] * (size - 1) + [True])[rank],
    "place in an array": lambda rank, size: np.arange(size)[rank] == 2,
    "half": lambda rank, size: rank // 2 == 1,
    "rest": lambda rank, size: rank % 2 == 1,
    "rest of twice": lambda rank, size: 2 * rank % size == 2,
    "bit": lambda rank, size: rank & 1,
    "partner": lambda rank, size: rank ^ 1 == 3,
    "from the end": lambda rank, size: size - 1 - rank == 0,
    "difference": lambda rank, size: rank - (rank + 1) % size > 0,
    "least": lambda rank, size: min(rank, 2) == 2,
    "power": lambda rank, size: 2**rank == 4,
    "number": lambda rank, size: int(rank) == 2,
    "text": lambda rank, size: f"{rank:d}" == "2",
    "bits": lambda rank, size: rank.bit_length() == 2,
    "array": lambda rank, size: (np.arange(size) == rank)[2],
    "maximum": lambda rank, size: np.maximum(rank, 2) > 2,
}


@pytest.mark.parametrize("test", NO_LETTERS)
@pytest.mark.parametrize("size", [5, 8])
def test_a_rank_that_is_told_from_others(test, size):
    """It leaves out a message: that is found, for no letter can be told from others."""
    chosen = NO_LETTERS[test]
    assert len({bool(chosen(rank, size)) for rank in range(size)}) == 2

    def steps(rank, size):
        for step in ring(rank, size):
            yield Step((), step.receives) if chosen(rank, size) else step

    plan = bind("all_reduce", "mine", steps, size)
    assert prove_turning(plan) is None
    with pytest.raises(ScheduleError, match="which sends it nothing"):
        prove(plan)


@pytest.mark.parametrize(
    "peer, chunk",
    [
        (lambda rank, size: rank + 1, None),  # for the last rank that is none
        (lambda rank, size: 2 * rank + 1, None),
        (lambda rank, size: (3 * rank + 1) % size, None),
        (None, lambda rank, size: 0),
        (None, lambda rank, size: 2 * rank),
        (None, lambda rank, size: rank % (size - 1)),
        (None, lambda rank, size: 2 * rank % size),
        (None, lambda rank, size: (rank + rank) % size),
        (None, lambda rank, size: rank + rank),
    ],
)
def test_a_number_that_is_right_for_rank_0_alone(peer, chunk):
    """All-gather on a ring, with another peer or chunk in the first send."""

    def steps(rank, size):
        for number, step in enumerate(all_gather(rank, size)):
            (send,) = step.sends
            if number == 0:
                send = Send(peer(rank, size) if peer else send.peer, [chunk(rank, size)] if chunk else send.chunks)
            yield Step([send], step.receives)

    plan = bind("all_gather", "mine", steps, 5)
    assert plan.of(0) == schedule("all_gather", "ring", 5).of(0)
    assert prove_turning(plan) is None
    with pytest.raises(ScheduleError):
        prove(plan)
