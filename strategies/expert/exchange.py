"""Rows on their way to the ranks of their experts, and back.

    here, sorted by expert          there, by rank of origin         there, sorted by expert
    [e0 e0 e1 | e2 e3]  all_to_all  [e0 e0 e1 | e0 e1 e1]  reorder   [e0 e0 e0 | e1 e1 e1]   ── experts ──► and back

Invariant: what comes back stands where it stood, so the layer around it does not know that the rows were away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import spans
from dtrain.modules import Module
from dtrain.op import ITSELF, Op
from dtrain.ops.routing import REORDER_ROWS
from dtrain.tensor import Tensor, apply


def exchanged(x: Array, comm: Communicator, sent: Sequence[int], received: Sequence[int]) -> Array:
    """Rows (R, C), of which sent[i] in turn go to rank i -> those that came, received[i] from rank i in turn."""
    width = x.shape[1]
    flat = comm.all_to_all(
        np.ascontiguousarray(x).reshape(-1),
        counts=[width * number for number in sent],
        out_counts=[width * number for number in received],
    )
    return flat.reshape(sum(received), width)


def _backward(node: Any, g: Array) -> tuple[Array]:
    a = node.attributes
    return (exchanged(g, a["comm"], a["received"], a["sent"]),)


EXCHANGE_ROWS = Op("exchange_rows", lambda x, **a: (exchanged(x, **a), None), _backward, ITSELF, lambda *shapes: 0)


class Exchanged(Module):
    """Experts of which this rank has a block, `inner`."""

    def __init__(self, inner: Module, comm: Communicator) -> None:
        self.inner, self.comm, self.name = inner, comm, inner.name

    def forward(self, rows: Tensor, counts: Array) -> Tensor:
        """Rows (R, C), of which counts[e] in turn are expert e's -> (R, C). Collective over `ep`."""
        comm = self.comm
        everyone = comm.all_gather(counts.astype(np.int64)).reshape(comm.size, len(counts))  # (rank, expert)
        owners = [slice(*span) for span in spans(len(counts), comm.size)]  # the experts of each rank
        mine = everyone[:, owners[comm.rank]]
        sent = [int(counts[experts].sum()) for experts in owners]
        received = mine.sum(axis=1).tolist()
        order = np.argsort(np.repeat(np.tile(np.arange(mine.shape[1]), comm.size), mine.reshape(-1)), kind="stable")
        back = np.argsort(order, kind="stable")

        x = apply(EXCHANGE_ROWS, rows, comm=comm, sent=sent, received=received)
        x = apply(REORDER_ROWS, x, order=order, back=back)
        y = self.inner(x, mine.sum(axis=0))
        y = apply(REORDER_ROWS, y, order=back, back=order)
        return apply(EXCHANGE_ROWS, y, comm=comm, sent=received, received=sent)
