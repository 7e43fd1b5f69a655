"""From one layout to another: which collectives, in which order; differentiable.

    from   to       Replicate        Shard(j)                                Partial
    Replicate      -                slice                                   rank 0 keeps it, others 0
    Shard(i)       gather           all_to_all (i != j), or - (i == j)      own block among zeros
    Partial        all_reduce       reduce_scatter                          -

per axis of the mesh. Where several axes cut one dim, the innermost is undone first. What makes the tensor smaller
comes early, what makes it larger late; `plan` is the list of steps, and says what each sends.

The gradient lies like the tensor, but the gradient of a replicated tensor is replicated and so is that of a partial
one (each contribution has the whole gradient). Where the result is used in parts, its gradient comes in parts:
`gradient=Layout(tp=Partial())` says so, and the way back starts from there. Replicate to Replicate is then Megatron's
f, Shard to Replicate the all_gather whose backward is a reduce_scatter.
Reference: Xu et al., "GSPMD", arXiv:2105.04663, section 3.5; PyTorch's DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.array_blocks import block, exchanged, gathered, reduce_scattered
from dtrain.arrays import Array
from dtrain.collectives.dtypes import cut
from dtrain.layout import Layout, Only, Partial, Place, Placement, Replicate, Shard
from dtrain.mesh import Mesh
from dtrain.op import ITSELF, Op, Shape
from dtrain.tensor import Tensor, apply


@dataclass(frozen=True)
class Step:
    """One axis of the mesh goes from one placement to another, by a collective over it or by none."""

    axis: str
    before: Placement
    after: Placement
    layout: Layout
    """Of the whole tensor before the step."""

    @property
    def name(self) -> str:
        """What is done."""
        match self.before, self.after:
            case Shard(), Shard():
                return "all_to_all"
            case Shard(), Replicate():
                return "all_gather"
            case Partial(), Replicate():
                return "all_reduce"
            case Partial(), Shard():
                return "reduce_scatter"
            case Replicate(), Shard():
                return "slice"
        return "zeros"

    def sent(self, mesh: Place, shape: Sequence[int]) -> int:
        """Elements that this rank sends: of ring algorithms, and nothing where it only computes."""
        size, mine = mesh.sizes.get(self.axis, 1), math.prod(self.layout.local_shape(mesh, shape))
        per_rank = {"all_gather": size - 1, "all_reduce": 2 * (size - 1) / size, "reduce_scatter": (size - 1) / size}
        return round(per_rank.get(self.name, (size - 1) / size if self.name == "all_to_all" else 0) * mine)

    def __str__(self) -> str:
        return f"{self.name} over {self.axis}: {self.before} -> {self.after}"


def plan(source: Layout, target: Layout) -> list[Step]:
    """The steps from one layout to the other; none where they are equal. ValueError for what has no way."""
    axes = list(dict.fromkeys([*source, *target]))
    for axis in axes:
        for what in (source[axis], target[axis]):
            if (
                isinstance(what, Only)
                or (isinstance(what, Shard) and what.ranges)
                or (isinstance(what, Partial) and what.op != "sum")
            ):
                raise ValueError(f"redistribute: {axis}={what}; allowed: Replicate, Shard(dim) without ranges, a sum")
    wanted = {dim: target.cutters(dim) for dim in _dims(source) | _dims(target)}
    steps: list[Step] = []
    layout = source
    while layout != target:
        step = next(
            Step(axis, layout[axis], after, layout)
            for axis, after in _possible(layout, target, wanted, axes)
            if after != layout[axis]
        )
        steps.append(step)
        layout = _moved(layout, step.axis, step.after)
    return steps


def _possible(
    layout: Layout, target: Layout, wanted: Mapping[int, Sequence[str]], axes: Sequence[str]
) -> list[tuple[str, Placement]]:
    """The steps (axis, placement after) that are possible and lead on, the best first."""

    def may_cut(axis: str) -> bool:
        """Whether all axes that cut this dim before `axis` do, and no other."""
        after = target[axis]
        if not isinstance(after, Shard):
            return False
        order = wanted[after.dim]
        outer = order[: order.index(axis)]
        here = layout.cutters(after.dim)
        return here == outer or (here == (*outer, axis))

    def may_undo(axis: str) -> bool:
        """Whether `axis` is the innermost that cuts its dim, and has to go."""
        before = layout[axis]
        if not isinstance(before, Shard):
            return False
        here = layout.cutters(before.dim)
        return here[-1] == axis and here != tuple(wanted[before.dim][: len(here)])

    found: list[tuple[int, str, Placement]] = []
    for axis in axes:
        before, after = layout[axis], target[axis]
        if before == after and not may_undo(axis):
            continue
        if isinstance(before, Shard):
            if may_undo(axis) and isinstance(after, Shard) and after.dim != before.dim and may_cut(axis):
                found.append((2, axis, after))
            elif may_undo(axis) and isinstance(after, Partial):
                found.append((5, axis, after))
            elif may_undo(axis):
                found.append((6, axis, Replicate()))
        elif isinstance(after, Shard):
            if may_cut(axis):
                found.append((1 if isinstance(before, Partial) else 0, axis, after))
        else:
            found.append((3 if isinstance(before, Partial) else 4, axis, after))
    return [(axis, after) for _, axis, after in sorted(found, key=lambda each: each[0])]


def _moved(layout: Layout, axis: str, after: Placement) -> Layout:
    """The layout with this axis as the innermost: what is cut last is named last."""
    rest = {name: layout[name] for name in layout if name != axis}
    return Layout(**rest, **{axis: after})


def _dims(layout: Layout) -> set[int]:
    return {placement.dim for axis in layout if isinstance(placement := layout[axis], Shard)}


def redistribute_array(array: Array, mesh: Mesh, source: Layout, target: Layout, shape: Shape) -> Array:
    """`redistribute` of an array; `shape` is that of the whole. Collective over the mesh."""
    for step in plan(source, target):
        array = _run(step, array, mesh, shape)
    return array


def _run(step: Step, array: Array, mesh: Mesh, shape: Shape) -> Array:
    comm = mesh[step.axis]
    lengths = {dim: _lengths(step, mesh, shape, dim) for dim in range(len(shape))}
    match step.before, step.after:
        case Shard(i), Shard(j):
            return exchanged(array, comm, j, i, lengths[j], lengths[i])
        case Shard(i), Replicate():
            return gathered(array, comm, i, lengths[i])
        case Shard(i), Partial():
            whole = np.zeros_like(array, shape=(*array.shape[:i], sum(lengths[i]), *array.shape[i + 1 :]))
            block(whole, i, lengths[i], comm.rank)[...] = array
            return whole
        case Partial(), Replicate():
            return comm.all_reduce(array)
        case Partial(), Shard(j):
            return reduce_scattered(array, comm, j, lengths[j])
        case Replicate(), Shard(j):
            return np.ascontiguousarray(block(array, j, lengths[j], comm.rank))
        case Replicate(), Partial():
            return array if comm.rank == 0 else np.zeros_like(array)
    raise AssertionError(step)


def _lengths(step: Step, mesh: Mesh, shape: Shape, dim: int) -> list[int]:
    """How the axis of a step cuts `dim`, inside of what the other axes leave of it."""
    rest = _moved(step.layout, step.axis, Replicate())
    return cut(rest.local_shape(mesh, shape)[dim], mesh.size(step.axis))


def gradient_of(layout: Layout) -> Layout:
    """How the gradient of a tensor lies: as the tensor, but whole where that is a sum."""
    return Layout(**{axis: layout[axis] for axis in layout if not isinstance(layout[axis], Partial)})


def _forward(x: Array, mesh: Mesh, source: Layout, target: Layout, shape: Shape, **_: Any) -> tuple[Array, None]:
    return redistribute_array(x, mesh, source, target, shape), None


def _vjp(node: Any, g: Array) -> tuple[Array]:
    a = node.attributes
    return (redistribute_array(g, a["mesh"], a["gradient"], gradient_of(a["source"]), a["shape"]),)


REDISTRIBUTE = Op("redistribute", _forward, _vjp, ITSELF, lambda inputs, output, attributes: 0)


def redistribute(
    tensor: Tensor,
    mesh: Mesh,
    source: Layout,
    target: Layout,
    shape: Shape | None = None,
    gradient: Layout | None = None,
) -> Tensor:
    """The same whole tensor in another layout. Collective over the axes that change (the first time over the mesh).

    shape: of the whole; where it is not given, the ranks tell one another what they hold of the dims that are cut.
    gradient: Partial on the axes along which the result is used in parts. ValueError where a layout does not fit.
    """
    if shape is None:
        shape = whole_shape(tensor.shape, mesh, source)
    if source.local_shape(mesh, shape) != tensor.shape:
        expected = source.local_shape(mesh, shape)
        raise ValueError(f"redistribute: {source} of {shape} is {expected} on this rank, the tensor is {tensor.shape}")
    target.local_shape(mesh, shape)  # checks the dims
    comes = gradient_of(target)
    for axis in gradient or ():
        if not isinstance(comes[axis], Replicate):
            raise ValueError(f"redistribute: gradient={gradient}: the result is {target}, not whole along {axis}")
        comes = _moved(comes, axis, gradient[axis])  # type: ignore[index]
    if not plan(source, target) and not plan(comes, gradient_of(source)):
        return tensor
    return apply(REDISTRIBUTE, tensor, mesh=mesh, source=source, target=target, shape=shape, gradient=comes)


def whole_shape(local: Shape, mesh: Mesh, layout: Layout) -> Shape:
    """The shape of the whole from those of the parts: a small collective per axis that cuts."""
    shape = list(local)
    for axis in reversed(layout.axes(Shard)):  # the innermost first
        placement = layout[axis]
        assert isinstance(placement, Shard)
        shape[placement.dim] = int(mesh[axis].all_reduce(np.array([shape[placement.dim]]))[0])
    return tuple(shape)
