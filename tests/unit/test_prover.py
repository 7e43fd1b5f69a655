"""All algorithms are right for all sizes, and cost what the catalogue says. Wrong ones: `test_refusal.py`."""

import os

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, Fold, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.prover import prove
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
