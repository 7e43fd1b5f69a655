"""Wrong schedules are refused at the spot: the rank, the step, the chunk, what was expected and what was found."""

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, Algorithm, Fold, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.ring import all_reduce as ring
from dtrain.collectives.schedules.schedule import custom
from tests.schedule_cases import ROWS


def refused(steps, size=4, collective="all_reduce", **row):
    row.setdefault("parts", 1 if collective in ("all_gather", "reduce_scatter", "all_to_all") else size)
    with pytest.raises(ScheduleError) as caught:
        prove(bind(collective, "mine", custom(steps, **row), size))
    error = caught.value
    assert str(error).startswith(f"{collective} mine between {size} ranks: rank {error.rank}, step {error.step}")
    return (error.rank, error.step, error.chunk), str(error)


def changed(at_rank, at_step, change):
    """The ring with one step of one rank changed."""

    def steps(rank, size):
        for t, step in enumerate(ring(rank, size)):
            yield change(step) if (rank, t) == (at_rank, at_step) else step

    return steps


def test_missing_send():
    spot, text = refused(changed(2, 1, lambda step: Step((), step.receives)))
    assert spot == (3, 1, 1)
    assert "waits for chunks 1 from rank 2, which sends it nothing" in text


def test_missing_receive():
    spot, text = refused(changed(2, 1, lambda step: Step(step.sends)))
    assert spot == (1, 1, 0)
    assert "sends chunks 0 to rank 2, which receives nothing" in text


def test_wrong_peer():
    spot, text = refused(changed(1, 0, lambda step: Step([Send(3, [1])], step.receives)))
    assert spot == (2, 0, 1) and "from rank 1" in text
    spot, text = refused(changed(1, 0, lambda step: Step([Send(4, [1])], step.receives)))
    assert spot == (1, 0, 1) and "sends to rank 4, which does not exist" in text
    spot, text = refused(changed(1, 0, lambda step: Step([Send(1, [1])], [Receive(1, [0])])))
    assert spot == (1, 0, 1) and "sends to itself" in text


def test_wrong_chunk():
    spot, text = refused(changed(1, 2, lambda step: Step([Send(2, [1])], step.receives)))
    assert spot == (2, 2, 3)
    assert "expects chunks 3 from rank 1, which sends 1" in text
    spot, text = refused(changed(1, 2, lambda step: Step([Send(2, [3, 0])], step.receives)))
    assert spot == (2, 2, 0) and "which sends 3,0" in text
    both = lambda rank, size: [Step([Send(1 - rank, [9])], [Receive(1 - rank, [9])])]  # noqa: E731
    spot, text = refused(both, size=2)
    assert spot == (0, 0, 9) and "there are only chunks 0 to 1" in text


def test_double_count():
    def twice(rank, size):
        for distance in (1, 1, 2):
            yield Step([Send(rank ^ distance, [0])], [Receive(rank ^ distance, [0], reduce=True)])

    spot, text = refused(twice, parts=1)
    assert spot == (0, 1, 0)
    assert "the contribution of ranks 0,1 is added a second time" in text


def test_missing_contribution():
    def short(rank, size):
        yield Step([Send(rank ^ 1, [0])], [Receive(rank ^ 1, [0], reduce=True)])

    spot, text = refused(short, parts=1)
    assert spot == (0, 1, 0)
    assert "expected the sum of ranks 0-3, found that of ranks 0,1" in text


def test_overwritten_while_sent():
    def swap(rank, size):
        yield Step([Send(rank ^ 1, [0])], [Receive(rank ^ 1, [0])])

    spot, text = refused(swap, parts=1)
    assert spot == (0, 0, 0) and "is overwritten" in text


def test_written_twice():
    def both(rank, size):
        if rank == 0:
            yield Step(receives=[Receive(1, [0], reduce=True), Receive(2, [0])])
        else:
            yield Step([Send(0, [0])])

    spot, text = refused(both, size=3, parts=1)
    assert spot == (0, 0, 0) and "written twice" in text


def test_deadlock():
    def receive_first(rank, size):
        for step in ring(rank, size):
            yield Step(receives=step.receives)
            yield Step(step.sends)

    spot, text = refused(receive_first, size=3)
    assert spot == (0, 0, 2)
    assert (
        "deadlock: rank 0 in step 0 waits to receive from rank 2, rank 2 in step 0 waits to receive from rank 1, "
        "rank 1 in step 0 waits to receive from rank 0" in text
    )


