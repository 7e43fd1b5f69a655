"""Ring attention: every rank has the queries of its tokens; keys and values go round.

    step 0    rank 0: q₀ kv₀     rank 1: q₁ kv₁     rank 2: q₂ kv₂          kv ─► the next rank, while this one computes
    step 1            q₀ kv₂             q₁ kv₀             q₂ kv₁
    step 2            q₀ kv₁             q₁ kv₂             q₂ kv₀          size - 1 exchanges

Each step attends to one block; `merge` weighs the results by their logsumexp, so the end is exact. Pairs of runs that
the mask hides are left out. The backward sends keys and values round again, and their gradients behind them: every rank
adds its contribution and sends on, and the last step brings the sum home.

Sent per rank, for B samples of t tokens on a rank, G key/value heads of width D: forward (size - 1) · 2BtGD elements,
backward twice that. Memory: own tokens, and two blocks of keys and values.
Invariant: what is added up in which order follows from the ranks alone; results have the same bits in every run.
Reference: Liu, Zaharia, Abbeel, "Ring attention with blockwise transformers", arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.collectives import Communicator, Work
from dtrain.collectives.dtypes import accumulator
from dtrain.op import Op, Shape
from dtrain.ops import blockwise
from dtrain.ops.common import contiguous, fresh
from dtrain.strategies.context.places import Runs, count, local
from dtrain.tensor import Tensor, apply

KEYS, GRADIENTS = 1, 2  # tags


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

    runs: which tokens each rank has; rotary: cosines and sines (t, D/2) of my tokens.
    """
    attributes = {"heads": heads, "kv_heads": kv_heads, "runs": runs, "causal": causal, "scale": scale}
    return apply(RING_ATTENTION, qkv, comm=comm, rotary=rotary, **attributes)


def _forward(qkv: Array, comm: Communicator, heads: int, kv_heads: int, rotary: Any, **how: Any) -> tuple[Array, Any]:
    packed = _grouped(contiguous(qkv), heads, kv_heads)
    qk, v = packed[:, :, : heads + kv_heads], packed[:, :, heads + kv_heads :]
    if rotary is not None:
        qk = kernels.of(qkv).rotary(qk, *rotary)
    q = qk[:, :, :heads]
    wide = accumulator(qkv.dtype)
    out = np.zeros_like(qkv, wide, shape=q.shape)
    logsumexp = np.full_like(out, -np.inf, shape=(q.shape[0], heads, q.shape[1]))
    for source, kv in _round(comm, _together(qk[:, :, heads:], v), how["runs"]):
        for rows, keys, offset in _pairs(how["runs"], comm.rank, source, how["causal"]):
            k, values = kv[:, keys, :kv_heads], kv[:, keys, kv_heads:]
            blockwise.merge(
                out[:, rows], logsumexp[:, :, rows], *blockwise.block(q[:, rows], k, values, offset, how["scale"])
            )
    out = out.astype(qkv.dtype, copy=False)
    return out.reshape(*qkv.shape[:2], heads * q.shape[3]), (qk, v, out, logsumexp)


def _vjp(node: Any, g: Array) -> tuple[Array]:
    qk, v, out, logsumexp = node.saved
    a = node.attributes
    comm, heads, kv_heads, runs, scale = (a[name] for name in ("comm", "heads", "kv_heads", "runs", "scale"))
    g = contiguous(g).reshape(out.shape)
    wide = accumulator(g.dtype)
    mine = {
        rows.start: [contiguous(x) for x in (g[:, rows], out[:, rows], logsumexp[:, :, rows])]
        for rows, _ in local(runs[comm.rank])
    }
    dq = np.zeros_like(g, wide, shape=out.shape)
    own, sending, coming = None, None, None
    for source, kv in _round(comm, _together(qk[:, :, heads:], v), runs):
        dkv = np.zeros_like(kv, wide)
        for rows, keys, offset in _pairs(runs, comm.rank, source, a["causal"]):
            gradient, result, lse = mine[rows.start]
            k, values = kv[:, keys, :kv_heads], kv[:, keys, kv_heads:]
            q = qk[:, rows, :heads]
            one, dk, dv = blockwise.block_vjp(gradient, q, k, values, result, lse, offset, scale)
            dq[:, rows] += one
            dkv[:, keys, :kv_heads] += dk
            dkv[:, keys, kv_heads:] += dv
        if own is None:
            own = dkv
            continue
        if coming is not None:  # what the ranks before me found for the same keys
            dkv += coming.wait()
        sending, coming = _pass_on(comm, dkv, sending, np.empty_like(dkv, shape=_shape(dkv, runs[source - 1])))
    assert own is not None
    if coming is not None and sending is not None:
        own += coming.wait()
        sending.wait()
    return (_packed(node, dq, own),)


