"""What all optimizers share: the part of the flat buffers that they update, their state, and its names in a checkpoint.

    flat.data   │ vectors (not decayed) │ matrices (decayed)      │        one call of a fused kernel per run,
    flat.grad   │                       │                         │        not one per parameter
    m, v, …     │                       │                         │

Weight decay is for matrices only (two dims and more), as in GPT-2 and BERT: biases and norms have no scale to keep
small. Parameters in float16 or bfloat16 have a float32 master copy here: updates are far smaller than half a unit in
the last place of the parameter and would be lost (Micikevicius et al., "Mixed precision training", arXiv:1710.03740).

Invariant: (parameters, `per_parameter_state`, `steps`) is all there is; written back, training goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from dtrain.arrays import Array
from dtrain.flat import FlatBuffers
from dtrain.flat_group import Block, FlatGroup, Piece

# Half-precision gradients are widened in blocks of this many elements: 4 MiB of float32 at a time.
BLOCK = 1 << 20


class Part:
    """The part of one flat group that an optimizer updates; `state` arrays and `data` are as long as the part."""

    def __init__(self, group: FlatGroup, where: slice | None = None) -> None:
        """`where`: the elements of the group; default: what this rank owns of it."""
        owned = where is None
        where = group.owned if where is None else where
        self.group, self.where = group, where
        self.runs = group.runs(where)
        self.pieces = group.pieces(where)
        self.parameters = group.owned_data if owned else group.data[where]
        self.gradients = group.owned_grad if owned else group.grad[where]
        self.is_half = group.dtype.itemsize == 2
        self.data = self.parameters.astype(np.float32) if self.is_half else self.parameters
        self.state: dict[str, Array] = {"master": self.data} if self.is_half else {}

    def zeros(self, shape: tuple[int, ...] | None = None) -> Array:
        """New state of this shape (default: of the whole part), on the parameters' device, float32 at least."""
        zeros: Array = np.zeros_like(self.data, shape=self.data.shape if shape is None else shape)
        return zeros

    def gradient(self, where: slice) -> Array:
        """The gradient of a slice of the part, float32 at least."""
        gradient = self.gradients[where]
        return gradient.astype(np.float32) if self.is_half else gradient

    def blocks(self) -> Iterator[tuple[slice, bool]]:
        """The runs (slice, decayed), in blocks where each needs a wider copy of its gradient."""
        for run, decayed in self.runs:
            step = BLOCK if self.is_half else run.stop - run.start
            for start in range(run.start, run.stop, step):
                yield slice(start, min(start + step, run.stop)), decayed

    def publish(self) -> None:
        """Round the master copies to the parameters, where there are any."""
        if self.is_half:
            self.parameters[...] = self.data.astype(self.parameters.dtype)


class Optimizer:
    """Updates flat parameters in place from flat gradients. Subclasses define `names` of flat state, and `update`."""

    names: ClassVar[tuple[str, ...]] = ()
    by_parameter: ClassVar[bool] = False  # whether the update looks at parameters, not only at elements
    unites: ClassVar[bool] = False  # whether it asks the other owners of a parameter that is owned in pieces

    def __init__(self, config: Any, flat: FlatBuffers, ranges: Sequence[slice] | None = None) -> None:
        """`ranges`: the elements to update of each group of `flat`; default what it owns. State is of them only."""
        self.config, self.flat = config, flat
        self.steps = 0
        wheres = [None] * len(flat.groups) if ranges is None else ranges
        self.parts = [Part(group, where) for group, where in zip(flat.groups, wheres, strict=True)]
        for part in self.parts:
            for piece in part.pieces if self.by_parameter and not (self.unites and part.group.owned_over) else ():
                self._check_whole(piece, part)
            self.prepare(part)

    def prepare(self, part: Part) -> None:
        """Make the state of a part."""
        for name in self.names:
            part.state[name] = part.zeros()

    def step(self, learning_rate: float, scale: float = 1.0) -> None:
        """One update from flat.grad * scale. A parameter without a gradient counts as one with a gradient of 0."""
        self.flat.fill_missing()
        self.steps += 1
        for part in self.parts:
            self.update(part, learning_rate, scale)
            part.publish()
        self.flat.changed()

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """Change part.data and part.state; `steps` counts this step already."""
        raise NotImplementedError

    def decay(self, decayed: bool) -> float:
        """The weight decay of a run."""
        return float(self.config.weight_decay) if decayed else 0.0

    # Checkpoints

    def per_parameter_state(self) -> dict[str, Array]:
        """Views of the state by "<parameter>.<name>", of the parameter's shape; write into them to restore it.

        Of a parameter that the ranges cut, the view is flat; `part.pieces` say which elements it holds.
        """
        return {
            f"{piece.name}.{name}": array[piece.where].reshape(piece.shape)
            for part in self.parts
            for piece in part.pieces
            for name, array in part.state.items()
        }

    def blocks(self) -> Iterator[Block]:
        """The state as blocks of whole tensors "<parameter>.<name>"; write into the arrays to restore it."""
        for part in self.parts:
            for name, array in part.state.items():
                for block in part.group.blocks(array, part.where):
                    yield replace(block, name=f"{block.name}.{name}")

    def _check_whole(self, piece: Piece, part: Part) -> None:
        if piece.shape != part.group.shapes[piece.name]:
            raise ValueError(
                f"{self.config.kind} needs whole parameters, but the range {part.where.start}:{part.where.stop} "
                f"cuts {piece.name} {list(part.group.shapes[piece.name])}. Allowed here: sgd, adam, adamw"
            )
