"""On uniform links the simulated time is the catalogue's formula; on others it follows links, levels and lengths."""

import time

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.simulator import Cluster, Level, cluster_from, simulate, uniform

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows]
ALPHA, BETA, GAMMA = 1.7e-6, 0.13e-9, 0.05e-9
SIZES = np.array([0.0, 3e3, 1e6, 1e9])


@pytest.mark.parametrize("collective, name", ROWS)
def test_formula_is_simulated_time(collective, name):
    for size in (*range(1, 18), 24, 31, 32, 33, 48, 63, 64):
        if ALGORITHMS[collective][name].sizes(size):
            plan = schedule(collective, name, size)
            found = simulate(plan, uniform(ALPHA, BETA, GAMMA), SIZES)
            formula = [plan.cost.seconds(nbytes, ALPHA, BETA, GAMMA) for nbytes in SIZES]
            if name == "double_tree":  # its γ is an upper bound
                assert (found <= np.array(formula) * (1 + 1e-9)).all(), size
                found = simulate(plan, uniform(ALPHA, BETA), SIZES)
                formula = [plan.cost.seconds(nbytes, ALPHA, BETA, 0) for nbytes in SIZES]
            np.testing.assert_allclose(found, formula, rtol=1e-9, err_msg=f"{size} ranks")


def test_catalogue_by_hand():
    """Some formulas as the literature writes them, so that table and simulator cannot be wrong together."""
    n, lg = 1e6, np.log2

    def seconds(collective, name, size, **parameters):
        return simulate(schedule(collective, name, size, **parameters), uniform(ALPHA, BETA, GAMMA), [n])[0]

    for p in (2, 4, 8, 64):
        share = n * (p - 1) / p
        expected = 2 * lg(p) * ALPHA + 2 * share * BETA + share * GAMMA
        assert seconds("all_reduce", "rabenseifner", p) == pytest.approx(expected)
        assert seconds("broadcast", "binomial", p) == pytest.approx(lg(p) * (ALPHA + n * BETA))
        assert seconds("all_to_all", "bruck", p) == pytest.approx(lg(p) * ALPHA + n / 2 * lg(p) * BETA)
    for p in (3, 7, 48):
        share, power = n * (p - 1) / p, 2 ** int(lg(p))
        assert seconds("all_reduce", "ring", p) == pytest.approx(2 * (p - 1) * ALPHA + share * (2 * BETA + GAMMA))
        expected = (2 * int(lg(p)) + 2) * ALPHA + n * (2 * (power - 1) / power + 2) * BETA
        expected += n * (1 + (power - 1) / power) * GAMMA
        assert seconds("all_reduce", "rabenseifner", p) == pytest.approx(expected)
        assert seconds("broadcast", "circulant", p, segments=10) == pytest.approx(
            (9 + np.ceil(lg(p))) * (ALPHA + n / 10 * BETA)
        )


def test_links_are_shared():
    plan = schedule("all_gather", "direct", 9)
    for links, times in ((0, 1), (8, 1), (4, 2), (1, 8)):
        found = simulate(plan, uniform(ALPHA, BETA, links=links), [9e6])[0]
        assert found == pytest.approx(ALPHA + times * 1e6 * BETA)
        for collective in ("scatter", "gather"):  # the root's alone are many, out of it or into it
            found = simulate(schedule(collective, "direct", 9), uniform(ALPHA, BETA, links=links), [9e6])[0]
            assert found == pytest.approx(ALPHA + times * 1e6 * BETA)


def test_double_tree_reaches_the_bandwidth_of_one_link():
    """2nβ for long vectors cut finely, though inner ranks have three neighbours in one tree and one in the other."""
    n = 1e9
    found = simulate(schedule("all_reduce", "double_tree", 31, segments=500), uniform(0, BETA, links=1), [n])[0]
    assert 1.9 * n * BETA < found < 2.1 * n * BETA


def test_levels():
    inside, between = Level("node", 1e-6, 1e-10, ranks=4), Level("network", 10e-6, 3e-10, links=2)
    cluster = Cluster((inside, between))
    n = 8e6
    # Exactly one pair over the network: 3 -> 4.
    plan = schedule("broadcast", "chain", 8, segments=1)
    assert simulate(plan, cluster, [n])[0] == pytest.approx(6 * (1e-6 + n * 1e-10) + 10e-6 + n * 3e-10)
    # Two levels by their formula: 4 lanes share 2 NICs, which makes β twice as long.
    found = simulate(schedule("all_reduce", "hierarchical", 8, local=4), cluster, [n])[0]
    expected = 2 * 3 * (1e-6 + n / 4 * 1e-10) + 2 * 1 * (10e-6 + n / 8 * 2 * 3e-10)
    assert found == pytest.approx(expected)


