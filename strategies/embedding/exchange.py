"""The all_to_all of embedding parallelism: from sums of bags on their owners to vectors of samples on theirs.

    owner i has       one row for each bag with ids in its part, of all samples:     (table, sample) in order
    sends to rank j   the rows of the samples of j                                   one all_to_all, uneven
    rank j adds up    what came from owner 0, then 1, …, at [sample, table, columns of the owner]

The backward is the same picture from right to left: rank j picks what each owner gave, one all_to_all, and the owner
has the gradients in the order of its rows. A bag with ids on several owners gets the sum; its gradient goes to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.op import ITSELF, Op, elementwise
from dtrain.tensor import Tensor, apply


def exchange(
    sums: Tensor, comm: Communicator, mine: Array, arriving: Sequence[Array], columns: Sequence[tuple[int, int]]
) -> Tensor:
    """Sums (K, my columns) of the bags `mine` (B, T) that I have something of, by table -> my vectors (b, T, dim).

    arriving: for each owner the bags (b, T) of my samples that it has something of; columns: of each owner. All ranks
    have as many places for samples: B / size.
    """
    samples = np.nonzero(mine.T)[1]
    to = samples // (len(mine) // comm.size)
    order = np.argsort(to, kind="stable")
    counts = np.bincount(to, minlength=comm.size)
    places = [np.nonzero(bags.T)[::-1] for bags in arriving]  # (samples, tables), table by table
    return apply(
        EXCHANGE, sums, comm=comm, order=order, counts=counts, places=places, columns=columns, shape=arriving[0].shape
    )


def _forward(
    sums: Array,
    comm: Communicator,
    order: Array,
    counts: Array,
    places: Sequence[tuple[Array, Array]],
    columns: Sequence[tuple[int, int]],
    shape: tuple[int, int],
) -> tuple[Array, Any]:
    lengths = [len(samples) * (last - first) for (samples, _), (first, last) in zip(places, columns, strict=True)]
    width = sums.shape[1]
    arrived = comm.all_to_all(
        np.ascontiguousarray(sums[order]).reshape(-1), counts=(counts * width).tolist(), out_counts=lengths
    )
    vectors = np.zeros((*shape, max(last for _, last in columns)), sums.dtype)
    end = 0
    for (samples, tables), (first, last), length in zip(places, columns, lengths, strict=True):
        vectors[samples, tables, first:last] += arrived[end : end + length].reshape(len(samples), last - first)
        end += length
    return vectors, None


def _vjp(node: Any, g: Array) -> tuple[Array]:
    a, (rows, width) = node.attributes, node.shapes[0]
    parts = [
        g[samples, tables, first:last]
        for (samples, tables), (first, last) in zip(a["places"], a["columns"], strict=True)
    ]
    back = a["comm"].all_to_all(
        np.concatenate([part.reshape(-1) for part in parts]),
        counts=[part.size for part in parts],
        out_counts=(a["counts"] * width).tolist(),
    )
    gradient = np.empty((rows, width), g.dtype)
    gradient[a["order"]] = back.reshape(rows, width)
    return (gradient,)


EXCHANGE = Op("exchange_vectors", _forward, _vjp, ITSELF, elementwise(0))
