"""Ulysses: two all_to_alls per attention, from a part of the tokens with all heads to all tokens of some heads.

    rank 0   tokens 0 1   heads a b c d            rank 0   tokens 0 1 2 3   heads a b        attention as ever,
    rank 1   tokens 2 3   heads a b c d   ──►      rank 1   tokens 0 1 2 3   heads c d        then the same way back

Sent per rank and attention: (size-1)/size of (H+2G)·D·t forth and H·D·t back, independent of the number of ranks per
token; but there can be no more ranks than heads. Whole groups of heads go to a rank, unevenly where that does not
divide; where there are fewer key/value heads than ranks they are sent to several, and their gradients added up.
Reference: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np

import dtrain.functional as F
from dtrain import conjugate
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import cut
from dtrain.errors import UserError
from dtrain.op import Op
from dtrain.strategies.context.places import Runs, count
from dtrain.tensor import Tensor, apply


def copies(heads: int, kv_heads: int, size: int) -> int:
    """On how many ranks each key/value head must be, so that every rank has one with whole groups of query heads."""
    shared = heads // kv_heads
    return next((n for n in range(1, shared + 1) if shared % n == 0 and kv_heads * n >= size), 0)


def check(heads: int, kv_heads: int, size: int) -> None:
    """UserError where some rank would have no head."""
    if not copies(heads, kv_heads, size):
        raise UserError(
            f"parallel.cp: {size} with parallel.context: ulysses shares out {heads} heads (per tp rank); "
            f"allowed: 1 to {heads}, or context: ring"
        )


def attention(
    qkv: Tensor,
    comm: Communicator,
    heads: int,
    kv_heads: int,
    runs: tuple[Runs, ...],
    causal: bool,
    scale: float,
    rotary: tuple[Array, Array] | None,
) -> Tensor:
    """My tokens' (B, t, [q heads | k heads | v heads]) -> (B, t, all heads), attending to the tokens of all ranks.

    runs: which tokens each rank has, one run each; rotary: cosines and sines (T, D/2) of all tokens.
    """
    width = qkv.shape[-1] // (heads + 2 * kv_heads)
    groups = copies(heads, kv_heads, comm.size) * kv_heads
    each, per_group = cut(groups, comm.size), heads // groups
    order = _order(heads, kv_heads, groups, each)
    tokens = [count(of_rank) for of_rank in runs]
    forth = [(per_group + 2) * number * width for number in each]
    back = [per_group * number * width for number in each]
    x = apply(ARRANGE, qkv, order=order, number=heads + 2 * kv_heads)
    x = apply(conjugate.ALL_TO_ALL, x, comm=comm, dims=(2, 1), lengths=(forth, tokens))
    own = each[comm.rank]
    y = F.packed_attention(x, own * per_group, own, causal=causal, scale=scale, rotary=rotary)
    return apply(conjugate.ALL_TO_ALL, y, comm=comm, dims=(1, 2), lengths=(tokens, back))


def _order(heads: int, kv_heads: int, groups: int, each: list[int]) -> Array:
    """The heads of [q | k | v], such that those of a rank stand together as [q | k | v] of its own."""
    order: list[int] = []
    per_group, repeats = heads // groups, groups // kv_heads
    for start, stop in pairwise((0, *accumulate(each))):
        order += range(start * per_group, stop * per_group)
        order += [heads + group // repeats for group in range(start, stop)]
        order += [heads + kv_heads + group // repeats for group in range(start, stop)]
    return np.array(order)


def _arranged(x: Array, order: Array, number: int) -> tuple[Array, Any]:
    by_head = x.reshape(*x.shape[:2], number, x.shape[2] // number)
    return by_head[:, :, order].reshape(*x.shape[:2], -1), None


def _arranged_vjp(node: Any, g: Array) -> tuple[Array]:
    order, shape = node.attributes["order"], node.shapes[0]
    gradient = np.zeros_like(g, shape=(*shape[:2], node.attributes["number"], shape[2] // node.attributes["number"]))
    by_head = g.reshape(*shape[:2], len(order), gradient.shape[3])
    for place, head in enumerate(order):
        gradient[:, :, head] += by_head[:, :, place]
    return (gradient.reshape(shape),)


ARRANGE = Op("arrange_heads", _arranged, _arranged_vjp, flops=lambda inputs, output, attributes: 0)
