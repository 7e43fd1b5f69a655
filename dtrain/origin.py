"""Where a number that is none began: the first op of a forward whose output is inf or nan, and the module it is in.

    with watching() as found: loss = model.loss(batch)      found: [First("matmul", "blocks.3.mlp.up", clean=True, …)]

Nothing is paid before: a step that failed is computed once more, from the same parameters. -inf alone is no sign, it
stands for what a mask hides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.arrays import Array
from dtrain.op import Op
from dtrain.tape import mode, tracing


class First(NamedTuple):
    """The first op that went wrong."""

    op: str
    scope: str
    clean: bool
    """Whether all its inputs were finite: then it began here; else in a parameter."""
    brought: bool
    """Whether the op computes nothing, and so brought it from another rank."""
    largest: float
    """Of the finite numbers in its inputs, in absolute value."""

    def __str__(self) -> str:
        inputs = "finite" if self.clean else "inf or nan already"
        return f"{self.op} in {self.scope or 'the model'}, whose inputs are {inputs}, up to {self.largest:.3g}"


@contextlib.contextmanager
def watching() -> Iterator[list[First]]:
    """Within this context the first op whose output is no number is noted."""
    found: list[First] = []

    def look(op: Op, inputs: Sequence[Array], output: Array, attributes: dict[str, Any]) -> None:
        if found or not _is_wrong(output):
            return
        numbers = [each.astype(np.float64) for each in inputs]
        largest = max((float(np.abs(each[np.isfinite(each)]).max(initial=0.0)) for each in numbers), default=0.0)
        clean = not any(map(_is_wrong, inputs))
        brought = clean and not op.flops(tuple(each.shape for each in inputs), output.shape, attributes)
        found.append(First(op.name, ".".join(mode.scopes or []), clean, brought, largest))

    with tracing(), np.errstate(all="ignore"):
        before, mode.watch = mode.watch, look
        try:
            yield found
        finally:
            mode.watch = before


def _is_wrong(array: Array) -> bool:
    numbers = array.astype(np.float64)
    return not bool((numbers < np.inf).all())  # false for nan too
