"""The whole parameters of a model that is cut over ranks, on one of them: for what one process does with a model.

    rank 0   blocks of stage 0, slice 0 ──┐
    rank 1   blocks of stage 0, slice 1 ──┼─ gather ─► rank 0: every parameter in its global shape
    rank 2   blocks of stage 1, slice 0 ──┘

Rank 0 then holds what no rank holds in such a layout: only for models of which that is known to be no matter.
"""

from __future__ import annotations

import numpy as np

from dtrain.arrays import Array, named_dtype
from dtrain.collectives import Communicator
from dtrain.flat import FlatBuffers


def whole_parameters(flat: FlatBuffers, comm: Communicator) -> dict[str, Array]:
    """The parameters by name on rank 0 of `comm`, which has all ranks of the mesh; {} on the others. Collective."""
    blocks = [
        block
        for group in flat.groups
        if group.replicas()[0] == 0  # of those who own the same, one sends it
        for block in group.blocks(group.owned_data, group.owned)
    ]
    rows = [(b.name, b.array.dtype.name, b.start, b.array.shape, b.global_shape) for b in blocks]
    octets = [np.ascontiguousarray(b.array).reshape(-1).view(np.uint8) for b in blocks]
    described = comm.all_gather_object([rows, sum(part.size for part in octets)])
    everything = np.concatenate([np.zeros(0, np.uint8), *octets])
    gathered = comm.gather(everything, counts=[size for _, size in described])
    if gathered is None:
        return {}
    found: dict[str, Array] = {}
    at = 0
    for name, dtype, start, shape, whole in (row for held, _ in described for row in held):
        values = np.empty(shape, named_dtype(dtype))
        values.reshape(-1).view(np.uint8)[...] = gathered[at : at + values.nbytes]
        at += values.nbytes
        there = tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))
        found.setdefault(name, np.empty(whole, values.dtype))[there] = values
    return found