def test_ranks_wait_for_one_another():
    """A late rank delays those who talk to it, and nobody else."""

    def steps(rank, size, root):
        yield Step([Send(1, [0])]) if rank == 0 else Step(receives=[Receive(0, [0])]) if rank == 1 else Step()
        yield Step([Send(3, [0])]) if rank == 2 else Step(receives=[Receive(2, [0])]) if rank == 3 else Step()

    plan = bind("broadcast", "pairs", steps, 4)
    assert simulate(plan, uniform(1.0, 0), [1])[0] == 1.0  # both pairs at the same time, though in different steps


def test_uneven_blocks():
    rng = np.random.default_rng(5)
    for size in (2, 5, 8):
        counts = rng.integers(0, 1000, (size, size)).astype(float)
        plan = schedule("all_to_all", "pairwise", size)
        weights = plan.specification.lengths(counts.astype(int)) / 1.0
        found = simulate(plan, uniform(0, BETA), [1.0], weights)[0]
        longest = sum(max(counts[i, (i + k) % size] for i in range(size)) for k in range(1, size))
        heaviest = max(counts[i].sum() - counts[i, i] for i in range(size))
        assert heaviest * BETA * (1 - 1e-12) <= found <= longest * BETA * (1 + 1e-12)
    even = np.full((4, 4), 10)
    plan = schedule("all_to_all", "bruck", 4)
    weights = plan.specification.lengths(even) / 40
    np.testing.assert_allclose(
        simulate(plan, uniform(ALPHA, BETA), SIZES, weights), simulate(plan, uniform(ALPHA, BETA), SIZES)
    )


def test_repeated_steps_are_skipped_rightly():
    """Shortcut against the plain event loop, on a cluster where the clocks drift apart first."""
    cluster = Cluster((Level("node", 1e-6, 1e-10, ranks=3), Level("network", 5e-6, 2e-10, links=1)), GAMMA)
    plan = schedule("all_reduce", "ring", 12)
    clock = np.zeros(12)
    for k in range(22):
        start = clock.copy()
        for rank in range(12):
            left = (rank - 1) % 12
            far = rank // 3 != left // 3
            end = max(start[rank], start[left]) + (5e-6 + 1e6 / 12 * 2e-10 if far else 1e-6 + 1e6 / 12 * 1e-10)
            clock[rank], clock[left] = max(clock[rank], end), max(clock[left], end)
        clock += GAMMA * 1e6 / 12 * (k < 11)
    assert simulate(plan, cluster, [1e6])[0] == pytest.approx(clock.max(), rel=1e-9)


def test_thousands_of_ranks():
    start = time.process_time()
    plan = schedule("all_reduce", "ring", 4096)
    found = simulate(plan, uniform(ALPHA, BETA, GAMMA), SIZES)
    np.testing.assert_allclose(found, [plan.cost.seconds(n, ALPHA, BETA, GAMMA) for n in SIZES], rtol=1e-6)
    assert time.process_time() - start < 30


def test_cluster_from_yaml():
    text = {"name": "x", "gamma": "1e-10", "levels": [{"name": "node", "ranks": 2, "alpha": "1e-6", "beta": 0}]}
    assert cluster_from(text) == Cluster((Level("node", 1e-6, 0.0, 2),), 1e-10, "x")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gama": 1}, "gama: not a key; allowed: gamma, levels, name"),
        ({"levels": "node"}, "levels: must be a list"),
        ({"levels": [3]}, r"levels\[0\]: must have the keys"),
        ({"levels": []}, "levels: at least one"),
        ({"levels": [{"name": "a", "alpha": 1}]}, r"levels\[0\].beta: missing"),
        ({"levels": [{"name": "a", "alpha": 1, "beta": 1, "nics": 2}]}, r"levels\[0\].nics: not a key"),
        ({"levels": [{"name": "a", "alpha": -1, "beta": 1}]}, r"levels\[0\].alpha=-1: must be a number from 0"),
        ({"levels": [{"name": "a", "alpha": 1, "beta": 1, "ranks": 1.5}]}, r"ranks=1.5: must be a whole number"),
        ({"levels": [{"name": "a", "alpha": 1, "beta": 1, "links": True}]}, "links=True: must be a whole number"),
        ({"levels": [{"name": "a", "alpha": 1, "beta": 1, "links": float("inf")}]}, "links=inf: must be"),
        ({"levels": [{"name": "a", "alpha": 1, "beta": 1}] * 2}, r"levels\[0\].ranks=0: only the last level"),
        (
            {"levels": [{"name": "a", "alpha": 1, "beta": 1, "ranks": r} for r in (4, 6)]},
            r"levels\[1\].ranks=6: must be a multiple of 4",
        ),
    ],
)
def test_mistakes_in_a_cluster(change, message):
    description = {"levels": [{"name": "a", "alpha": 1, "beta": 1}], **change}
    with pytest.raises(ValueError, match=message):
        cluster_from(description)


def test_too_small_a_cluster():
    cluster = Cluster((Level("node", 1, 1, ranks=4),))
    with pytest.raises(ValueError, match="has 4 ranks, 5 are asked for"):
        simulate(schedule("all_reduce", "ring", 5), cluster, [1])


def test_what_is_simulated_is_right():
    assert prove(schedule("all_reduce", "hierarchical", 8, local=4)).equal_bits
