"""The prover beside one written with Python's sets, on the algorithms as they are."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, schedule
from dtrain.collectives.schedules.proof import Proof
from dtrain.collectives.schedules.prover import Prover
from dtrain.collectives.schedules.specification import PROMISES, specification
from dtrain.collectives.schedules.turning import prove_turning
from tests.naive_prover import proven

ROWS = [(collective, name) for collective, rows in ALGORITHMS.items() for name in rows]
# Those that look alike from all ranks: proven from the view of one.
ALIKE = [
    *(("all_reduce", name) for name in ("ring", "segmented_ring", "direct", "circulant", "nhr")),
    *(("reduce_scatter", name) for name in ("ring", "pairwise", "circulant", "nhr", "direct")),
    *(("all_gather", name) for name in ("ring", "bruck", "nhr", "direct")),
    *(("all_to_all", name) for name in ("pairwise", "bruck", "direct")),
]


def assert_agree(proof: Proof, expected: SimpleNamespace, weight: float) -> None:
    assert (proof.steps, proof.messages) == (expected.steps, expected.messages)
    assert (proof.equal_bits, proof.ordered) == (expected.equal_bits, expected.ordered)
    for name in ("sent", "received", "added"):
        np.testing.assert_allclose(getattr(proof, name), np.array(getattr(expected, name)) * weight, rtol=1e-12)


@pytest.mark.parametrize("collective, name", ROWS)
def test_the_algorithms_as_they_are(collective, name):
    for size in range(1, 10):
        if ALGORITHMS[collective][name].sizes(size):
            plan = schedule(collective, name, size)
            expected, weight = proven(plan), plan.specification.weight
            for together in (1, 3, 64):
                assert_agree(Prover(plan, together).run(), expected, weight)
            fast = prove_turning(plan)
            known = (collective, name) in ALIKE and size > 2
            assert (fast is not None) == known or "DTRAIN_OWN" in os.environ
            if fast is not None:
                assert_agree(fast, expected, weight)


@pytest.mark.parametrize("collective", PROMISES)
def test_promises_that_turn(collective):
    """`turns` says that what rank r has and wants is what rank 0 has and wants, all ranks and blocks r further."""
    for size in range(1, 7):
        for parts in (1, size, 2 * size):
            if PROMISES[collective].pairs and parts > 1:
                continue
            spec = specification(collective, size, parts)

            def turned(chunk, rank, spec=spec, size=size):
                block, rest = divmod(chunk, spec.parts // size)
                return (block + rank) % size * (spec.parts // size) + (
                    (rest + rank) % size if spec.promise.pairs else rest
                )

            for rank in range(size if spec.turns else 0):
                for promise in (spec.given, spec.wanted):
                    assert {turned(chunk, rank) for chunk in promise(0)} == set(promise(rank))
                assert {(r + rank) % size for r in spec.contributors(0)} == set(spec.contributors(rank))
    assert spec.turns == (collective in {collective for collective, _ in ALIKE})
