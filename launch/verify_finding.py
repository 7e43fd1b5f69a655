"""Where a layout began to differ from one process: the first block whose output is another one, or what came after it.

    forward of step 1 │ a block, by the sums of its output (`probed`) │ loss │ gradients, from the end │ norm │ update

A mistake spreads to all that follows; what comes first in this order, and is wrong, is where to look.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dtrain.arrays import Array
from dtrain.launch.verify_reference import Reference
from dtrain.trainer import Trainer

if TYPE_CHECKING:
    from dtrain.launch.verify import Row


def diverged(trainer: Trainer, sums: dict[str, Array], reference: Reference | None, relative: float) -> str | None:
    """The first block, in forward order, from which something else came than in the reference. Collective."""
    mesh = trainer.mesh
    mine = {name: each.tolist() for name, each in sums.items()}
    inner = {axis: mesh.coordinates[axis] for axis in ("tp", "cp")}  # ranks that may have parts of the same tokens
    everyone = mesh.comm.all_gather_object([mine, [*inner.values()]])
    first = None
    if reference is not None:
        for name, expected in reference.sums.items():
            places: dict[tuple[int, ...], Array] = {}
            for others, place in everyone:
                if name in others:
                    places[tuple(place)] = places.get(tuple(place), np.zeros(3)) + others[name]
            whole = _whole(places, float(expected[2]))
            root = math.sqrt(expected[2] * expected[1])
            limits = relative * np.array([root, expected[1], 0])
            if not whole or not all((np.abs(each - expected) <= limits).all() for each in whole):
                first = name
                break
    return mesh.comm.broadcast_object(first)  # type: ignore[no-any-return]


def _whole(places: dict[tuple[int, ...], Array], elements: float) -> list[Array]:
    """The sums of all copies of an output, from those by place (tp, cp), along which it may be cut or the same."""
    for cut in ((), (0,), (1,), (0, 1)):
        copies: dict[tuple[int, ...], Array] = {}
        for place, sums in places.items():
            copy = tuple(coordinate for axis, coordinate in enumerate(place) if axis not in cut)
            copies[copy] = copies.get(copy, np.zeros(3)) + sums
        if all(sums[2] == elements for sums in copies.values()):
            return list(copies.values())
    return []


def finding(rows: list[Row], block: str | None, order: list[str]) -> str | None:
    """Where it began, in words; None where all rows are right. block: see `diverged`; order: of tensors, forward."""
    wrong = {kind: [row.name for row in rows if row.kind == kind and not row.right] for kind in {r.kind for r in rows}}
    loss = wrong["loss"]
    gradient = sorted(wrong["gradient 1"], key=order.index)
    if block is not None:
        return f"forward of step 1: {block} is the first that gives something else"
    if "step 1" in loss:
        return "forward of step 1: all blocks are right, the loss is not: the model's exit, or who counts which targets"
    if gradient:
        first, last = (name.rpartition(".")[0] for name in (gradient[0], gradient[-1]))
        span = first if first == last else f"{first} is the first in forward order, {last} the last"
        where = "" if first == last else "; a backward comes from the end: look at the last"
        return f"gradients of step 1 ({len(gradient)} of {len(order)} tensors): {span}{where}"
    if "step 1" in wrong["grad_norm"]:
        return "norm of the gradients in step 1: all gradients are right, but not each counts once"
    values = sorted(wrong["parameter"], key=order.index)
    if values:
        return f"update: {values[0].rpartition('.')[0]} is the first in forward order with other parameters"
    return "a later step" if any(wrong.values()) else None
