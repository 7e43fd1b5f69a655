"""All algorithms, by collective: the function, its cost formula, and what it promises beyond the result.

One more algorithm is one function and one row; proof, simulation, drawing and tests find it here.
"""

from typing import Any

from dtrain.collectives.schedules import bruck, direct, doubling, halving, hierarchical, pipeline, ring, tree
from dtrain.collectives.schedules.schedule import Algorithm, Schedule, bind


def _size(size: int) -> int:
    return size


def _power(size: int) -> int:
    return halving.power_below(size)


def _segments(size: int, segments: int) -> int:
    return segments


def _all_pieces(size: int, local: int) -> int:
    return size


ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": Algorithm(ring.all_reduce, ring.all_reduce_cost, _size, regular=True),
        "segmented_ring": Algorithm(
            ring.segmented_all_reduce,
            ring.segmented_all_reduce_cost,
            lambda size, segments: size * segments,
            regular=True,
            parameters={"segments": 2},
        ),
        "recursive_doubling": Algorithm(doubling.all_reduce, doubling.all_reduce_cost, regular=True, ordered=True),
        "rabenseifner": Algorithm(halving.all_reduce, halving.all_reduce_cost, _power, regular=True, ordered=True),
        "rabenseifner_halves": Algorithm(
            halving.half_folded_all_reduce, halving.half_folded_all_reduce_cost, _power, regular=True, ordered=True
        ),
        "tree": Algorithm(tree.all_reduce, tree.all_reduce_cost, regular=True, ordered=True),
        "double_tree": Algorithm(
            tree.double_tree,
            tree.double_tree_cost,
            lambda size, segments: 2 * segments,
            regular=True,
            parameters={"segments": 4},
        ),
        "direct": Algorithm(direct.all_reduce, direct.all_reduce_cost, _size, regular=True, ordered=True),
        "circulant": Algorithm(bruck.circulant_all_reduce, bruck.circulant_all_reduce_cost, _size, regular=True),
        "nhr": Algorithm(bruck.nhr_all_reduce, bruck.circulant_all_reduce_cost, _size, regular=True),
        "gather_reduce": Algorithm(
            bruck.gather_reduce,
            bruck.gather_reduce_cost,
            copies=lambda size: size + 1,
            regular=True,
            ordered=True,
        ),
        "hierarchical": Algorithm(
            hierarchical.all_reduce,
            hierarchical.all_reduce_cost,
            _all_pieces,
            regular=True,
            parameters={"local": 0},
        ),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring.reduce_scatter, ring.reduce_scatter_cost, regular=True),
        "recursive_halving": Algorithm(halving.reduce_scatter, halving.reduce_scatter_cost, regular=True),
        "pairwise": Algorithm(direct.pairwise_reduce_scatter, direct.pairwise_reduce_scatter_cost, regular=True),
        "circulant": Algorithm(bruck.circulant_reduce_scatter, bruck.circulant_reduce_scatter_cost, regular=True),
        "nhr": Algorithm(bruck.nhr_reduce_scatter, bruck.circulant_reduce_scatter_cost, regular=True),
        "direct": Algorithm(direct.reduce_scatter, direct.reduce_scatter_cost, regular=True, ordered=True),
    },
    "all_gather": {
        "ring": Algorithm(ring.all_gather, ring.all_gather_cost, regular=True),
        "recursive_doubling": Algorithm(
            doubling.all_gather, doubling.all_gather_cost, regular=True, sizes=doubling.power_of_two
        ),
        "bruck": Algorithm(bruck.all_gather, doubling.all_gather_cost, regular=True),
        "nhr": Algorithm(bruck.nhr_all_gather, doubling.all_gather_cost, regular=True),
        "neighbour_exchange": Algorithm(
            ring.neighbour_exchange, ring.neighbour_exchange_cost, regular=True, sizes=ring.even
        ),
        "direct": Algorithm(direct.all_gather, direct.one_step_cost, regular=True),
    },
    "all_to_all": {
        "pairwise": Algorithm(direct.pairwise_all_to_all, direct.pairwise_all_to_all_cost, regular=True),
        "bruck": Algorithm(bruck.all_to_all, bruck.all_to_all_cost, regular=True),
        "direct": Algorithm(direct.all_to_all, direct.one_step_cost, regular=True),
    },
    "broadcast": {
        "binomial": Algorithm(tree.broadcast, tree.broadcast_cost, regular=True),
        "scatter_all_gather": Algorithm(
            pipeline.scatter_all_gather, pipeline.scatter_all_gather_cost, _size, regular=True
        ),
        "scatter_ring": Algorithm(pipeline.scatter_ring, pipeline.scatter_ring_cost, _size, regular=True),
        "chain": Algorithm(
            pipeline.chain_broadcast,
            pipeline.chain_broadcast_cost,
            _segments,
            regular=True,
            parameters={"segments": 8},
        ),
        "circulant": Algorithm(
            pipeline.circulant_broadcast,
            pipeline.circulant_broadcast_cost,
            _segments,
            regular=True,
            parameters={"segments": 8},
        ),
    },
    "reduce": {
        "binomial": Algorithm(tree.reduce, tree.reduce_cost, regular=True, ordered=True),
        "chain": Algorithm(
            pipeline.chain_reduce,
            pipeline.chain_reduce_cost,
            _segments,
            regular=True,
            ordered=True,
            parameters={"segments": 8},
        ),
    },
    "gather": {
        "binomial": Algorithm(tree.gather, tree.gather_cost, regular=True),
        "direct": Algorithm(direct.gather, direct.one_step_cost),
    },
    "scatter": {
        "binomial": Algorithm(tree.scatter, tree.gather_cost, regular=True),
        "direct": Algorithm(direct.scatter, direct.one_step_cost),
    },
    "scan": {
        "doubling": Algorithm(doubling.scan, doubling.scan_cost, regular=True, ordered=True),
        "chain": Algorithm(pipeline.chain_scan, pipeline.chain_scan_cost, regular=True, ordered=True),
    },
    "exscan": {
        "doubling": Algorithm(doubling.exscan, doubling.exscan_cost, copies=lambda size: 2, regular=True, ordered=True),
    },
    "barrier": {
        "dissemination": Algorithm(doubling.dissemination, doubling.dissemination_cost, regular=True),
    },
}


def schedule(collective: str, algorithm: str, size: int, root: int = 0, **parameters: Any) -> Schedule:
    """The schedule of a row of the catalogue; ValueError names what is allowed."""
    if collective not in ALGORITHMS:
        raise ValueError(f"collective={collective!r}: not a collective; allowed: {', '.join(ALGORITHMS)}")
    rows = ALGORITHMS[collective]
    if algorithm not in rows:
        raise ValueError(f"algorithm={algorithm!r}: not an algorithm of {collective}; allowed: {', '.join(rows)}")
    return bind(collective, algorithm, rows[algorithm], size, root, **parameters)
