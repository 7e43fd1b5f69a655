"""Flat buffers: all parameters of a rank in one array per group that lies alike, all their gradients in another.

    float32, whole           │ norm.weight │ … │ embedding │ … │     data and grad of a group (`flat_group.py`)
    float32, cut over tp     │ qkv.bias │ … │ qkv.weight │ … │
    float32, cut over ep     │ experts.up │ experts.down │ … │       summed over dp only

`Parameter.data` and `Parameter.buffer` (where its gradient goes) become views. Then a bucket, a shard, a gradient
norm and a fused update are slices, and nothing is copied to communicate.

A parameter that is cut over an axis of the batch (a table over dp, an expert over ep) gets its gradient from the
samples of all ranks there already: its group is summed over the other axes of the batch only (`peers`). Frozen
parameters (`requires_grad` is False) have values, but no place in the buffers.

Invariant: groups come in one order on all ranks, also where each has other parameters: what is summed over an axis of
the mesh meets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from dtrain.collectives import Communicator, single
from dtrain.flat_group import FlatGroup, Kind, kind, summed_axes
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.parameter import Parameter


class FlatBuffers:
    """The flat buffers of a model: a group for each dtype, way of being cut and way of being summed."""

    group_type: type[FlatGroup] = FlatGroup

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        comm: Communicator,
        pad_to: int = 1,
        mesh: Mesh | None = None,
        section: Callable[[str], int] = lambda name: 0,
        join: bool = False,
    ) -> None:
        """Move the parameters (with their values) into flat buffers of `comm.empty`: a collective call.

        Parameters without values yet are 0 until `initialise`. The length of each buffer is a multiple of `pad_to`
        elements. Gradients that are present are forgotten. Without a mesh, all ranks that matter hold the same. Names
        are those that the parameters have in the whole model. Parameters of different sections have groups apart.
        With `join`, partial gradients are summed in one go with those of other samples: over axes that cut no
        parameter (cp), whose ranks have equal buffers. The memory is then that of all these ranks.
        """
        parameters = {parameter.name or path: parameter for path, parameter in parameters.items()}
        self.frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        """What is not trained: in no group, so without gradient, state, or part in a checkpoint."""
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.mesh = mesh
        self.fresh = {name for name, parameter in parameters.items() if parameter.is_placeholder}
        by_kind: dict[tuple[Kind, int], dict[str, Parameter]] = {}
        for name, parameter in parameters.items():
            by_kind.setdefault((kind(parameter), section(name)), {})[name] = parameter
        self.parameters = parameters
        # One order on all ranks, also where each has other parameters: what is summed over an axis meets there.
        kinds = sorted(by_kind, key=_order)
        joined = [_joined(each, by_kind) if join and mesh else () for each, _ in kinds]
        if mesh is not None:
            mesh.open((*summed_axes(each.cut_axes, mesh), *axes) for (each, _), axes in zip(kinds, joined, strict=True))
        # What is cut over an axis of the batch has another length on each rank there: no memory of all of them.
        homes = [
            mesh[(*summed_axes(each.cut_axes, mesh), *axes)]
            if mesh and (axes or (comm.size > 1 and set(each.cut_axes) & set(BATCH_AXES)))
            else comm
            for (each, _), axes in zip(kinds, joined, strict=True)
        ]
        self.groups = [
            self.group_type(by_kind[each], home, pad_to, mesh, axes)
            for each, home, axes in zip(kinds, homes, joined, strict=True)
        ]
        if mesh is not None:
            mesh.open(axes for group in self.groups for axes in _meetings(group))

    def initialise(self, seed: int, comm: Communicator | None = None) -> None:
        """Give the ranks that replicate a group the same values: initial ones where there are none yet, else those of
        the first of them. Without `comm`, the mesh knows them.

        Each rank draws a share of the initial values and the sum makes them whole (the others hold zeros, so it is
        exact): eight ranks do not draw everything eight times. Collective.
        """
        for group in self.groups:
            peers = comm or (single() if self.mesh is None else self.mesh[group.replicating_axes])
            for name, parameter in group.parameters.items():
                drawer = group.slices[name].start * peers.size // max(1, group.size) if name in self.fresh else 0
                if drawer != peers.rank:
                    parameter.data[...] = 0
                elif name in self.fresh:
                    parameter.data[...] = parameter.initial_values(seed)
            peers.all_reduce(group.data, out=group.data)
        self.fill_frozen(seed)
        self.fresh.clear()
        self.changed()

    def fill_frozen(self, seed: int) -> None:
        """Give the frozen parameters that have no values yet their initial ones, on every rank for itself."""
        for parameter in self.frozen.values():
            if parameter.is_placeholder:
                parameter.data = parameter.initial_values(seed)

    def zero_grad(self) -> None:
        """Forget all gradients: the next backward overwrites. The memory keeps its old values until then."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def missing(self) -> list[str]:
        """The names of the parameters that have no gradient since `zero_grad`."""
        return [name for name, parameter in self.parameters.items() if parameter.grad is None]

    def fill_missing(self) -> None:
        """Give a gradient of 0 to the parameters that have none: before `grad` is used as a whole."""
        for parameter in self.parameters.values():
            if parameter.grad is None and parameter.buffer is not None:
                parameter.buffer[...] = 0
                parameter.grad = parameter.buffer

    def changed(self) -> None:
        """Tell the tape that all parameters have new values: a graph that used the old ones refuses its backward."""
        for parameter in self.parameters.values():
            parameter.version += 1


def reduce_partial(flat: FlatBuffers) -> None:
    """Sum the gradients that are Partial over axes of the mesh by their `gradient_layout`: one collective per group and
    communicator. After the data-parallel sum, on what this rank owns. Collective."""
    for group in flat.groups:
        if group.mesh is None or not group.partial_axes:
            continue
        flat.fill_missing()
        gradient, only = group.owned_grad, dict(group.only)
        whole = tuple(axis for axis in group.partial_axes if axis not in only and axis not in group.joined)
        comms: list[Communicator | None] = [group.mesh[whole]] if whole else []
        comms += [group.mesh.among(axis, only[axis]) for axis in group.partial_axes if axis in only]
        for comm in comms:
            if comm is not None and comm.size > 1:
                comm.all_reduce(gradient, out=gradient)


def _order(group: tuple[Kind, int]) -> tuple[object, ...]:
    each, section = group
    return each.partial_axes, each.only, each.cut_axes, str(each.dtype), section


def _joined(of: Kind, groups: Iterable[tuple[Kind, int]]) -> tuple[str, ...]:
    """The axes of its partial gradients along which all ranks hold whole parameters, and the same."""
    apart = {axis for each, _ in groups for axis in (*each.cut_axes, *dict(each.only))}
    return tuple(axis for axis in of.partial_axes if axis not in apart)


def _meetings(group: FlatGroup) -> Iterator[tuple[str | int, ...]]:
    """The communicators that a group needs, as `Mesh.open` wants them named: made by all ranks in one order."""
    only = dict(group.only)
    yield group.replicating_axes
    yield (*group.cut_axes, *group.owned_over)
    yield tuple(axis for axis in group.partial_axes if axis not in only)
    for axis in group.partial_axes:
        if axis in only:
            yield axis, *only[axis]
