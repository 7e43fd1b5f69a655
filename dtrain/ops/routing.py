"""Ops of a mixture of experts: rows that go to experts, one product per expert, rows that come back.

    x (N, C) ── embedding(x, tokens) ──► rows (R, C), sorted by expert     one row per (token, expert) that was chosen
    rows     ── grouped_linear ──► ── … ──► rows (R, C)                    a contiguous slice of the rows per expert
    rows     ── combine_rows(rows, gates) ──► y (N, C)                     y[token] += gate * row

Sorting first makes each expert ONE product on contiguous rows, whatever the experts' shares, with no padding.
Reference: Gale et al., MegaBlocks, arXiv:2211.15841 (dropless, grouped products).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dtrain import kernels
from dtrain.arrays import Array
from dtrain.op import ITSELF, Op, Shape
from dtrain.ops.common import contiguous, fresh, matmul, total


def _groups(counts: Array) -> Iterator[tuple[int, slice]]:
    """(group, its rows), one after the other."""
    stop = 0
    for group, count in enumerate(counts.tolist()):
        start, stop = stop, stop + count
        yield group, slice(start, stop)


def _grouped_forward(x: Array, weight: Array, counts: Array) -> tuple[Array, Any]:
    """X (R, I) of which the first counts[0] rows meet weight[0], and so on; weight (E, O, I) -> (R, O)."""
    if weight.ndim != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError("x (R, I) needs a weight (E, O, I)")
    if counts.shape != weight.shape[:1] or counts.sum() != len(x):
        raise ValueError("counts needs a number of rows per expert, together all rows")
    x = contiguous(x)
    y = fresh(x, (len(x), weight.shape[1]))
    for group, part in _groups(counts):
        if part.start < part.stop:
            matmul(x[part], weight[group].T, y[part])
    return y, (x, weight)


def _grouped_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    (x, weight), counts, (needs_x, needs_weight) = node.saved, node.attributes["counts"], node.needs
    g, dx, dweight = contiguous(g), None, None
    if needs_x:
        dx = fresh(g, x.shape)
        for group, part in _groups(counts):
            if part.start < part.stop:
                matmul(g[part], weight[group], dx[part])
    if needs_weight:
        dweight = node.into(1)
        if dweight is None:
            dweight = fresh(g, weight.shape)
        for group, part in _groups(counts):
            if part.start < part.stop:
                matmul(g[part].T, x[part], dweight[group])
            else:
                dweight[group] = 0
    return dx, dweight


def _grouped_jvp(inputs: Any, tangents: Any, output: Any, counts: Array) -> Any:
    (x, weight), (dx, dweight) = inputs, tangents
    return dx.through(GROUPED_LINEAR, weight, counts=counts) + x.through(GROUPED_LINEAR, dweight, counts=counts)


def _grouped_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return 2 * output[0] * output[1] * inputs[0][1]


GROUPED_LINEAR = Op("grouped_linear", _grouped_forward, _grouped_vjp, _grouped_jvp, _grouped_flops, splits=True)


def _combine_forward(rows: Array, gates: Array, tokens: Array, size: int) -> tuple[Array, Any]:
    """Rows (R, C), gates (R,), tokens (R,) in [0, size) -> (size, C); a token without rows is 0."""
    if rows.ndim != 2 or gates.shape != rows.shape[:1] or tokens.shape != rows.shape[:1]:
        raise ValueError("rows (R, C) need a gate and a token each, (R,)")
    return kernels.of(rows).embedding_vjp(rows * gates[:, None], tokens, size), (rows, gates)


def _combine_vjp(node: Any, g: Array) -> tuple[Array | None, ...]:
    rows, gates = node.saved
    back = kernels.of(g).embedding(contiguous(g), node.attributes["tokens"])
    dgates = total(back * rows, -1) if node.needs[1] else None
    return back * gates[:, None] if node.needs[0] else None, dgates


def _combine_jvp(inputs: Any, tangents: Any, output: Any, **attributes: Any) -> Any:
    (rows, gates), (drows, dgates) = inputs, tangents
    return drows.through(COMBINE_ROWS, gates, **attributes) + rows.through(COMBINE_ROWS, dgates, **attributes)


def _combine_flops(inputs: tuple[Shape, ...], output: Shape, attributes: dict[str, Any]) -> int:
    return 2 * math.prod(inputs[0])


COMBINE_ROWS = Op("combine_rows", _combine_forward, _combine_vjp, _combine_jvp, _combine_flops)

# x[order], where every row is taken once; `back` is the order that undoes it.
REORDER_ROWS = Op(
    "reorder_rows",
    lambda x, order, back: (x[order], None),
    lambda node, g: (g[node.attributes["back"]],),
    ITSELF,
    lambda inputs, output, attributes: 0,
)
