"""The prover beside one written with Python's sets, on algorithms with mistakes put into them.

An algorithm is taken down as arrays over the ranks, one of them is changed, and it is played back.
"""

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, Algorithm, Fold, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.letter import Letter
from dtrain.collectives.schedules.prover import Prover, prove, prove_fully
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.turning import prove_turning
from tests.naive_prover import Wrong, proven
from tests.unit.test_prover_oracle import ALIKE, ROWS, assert_agree

REGULAR = [(collective, name) for collective, name in ROWS if ALGORITHMS[collective][name].regular]


def recorded(plan):
    """[sends, receives, folds] of each step: (peer, chunks, when, reduce) and (into, chunks) over all ranks."""
    size = plan.size

    def row(value):
        return np.array(np.broadcast_to(value, (size,)))

    def message(m):
        return [row(m.peer), [row(c) for c in m.chunks], row(m.when), getattr(m, "reduce", False)]

    return [
        [
            [message(s) for s in step.sends],
            [message(r) for r in step.receives],
            [(row(f.into), [row(c) for c in f.chunks]) for f in step.folds],
        ]
        for step in plan.generate(np.arange(size))
    ]


def of(values, rank, block=1):
    """The number of a rank out of an array over all ranks; of a letter, as an algorithm would compute it."""
    if not isinstance(rank, Letter):
        return values[rank]
    size, (turns, rest) = rank.size, divmod(int(values[0]), block)
    for number in (
        lambda rank: (rank + turns) % size * block + rest,
        lambda rank: (rank + turns) % size * block + (rank + rest) % size,
    ):
        if np.array_equal(values, number(np.arange(size))):
            return number(rank)
    raise TypeError("differs from rank to rank")


