"""All algorithms are right for all sizes, cost what the catalogue says, and wrong schedules are refused at the spot."""

import os

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, Algorithm, Fold, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.ring import all_reduce as ring
from dtrain.collectives.schedules.schedule import custom
from dtrain.collectives.schedules.tree import number_in_tree, parent

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows]
# 2^k and its neighbours; DTRAIN_PROVE_TO=1025 proves all of them up to there, in a quarter of a minute more.
PROVE_TO = int(os.environ.get("DTRAIN_PROVE_TO", 257))
LARGE = [size for k in range(6, 14) for size in (2**k - 1, 2**k, 2**k + 1) if size <= PROVE_TO or size == 1024]


def check(collective, name, size, **parameters):
    row = ALGORITHMS[collective][name]
    if not row.sizes(size):
        return None
    plan = schedule(collective, name, size, **parameters)
    proof = prove(plan)
    assert proof.steps == plan.cost.alpha
    assert proof.equal_bits
    assert proof.ordered or not row.ordered
    return proof


@pytest.mark.parametrize("collective, name", ROWS)
def test_every_algorithm_for_every_size(collective, name):
    row = ALGORITHMS[collective][name]
    for size in sorted({*range(1, 65), *LARGE}):
        if row.regular or "DTRAIN_OWN" not in os.environ or size < 65:  # one's own, rank by rank: a minute
            check(collective, name, size)


@pytest.mark.parametrize(
    "name, size",
    [
        ("recursive_doubling", 1023),
        ("rabenseifner", 513),
        ("tree", 1023),
        ("tree", 1025),
        ("circulant", 1025),
        ("nhr", 1023),
    ],
)
def test_up_to_a_thousand_ranks(name, size):
    check("all_reduce", name, size)


@pytest.mark.parametrize(
    "collective, name", [row for row in ROWS if row[0] in ("broadcast", "reduce", "gather", "scatter")]
)
def test_every_root(collective, name):
    for size in range(1, 10):
        for root in range(size):
            plan = schedule(collective, name, size, root=root)
            assert prove(plan).steps == plan.cost.alpha


@pytest.mark.parametrize("segments", [1, 3, 16])
def test_segments(segments):
    for collective, name in ROWS:
        if "segments" in ALGORITHMS[collective][name].parameters:
            for size in (1, 2, 3, 5, 8, 13, 16):
                check(collective, name, size, segments=segments)


def test_nodes_of_all_sizes():
    for size in range(1, 25):
        for local in range(1, size + 1):
            if size % local == 0:
                check("all_reduce", "hierarchical", size, local=local)


# What the course says: C13 to C16


def test_ring_counts():
    proof = check("all_reduce", "ring", 8)
    assert proof.steps == 14
    np.testing.assert_allclose(proof.sent, 1.75)
    for collective, name in (("reduce_scatter", "ring"), ("all_gather", "ring")):
        proof = check(collective, name, 8)
        assert proof.steps == 7
        np.testing.assert_allclose(proof.sent, 7 / 8)


def test_halving_and_doubling_counts():
    proof = check("all_reduce", "rabenseifner", 8)
    assert proof.steps == 6
    np.testing.assert_allclose(proof.sent, 1.75)
    for size, folded in ((5, 1), (6, 2), (7, 3)):
        proof = check("all_reduce", "rabenseifner", size)
        assert proof.steps == 2 * 2 + 2
        first = [rank for rank in range(size) if schedule("all_reduce", "rabenseifner", size).of(rank)[0].sends]
        assert first == list(range(0, 2 * folded, 2))


def test_pairwise_mesh_and_tree_counts():
    proof = check("all_to_all", "pairwise", 8)
    assert proof.steps == 7
    np.testing.assert_allclose(proof.sent, 7 / 8)
    steps = schedule("all_to_all", "pairwise", 8).of(3)
    assert [(step.sends[0].peer, step.receives[0].peer) for step in steps] == [
        ((3 + k) % 8, (3 - k) % 8) for k in range(1, 8)
    ]
    assert check("all_to_all", "direct", 8).steps == 1
    for size in range(1, 40):
        assert check("broadcast", "binomial", size).steps == int(np.ceil(np.log2(size)))


def test_what_is_added_is_what_must_be():
    for name, row in ALGORITHMS["all_reduce"].items():
        if name != "gather_reduce":
            plan = schedule("all_reduce", name, 8)
            total = prove(plan).added.sum()
            least = 7.0  # every chunk needs p - 1 additions
            assert total == pytest.approx(24.0 if name == "recursive_doubling" else least), name
            assert row is plan.algorithm


def test_no_rank_is_interior_in_both_trees():
    for size in [*range(1, 200), 1023, 1024, 1025, 4096]:
        interior = [set(), set()]
        for tree in (0, 1):
            above = {parent(number, size) for number in range(1, size + 1)}
            assert above - {None} <= set(range(1, size + 1))
            interior[tree] = {rank for rank in range(size) if number_in_tree(rank, size, tree) in above}
        assert not interior[0] & interior[1]


def test_bits_that_differ_are_found():
    def own_value_first(rank, size):
        """All vectors to all; everyone adds its own first, then the others in its own order."""
        yield Step(folds=[Fold(1 + rank, [0])])
        for k in range(size - 1):
            left = (rank - k - 1) % size
            yield Step([Send((rank + 1) % size, [1 + (rank - k) % size])], [Receive((rank - 1) % size, [1 + left])])
        yield Step(folds=[Fold(0, [1 + (rank + k) % size for k in range(size)])])

    proof = prove(bind("all_reduce", "rotated", custom(own_value_first, parts=1, copies=4), 3))
    assert not proof.equal_bits and not proof.ordered
    assert prove(bind("all_reduce", "rotated", custom(own_value_first, parts=1, copies=3), 2)).equal_bits  # x+y = y+x


def test_order_that_is_lost_is_found():
    """(1 + (0 + 2)) + 3: only the sum in the middle is out of order."""

    def steps(rank, size, root):
        for source, target in ((0, 2), (1, 2), (2, 3)):
            sends = [Send(target, [0])] if rank == source else []
            yield Step(sends, [Receive(source, [0], reduce=True)] if rank == target else [])

    assert not prove(bind("reduce", "mine", custom(steps, parts=1), 4, root=3)).ordered
    assert not prove(schedule("all_reduce", "ring", 4)).ordered


# Wrong schedules


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


# A barrier's last messages may tell what is known; all_gather after scatter brings some blocks where they were before.
FRUGAL = [row for row in ROWS if row[0] != "barrier" and not row[1].startswith("scatter_")]


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
