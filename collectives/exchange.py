"""Reductions by moving blocks and adding them here, in rank order: `exchange`.

    rank r receives block r of everybody,  adds them in the order 0 .. p-1,  and hands the result to everybody

           all_to_all             reduce_rows                   all_gather
    0: a0 a1 a2        0: a0 b0 c0  ->  a0+b0+c0        0: s0 s1 s2
    1: b0 b1 b2   ->   1: a1 b1 c1  ->  a1+b1+c1   ->   1: s0 s1 s2
    2: c0 c1 c2        2: a2 b2 c2  ->  a2+b2+c2        2: s0 s1 s2

It needs nothing but moved bytes, so it works for every dtype (float16, bfloat16, max of complex numbers) on every
transport. Cost for n bytes on p ranks: all_reduce 2(p-1)a + 2n(p-1)/p b + n(p-1)/p c, the volume of a ring; memory n
more. Invariant: one rank computes each element, the others copy it: equal bits everywhere.
"""

from collections.abc import Sequence

import numpy as np

from dtrain.collectives.dtypes import OPERATIONS, Array, cut, reduce_rows
from dtrain.collectives.transport import Transport


def reduce_scatter(transport: Transport, source: Array, target: Array, counts: Sequence[int], op: str) -> None:
    """Target (counts[rank],) = the sum over ranks of their block `rank` of source (sum(counts),)."""
    mine = counts[transport.rank]
    blocks = np.empty((transport.size, mine), source.dtype)
    transport.all_to_all(source, blocks.reshape(-1), counts, [mine] * transport.size)
    reduce_rows(OPERATIONS[op], list(blocks), target)


def all_reduce(transport: Transport, source: Array, target: Array, op: str) -> None:
    """Target (count,) = the sum over ranks of source (count,); target may be source."""
    counts = cut(len(source), transport.size)
    block = np.empty(counts[transport.rank], source.dtype)
    reduce_scatter(transport, source, block, counts, op)
    transport.all_gather(block, target, counts)


def reduce(transport: Transport, source: Array, target: Array | None, op: str, root: int) -> None:
    """Target (count,) on rank root = the sum over ranks of source (count,)."""
    counts = cut(len(source), transport.size)
    block = np.empty(counts[transport.rank], source.dtype)
    reduce_scatter(transport, source, block, counts, op)
    transport.gather(block, target, counts, root)