def played(plan, steps):
    """The schedule of such arrays; from above, a message of everyone has no `when`, as in the algorithms."""
    block = max(1, plan.parts // plan.size)

    def when(there, rank):
        return True if there.all() else of(there, rank)

    def algorithm(rank, size, **parameters):
        for sends, receives, folds in steps:
            yield Step(
                [
                    Send(of(peer, rank), [of(c, rank, block) for c in chunks], when(there, rank))
                    for peer, chunks, there, _ in sends
                ],
                [
                    Receive(of(peer, rank), [of(c, rank, block) for c in chunks], reduce, when(there, rank))
                    for peer, chunks, there, reduce in receives
                ],
                [Fold(of(into, rank), [of(c, rank) for c in chunks]) for into, chunks in folds],
            )

    row = plan.algorithm
    copied = Algorithm(algorithm, row.cost, row.parts, row.copies, regular=True, parameters=row.parameters)
    return bind(plan.collective, plan.name, copied, plan.size, plan.root)


def alone(steps, rng, size, parts):
    """A mistake of one rank in one step, or of the two ends of one message."""
    sends, receives, _ = steps[rng.integers(len(steps))]
    if not sends:
        return
    m, rank = rng.integers(len(sends)), rng.integers(size)
    peer = sends[m][0][rank]
    partner = next((r for r in receives if 0 <= peer < size and r[0][peer] == rank), None)
    kind, shift = rng.integers(5), rng.integers(1, max(2, min(size, 4)))
    if kind == 0:
        sends[m][0][rank] = (peer + shift) % size
    elif kind == 1 and receives[m % len(receives)][1]:
        receives[m % len(receives)][1][0][rank] += shift
    elif kind == 2:
        sends[m][2][rank] = False
    elif partner is not None and kind == 3:
        sends[m][2][rank] = partner[2][peer] = False
    elif partner is not None and len(partner[1]) == len(sends[m][1]) > 0:
        c = rng.integers(len(partner[1]))
        sends[m][1][c][rank] = partner[1][c][peer] = (sends[m][1][c][rank] + shift) % parts


def together(steps, rng, size, parts):
    """A mistake that all ranks make: what remains looks alike from all of them."""
    t, kind = rng.integers(len(steps)), rng.integers(7)
    sends, receives, _ = steps[t]
    shift = rng.integers(1, size)
    if kind == 0:
        del steps[t]
    elif kind == 1:
        steps.insert(t, steps[rng.integers(len(steps))])
    elif kind == 2:
        other = rng.integers(len(steps))
        steps[t], steps[other] = steps[other], steps[t]
    elif receives and kind == 3:
        receives[rng.integers(len(receives))][3] ^= True
    elif kind == 4:
        block = parts // size if parts % size == 0 else 1
        for messages in (sends, receives):
            for message in messages:
                message[1][:] = [(c + shift * block) % parts for c in message[1]]
    elif sends and kind == 5:
        m = rng.integers(len(sends))
        sends[m][0] = (sends[m][0] + shift) % size
    elif sends and kind == 6:
        m = rng.integers(len(sends))
        sends[m][1] = sends[m][1][: rng.integers(len(sends[m][1]) + 1)]
        receives[m % len(receives)][1] = receives[m % len(receives)][1][: len(sends[m][1])]


@pytest.mark.parametrize("mistake", [alone, together])
@pytest.mark.parametrize("collective, name", REGULAR)
def test_with_mistakes(collective, name, mistake):
    """The verdict is that of the oracle, with the shortcut and without it; the same rank, step and chunk are named."""
    rng = np.random.default_rng(11)
    row, wrong = ALGORITHMS[collective][name], 0
    for trial in range(25):
        size = int(rng.integers(2, 8))
        if not row.sizes(size):
            size = 4
        original = schedule(collective, name, size)
        steps = recorded(original)
        if trial == 0 and prove_turning(original) is not None:
            assert prove_turning(played(original, steps)) is not None
        mistake(steps, rng, size, original.parts)
        plan = played(original, steps)
        try:
            expected = proven(plan)
        except Wrong:
            wrong += 1
            assert prove_turning(plan) is None, trial
            with pytest.raises(ScheduleError):
                Prover(plan, 3).run()
            with pytest.raises(ScheduleError) as fully:
                Prover(plan, 1).run()
            with pytest.raises(ScheduleError) as caught:
                prove(plan)
            assert str(caught.value) == str(fully.value)
            continue
        assert_agree(Prover(plan, 3).run(), expected, plan.specification.weight)
        assert_agree(prove(plan), expected, plan.specification.weight)
    assert wrong > 0


# One step too many, in which all ranks make the same mistake; without the mistake the step would do no harm.


def ahead(rank, size, distance, chunks, reduce=False):
    """To the rank `distance` ahead these of my chunks, counted from my own; and what comes so from behind."""
    behind = (rank - distance) % size
    return (
        Send((rank + distance) % size, [(rank + chunk) % size for chunk in chunks]),
        Receive(behind, [(behind + chunk) % size for chunk in chunks], reduce),
    )


def harmless(rank, size):
    send, receive = ahead(rank, size, 1, [3, 5])
    return Step([send], [receive])


def overwritten_while_sent(rank, size):
    send, receive = ahead(rank, size, 1, [3, 4])
    return Step([send], [receive])


def written_twice(rank, size):
    (one, first), (two, second) = ahead(rank, size, 1, [3]), ahead(rank, size, 2, [4])
    return Step([one, two], [first, second])


def written_and_added(rank, size):
    (one, first), (two, second) = ahead(rank, size, 1, [3]), ahead(rank, size, 2, [4], reduce=True)
    return Step([one, two], [second, first])


def a_send_without_receive(rank, size):
    (one, first), (two, _) = ahead(rank, size, 1, [3]), ahead(rank, size, 2, [5])
    return Step([one, two], [first])


def a_receive_without_send(rank, size):
    (one, first), (_, second) = ahead(rank, size, 1, [3]), ahead(rank, size, 2, [5])
    return Step([one], [first, second])


def from_another(rank, size):
    return Step([ahead(rank, size, 1, [3])[0]], [ahead(rank, size, 2, [3])[1]])


def another_chunk(rank, size):
    return Step([ahead(rank, size, 1, [3])[0]], [ahead(rank, size, 1, [4])[1]])


def in_another_order(rank, size):
    return Step([ahead(rank, size, 1, [3, 5])[0]], [ahead(rank, size, 1, [5, 3])[1]])


def to_itself(rank, size):
    send, receive = ahead(rank, size, 0, [3])
    return Step([send], [receive])


def added_again(rank, size):
    send, receive = ahead(rank, size, 1, [3], reduce=True)
    return Step([send], [receive])


@pytest.mark.parametrize("size", [7, 33])
@pytest.mark.parametrize(
    "extra",
    [
        overwritten_while_sent,
        written_twice,
        written_and_added,
        a_send_without_receive,
        a_receive_without_send,
        from_another,
        another_chunk,
        in_another_order,
        to_itself,
        added_again,
    ],
)
@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_a_mistake_that_all_ranks_make(collective, extra, size):
    row = ALGORITHMS[collective]["ring"]

    def steps(step_too_many):
        def algorithm(rank, size):
            yield from row.steps(rank, size)
            yield step_too_many(rank, size)

        return bind(collective, "ring", Algorithm(algorithm, row.cost, row.parts, regular=True), size)

    assert prove_turning(steps(harmless)) is not None
    plan = steps(extra)
    with pytest.raises(Wrong):
        proven(plan)
    assert prove_turning(plan) is None
    with pytest.raises(ScheduleError, match=f"step {len(plan.of(0)) - 1}"):
        prove(plan)


@pytest.mark.parametrize("step", ["first", "last"])
@pytest.mark.parametrize("collective, name", ALIKE)
def test_a_mistake_of_the_last_rank_alone(collective, name, step):
    """In one chunk of one message that is as long as before, at both ends."""
    size = 33
    original = schedule(collective, name, size)
    steps = recorded(original)
    sends, receives, _ = steps[0 if step == "first" else -1]
    peer, chunks, _, _ = sends[-1]
    partner = next(r for r in receives if r[0][peer[-1]] == size - 1)
    chunks[-1][-1] = partner[1][-1][peer[-1]] = (chunks[-1][-1] + 1) % original.parts
    plan = played(original, steps)
    assert prove_turning(plan) is None
    with pytest.raises(ScheduleError) as fully:
        prove_fully(plan)
    with pytest.raises(ScheduleError) as caught:
        prove(plan)
    assert str(caught.value) == str(fully.value)
