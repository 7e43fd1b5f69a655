"""The memory of ZeRO: flat buffers by unit, of which every rank owns 1/n; and the room for what is there for a while.

    unit = a block of the model, or its two ends together          unit 1, 4 ranks
                                                                    data   │ own │     │     │     │   stage 3: own only
    stage  parameters  gradients  optimizer   bytes per parameter   grad   │ own │     │     │     │   from 2: own only
      1      whole       whole       1/n      8 + 8/n  (float32     state  │ own │
      2      whole        1/n        1/n      4 + 12/n  AdamW:
      3       1/n         1/n        1/n         16/n   4 + 4 + 8)

On one node the parameters are one array that all ranks see: they exist once, whatever the stage, and nothing is
gathered (`Shared`). Otherwise stage 3 gathers a unit into memory whose addresses stay but whose pages come and go
(`Pages`): what the tape saved of the parameters stays valid.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator, single
from dtrain.config.rules import divisors
from dtrain.errors import UserError
from dtrain.flat import FlatBuffers
from dtrain.flat_group import FlatGroup
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.parameter import Parameter

SHARDED_OVER = (*BATCH_AXES, "cp")  # ranks along cp have other tokens of the same samples, and whole parameters as well


class Pages:
    """An array in memory of its own whose pages can be given back; it is zero again afterwards."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        # Private: the kernel keeps pages of shared anonymous memory whatever is said about them.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(1, size * dtype.itemsize), flags=flags)
        self.array: Array = np.frombuffer(self._map, dtype, size)

    def give_back(self) -> None:
        """Free the pages; the array stays where it is."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Copies:
    """The communicators of hybrid sharding: `over` consecutive ranks have one copy of the parameters between them."""

    def __init__(self, over: int, mesh: Mesh) -> None:
        """over: 0 for all ranks that replicate a group."""
        self._over, self._mesh = over, mesh
        self._made: dict[tuple[str, str], Communicator] = {}

    def levels(self, comm: Communicator) -> tuple[Communicator, Communicator]:
        """Of ranks that replicate a group: (those of my copy, those that own the same part of the copies). Collective.

        UserError where copies of that many ranks do not fill `comm`.
        """
        if not self._over or comm.size <= self._over:
            return comm, single()
        if comm.size % self._over:
            fits = divisors(comm.size)
            raise UserError(f"parallel.shard_over: {self._over}; must divide the {comm.size} data ranks: {fits}")
        copy, part = divmod(comm.rank, self._over)
        return self._split(comm, "in copy", copy), self._split(comm, "of copies", part)

    def within(self, comm: Communicator, copy: int) -> Communicator:
        """The ranks of `comm` whose copy is this one of theirs. Collective."""
        return self._split(comm, "of one copy", copy)

    def _split(self, comm: Communicator, what: str, color: int) -> Communicator:
        """Made once for all groups; the mesh closes it."""
        key = comm.name, what
        if key not in self._made:
            part = comm.split(color, name=f"{comm.name} {what}")
            assert part is not None
            self._mesh.keep(part)
            self._made[key] = part
        return self._made[key]


class ZeroGroup(FlatGroup):
    """The parameters of one unit that lie alike, padded to a multiple of the ranks; `owned` is this rank's n-th."""

    def __init__(
        self,
        stage: int,
        replicate: bool,
        copies: Copies,
        parameters: Mapping[str, Parameter],
        comm: Communicator,
        pad_to: int,
        mesh: Mesh,
        joined: tuple[str, ...],
    ) -> None:
        """replicate: every rank has its own copy of what it needs, also where ranks could share one.

        copies: how many ranks have one between them.
        """
        self._copies = copies
        self.comm, self.copies = copies.levels(comm)
        # What is cut over the data ranks already, as tables and experts, has one owner: nothing is gathered or summed.
        self.stage, self.replicate = stage if self.comm.size > 1 else 1, replicate
        self.pages: Pages | None = None
        """Room for the gathered parameters where this rank keeps only its own."""
        self.mine: Array | None = None
        """The own shard of the parameters, then."""
        self.shard: Array | None = None
        """The own shard of the gradients, from stage 2."""
        super().__init__(parameters, self.comm, pad_to, mesh, joined)
        self.owned_over = self.summed_over if comm.size > 1 else ()

    def allocate(self, comm: Communicator) -> None:
        """Make what stays: see the table above. Collective."""
        share = self.size // comm.size
        self.owned = slice(comm.rank * share, (comm.rank + 1) * share)
        values = {name: p.data for name, p in self.parameters.items() if not p.is_placeholder}
        self.is_shared = False
        if not self.replicate and (shared := comm.empty_shared(self.size, self.dtype)) is not None:
            self.data, self.is_shared = shared, True
        elif self.stage < 3:
            self.data = comm.empty(self.size, self.dtype)
        else:
            self.pages = Pages(self.size, self.dtype)
            self.data = self.pages.array
            self.mine = comm.empty(share, self.dtype)
        if self.stage == 1:
            self.grad = comm.empty(self.size, self.dtype)
            self.grad[...] = 0
        else:
            self.shard = np.zeros(share, self.dtype)
        # Every rank is the first to touch its own part of what is shared: there it gets its memory, and pays for it.
        self.data[self.owned if self.is_shared else slice(None)] = 0
        if self.is_shared and values:
            comm.barrier()
        if not self.is_shared or comm.rank == 0:
            for name, value in values.items():
                self.data[self.slices[name]] = value.reshape(-1)
        comm.barrier()
        for name, parameter in self.parameters.items():
            parameter.data = self.data[self.slices[name]].reshape(parameter.shape)
            parameter.buffer = self.grad[self.slices[name]].reshape(parameter.shape) if self.stage == 1 else None
            parameter.grad = None

    def replicas(self) -> tuple[int, int]:
        """As of all groups; and those that own the same part in other copies."""
        index, count = super().replicas()
        return index * self.copies.size + self.copies.rank, count * self.copies.size

    @property
    def complement(self) -> Communicator:
        """The ranks that together own each parameter once, within my copy. The first access is collective."""
        every = super().complement
        return every if self.copies.size == 1 else self._copies.within(every, self.copies.rank)

    @property
    def owned_data(self) -> Array:
        """The parameters that this rank updates."""
        return self.data[self.owned] if self.mine is None else self.mine

    @property
    def owned_grad(self) -> Array:
        """Their gradients, after the sum over the ranks."""
        return self.grad[self.owned] if self.shard is None else self.shard

    def bytes_held(self) -> dict[str, int]:
        """Of parameters and gradients, on this rank, between two steps; of an array that ranks share, the n-th part."""
        whole, own = self.size * self.dtype.itemsize, (self.owned.stop - self.owned.start) * self.dtype.itemsize
        parameters = own if self.is_shared or self.mine is not None else whole
        return {"parameters": parameters, "gradients": whole if self.shard is None else own}