def test_crossed_messages_deadlock():
    def crossed(rank, size):
        yield Step([Send(1 - rank, [rank])])
        yield Step(receives=[Receive(1 - rank, [1 - rank], reduce=True)])

    spot, text = refused(crossed, size=2)
    assert spot == (0, 0, 0) and "rank 0 in step 0 waits to send to rank 1" in text


def test_misplaced_step_that_is_no_deadlock():
    def late(rank, size, root):
        if rank == 0:
            yield Step([Send(1, [0])])
        else:
            yield Step()
            yield Step(receives=[Receive(0, [0])])

    spot, text = refused(late, size=2, collective="broadcast", parts=1)
    assert spot == (0, 0, 0)
    assert "deadlock" not in text and "receives nothing from it in this step" in text


def test_sends_what_it_has_not():
    def ahead(rank, size):
        yield Step([Send((rank + 1) % size, [(rank - 1) % size])], [Receive((rank - 1) % size, [(rank - 2) % size])])

    spot, text = refused(ahead, collective="all_gather")
    assert spot == (0, 0, 3) and "is sent to rank 1, but is not there" in text


def test_only_moved():
    def add(rank, size):
        yield Step([Send(rank ^ 1, [rank])], [Receive(rank ^ 1, [rank ^ 1], reduce=True)])

    spot, text = refused(add, size=2, collective="all_gather")
    assert spot == (0, 0, 1) and "only moves chunks" in text


def test_wrong_folds():
    spot, text = refused(lambda rank, size: [Step(folds=[Fold(0, [1])])], size=2)
    assert spot == (0, 0, 1) and "not its own" in text
    spot, text = refused(lambda rank, size: [Step(folds=[Fold(0, [0, 1])])], size=2, parts=1, copies=2)
    assert spot == (0, 0, 1) and "is not there" in text
    spot, text = refused(lambda rank, size: [Step(folds=[Fold(0, [0, 0])])], size=2, parts=1)
    assert spot == (0, 0, 0) and "rank 0 is added a second time" in text


def test_folds_of_places_that_do_not_exist():
    """Not even to look into the memory of the neighbour, where all that is missing lies."""

    def peek(rank, size):
        into_next = [Fold(rank, [rank, rank + size])] if rank == 0 else [Fold(rank, [rank, rank - size])]
        yield Step(folds=into_next)

    spot, text = refused(peek, size=2, collective="reduce_scatter", parts=1)
    assert spot == (0, 0, 2) and "only chunks 0 to 1" in text
    for fold in (Fold(2, [0]), Fold(-2, [0]), Fold(0, [-2])):
        _, text = refused(lambda rank, size, fold=fold: [Step(folds=[fold])], size=2)
        assert "only chunks 0 to 1" in text


def test_added_to_nothing():
    def early(rank, size):
        if rank == 0:
            yield Step([Send(1, [0])])
        else:
            yield Step(receives=[Receive(0, [1], reduce=True)])

    spot, text = refused(early, size=2, parts=1, copies=2)
    assert spot == (1, 0, 1) and "it is empty" in text


# Not a barrier (ROWS has none), whose last messages may tell what is known; all_gather after scatter brings some blocks
# where they were before.
FRUGAL = [row for row in ROWS if not row[1].startswith("scatter_")]


@pytest.mark.parametrize("collective, name", FRUGAL)
def test_every_message_is_needed(collective, name):
    """Without any one message, at both ends, no algorithm is right: nothing is wasted, and the prover sees all."""
    row, rng = ALGORITHMS[collective][name], np.random.default_rng(3)
    size = 6 if row.sizes(6) else 8
    plan = schedule(collective, name, size)
    programs = [plan.of(rank) for rank in range(size)]
    messages = [(r, s.peer, t) for r, p in enumerate(programs) for t, step in enumerate(p) for s in step.sends]
    for source, target, t in (messages[i] for i in rng.permutation(len(messages))[:6]):

        def without(rank, size, gone=(source, target, t), **parameters):
            for number, step in enumerate(programs[rank]):
                sends = [s for s in step.sends if (rank, s.peer, number) != gone]
                receives = [r for r in step.receives if (r.peer, rank, number) != gone]
                yield Step(sends, receives, step.folds)

        broken = Algorithm(without, row.cost, row.parts, row.copies, parameters=row.parameters)
        with pytest.raises(ScheduleError):
            prove(bind(collective, name, broken, size))
