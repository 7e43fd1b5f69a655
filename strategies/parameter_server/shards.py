"""Who serves what: the flat parameters cut into one key range per server, balanced by bytes.

    flat group   │ norm.weight │ qkv.bias │ … │ embedding rows 0..99 │ rows 100..255 │ qkv.weight │ … │
    servers      │ 0                                               │ 1                             │ … │

A worker has the whole model, as one process has; server i holds `data`, `grad` and the optimizer's state of its range
alone, and of the other parameters nothing. Borders are moved to the start of a row, so that rows of an embedding never
lie on two servers; to the start of a parameter where the optimizer looks at whole ones (LAMB, Adafactor).

Invariant: the borders are a function of (slices of the group, number of servers), the same on workers and servers.
Reference: Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dtrain import optimizers
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.flat import FlatBuffers
from dtrain.flat_group import FlatGroup, boxes_within
from dtrain.mesh import Mesh
from dtrain.modules import Module
from dtrain.optimizers import Optimizer
from dtrain.parameter import Parameter
from dtrain.strategy import Strategy
from dtrain.trainer import Trainer


def borders(group: FlatGroup, servers: int, whole: bool) -> list[int]:
    """Where the ranges begin and end, servers + 1 places in the group: as even as rows (or whole parameters) allow."""
    found = [0]
    for server in range(1, servers):
        ideal = group.size * server // servers
        found.append(max(found[-1], _nearest_start(group, ideal, whole)))
    return [*found, group.size]


def _nearest_start(group: FlatGroup, ideal: int, whole: bool) -> int:
    """The allowed place nearest to the ideal one."""
    starts = [group.size]
    for name, where in group.slices.items():
        starts.append(where.start)
        shape = group.shapes[name]
        if not whole and where.start < ideal < where.stop:
            row = math.prod(shape[1:])
            starts.append(where.start + round((ideal - where.start) / row) * row)
    return min(starts, key=lambda start: (abs(start - ideal), start))


@dataclass(frozen=True)
class Table:
    """The rows of an embedding that one server has: rows first .. last, at `where` in the group."""

    name: str
    group: int
    first: int
    last: int
    where: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, numbers per row)."""
        return self.last - self.first, (self.where.stop - self.where.start) // max(1, self.last - self.first)


@dataclass(frozen=True)
class Shard:
    """What one server serves: `ranges` per group; of these, `runs` travel whole, and `tables` by rows."""

    ranges: tuple[slice, ...]
    runs: tuple[tuple[int, slice], ...]
    tables: tuple[Table, ...]


def shards(groups: Sequence[FlatGroup], servers: int, whole: bool, sparse: Sequence[str] = ()) -> list[Shard]:
    """The shard of each server; `sparse` are the names of the parameters that travel by rows."""
    cuts = [borders(group, servers, whole) for group in groups]
    found = []
    for server in range(servers):
        ranges = tuple(slice(cut[server], cut[server + 1]) for cut in cuts)
        runs: list[tuple[int, slice]] = []
        tables: list[Table] = []
        for i, (group, part) in enumerate(zip(groups, ranges, strict=True)):
            start = part.start
            for piece in group.pieces(part):
                if piece.name in sparse:
                    where = slice(part.start + piece.where.start, part.start + piece.where.stop)
                    runs.append((i, slice(start, where.start)))
                    row = math.prod(group.shapes[piece.name][1:])
                    tables.append(Table(piece.name, i, piece.inside.start // row, piece.inside.stop // row, where))
                    start = where.stop
            runs.append((i, slice(start, part.stop)))
        found.append(Shard(ranges, tuple(run for run in runs if run[1].stop > run[1].start), tuple(tables)))
    return found


def shards_of(trainer: Trainer, sparse: Sequence[str]) -> list[Shard]:
    """The shards of all servers, on a server or on a worker."""
    servers, whole = trainer.config.parameter_server.servers, needs_whole(trainer.config.optimizer.kind)
    return shards(trainer.flat.groups, servers, whole, [f"{name}.weight" for name in sparse])


def needs_whole(kind: str) -> bool:
    """Whether an optimizer looks at whole parameters, which then lie on one server each."""
    return optimizers.OPTIMIZERS[kind].by_parameter


def values(optimizer: Optimizer) -> list[Array]:
    """All that an optimizer changes, in a fixed order: parameters (or their master copies) and state."""
    arrays: list[Array] = []
    for part in optimizer.parts:
        arrays += [] if part.is_half else [part.data]
        arrays += [part.state[name] for name in sorted(part.state)]
    for factors in getattr(optimizer, "factors", {}).values():
        arrays += [factors[name] for name in sorted(factors)]
    return arrays


class ServedGroup(FlatGroup):
    """A flat group of which only the range of one server is there; its parameters stay without values."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        comm: Communicator,
        pad_to: int,
        mesh: Mesh | None,
        joined: tuple[str, ...],
        server: int,
        servers: int,
        whole: bool,
    ) -> None:
        self._cut = server, servers, whole
        super().__init__(parameters, comm, pad_to, mesh, joined)

    def allocate(self, comm: Communicator) -> None:
        """Zeros, as long as the range."""
        server, servers, whole = self._cut
        places = borders(self, servers, whole)
        self.owned = slice(places[server], places[server + 1])
        self.data = np.zeros(self.owned.stop - self.owned.start, self.dtype)
        self.grad = np.zeros_like(self.data)

    @property
    def owned_data(self) -> Array:
        """The range."""
        return self.data

    @property
    def owned_grad(self) -> Array:
        """Its gradient."""
        return self.grad


class ServedBuffers(FlatBuffers):
    """The range of one server of all groups."""

    def __init__(self, parameters: Mapping[str, Parameter], comm: Communicator, whole: bool) -> None:
        """Server comm.rank of comm.size."""
        self.group_type: Any = partial(ServedGroup, server=comm.rank, servers=comm.size, whole=whole)
        super().__init__(parameters, comm)

    def initialise(self, seed: int, comm: Communicator | None = None) -> None:
        """The initial values of the range, block by block: no more of a parameter is drawn than is kept."""
        for group in self.groups:
            for piece in group.pieces(group.owned):
                parameter, end = group.parameters[piece.name], piece.where.start
                for box in boxes_within(group.shapes[piece.name], piece.inside.start, piece.inside.stop):
                    values = parameter.initial_values(seed, box)
                    group.data[end : end + values.size] = values.reshape(-1)
                    end += values.size
        self.fresh.clear()


class Serve(Strategy):
    """Makes the trainer of a server hold its range only: with it, checkpoints and updates are those of any layout."""

    axis = "dp"
    alone = False

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """The model stays an outline: a server never runs it."""
        self.flat = ServedBuffers(model.named_parameters(), mesh.comm, self.whole)
        return model