class ZeroBuffers(FlatBuffers):
    """The flat buffers of a model under ZeRO, a group for each unit and way of lying."""

    def __init__(
        self,
        stage: int,
        replicate: bool,
        parameters: Mapping[str, Parameter],
        mesh: Mesh,
        unit_of: Callable[[str], int],
        shard_over: int = 0,
    ) -> None:
        """unit_of: the number of the unit of a parameter by its name. Collective over the mesh.

        shard_over: consecutive ranks over which a group is cut (0: all that replicate it); the others are copies.
        """
        self.group_type = partial(ZeroGroup, stage, replicate, Copies(shard_over, mesh))  # type: ignore[assignment]
        comm = mesh[SHARDED_OVER]
        super().__init__(parameters, comm, pad_to=comm.size, mesh=mesh, section=unit_of, join=True)
        self.groups: list[ZeroGroup]  # type: ignore[assignment]

    def initialise(self, seed: int, comm: Communicator | None = None) -> None:
        """As of all flat buffers; what ranks share is written by one of them. Collective."""
        for group in self.groups:
            peers = group.comm
            for name, parameter in group.parameters.items():
                if name not in self.fresh:
                    if peers.rank and not group.is_shared:
                        parameter.data[...] = 0
                elif group.slices[name].start * peers.size // max(1, group.size) == peers.rank:
                    parameter.data[...] = parameter.initial_values(seed)
            if group.is_shared:
                peers.barrier()
            else:
                peers.all_reduce(group.data, out=group.data)
            if group.pages is not None and group.mine is not None:
                group.mine[...] = group.data[group.owned]
                group.pages.give_back()
        self.fill_frozen(seed)
        self.fresh.clear()
        self.changed()