def _round(comm: Communicator, kv: Array, runs: tuple[Runs, ...]) -> Iterator[tuple[int, Array]]:
    """The keys and values of all ranks with the rank they are of, mine first; the next ones travel meanwhile."""
    sending = coming = None
    for step in range(comm.size):
        source = (comm.rank - step) % comm.size
        if step < comm.size - 1:
            room = np.empty_like(kv, shape=_shape(kv, runs[source - 1]))
            sending, coming = _pass_on(comm, kv, None, room, KEYS)
        yield source, kv
        if step < comm.size - 1:
            assert coming is not None and sending is not None
            kv = coming.wait()
            sending.wait()


def _pass_on(
    comm: Communicator, array: Array, before: Work | None, room: Array, tag: int = GRADIENTS
) -> tuple[Work, Work]:
    """Start to send to the next rank and to receive from the one before, after the last send is through."""
    if before is not None:
        before.wait()
    coming = comm.recv_async(room, (comm.rank - 1) % comm.size, tag)
    return comm.send_async(array, (comm.rank + 1) % comm.size, tag), coming


def _pairs(runs: tuple[Runs, ...], rank: int, source: int, causal: bool) -> Iterator[tuple[slice, slice, int | None]]:
    """(rows of my queries, keys of rank `source`, offset of the mask) where not all is masked."""
    for rows, first in local(runs[rank]):
        for keys, start in local(runs[source]):
            length, number = rows.stop - rows.start, keys.stop - keys.start
            offset = first - start if causal else None
            if blockwise.sees(length, number, offset):
                yield rows, keys, None if offset is not None and offset >= number - 1 else offset


def _grouped(packed: Array, heads: int, kv_heads: int) -> Array:
    """(B, t, (H+2G)·D) -> (B, t, H+2G, D), a view."""
    return packed.reshape(*packed.shape[:2], heads + 2 * kv_heads, packed.shape[-1] // (heads + 2 * kv_heads))


def _together(k: Array, v: Array) -> Array:
    """Two times (B, t, G, D) -> (B, t, 2G, D): one message."""
    return np.concatenate((k, v), axis=2)


def _shape(kv: Array, runs: Runs) -> Shape:
    return kv.shape[0], count(runs), kv.shape[2], kv.shape[3]


def _packed(node: Any, dq: Array, dkv: Array) -> Array:
    """The gradient of the projection's output: [dq | dk | dv], the rotation undone."""
    a, heads = node.attributes, node.attributes["heads"]
    dqkv = fresh(dq, node.shapes[0]) if dq.dtype == node.dtype else np.empty_like(dq, node.dtype, shape=node.shapes[0])
    parts = _grouped(dqkv, heads, a["kv_heads"])
    turned, rest = parts[:, :, : heads + a["kv_heads"]], parts[:, :, heads + a["kv_heads"] :]
    turned[:, :, :heads], turned[:, :, heads:], rest[...] = dq, dkv[:, :, : a["kv_heads"]], dkv[:, :, a["kv_heads"] :]
    if a["rotary"] is not None:
        cos, sin = a["rotary"]
        turned[...] = kernels.of(dqkv).rotary(turned, cos, sin, inverse=True)
    return dqkv


def _flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    """Of my queries with the keys of all, also when causal (the usual convention)."""
    batch, length, width = output
    keys, heads = sum(map(count, attributes["runs"])), attributes["heads"]
    flops: int = batch * length * keys * (4 * width + 13 * heads)
    if attributes["rotary"] is not None:
        flops += 3 * batch * length * (width // heads) * (heads + attributes["kv_heads"])
    return flops


RING_ATTENTION = Op("ring_attention", _forward, _vjp, flops=_flops)
