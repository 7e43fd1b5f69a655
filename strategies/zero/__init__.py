"""ZeRO: data parallelism in which a rank keeps 1/n of the optimizer's state (stage 1), of the gradients too (2), of the
parameters too (3).

    backward of a unit ──► reduce_scatter ──► own shard of the gradient ──► update of the own shard ──► all_gather

A unit is a block of the model, or its two ends together; units are reduced while the backward goes on. Elements that a
rank sends per step: 2 (n-1)/n Ψ in stages 1 and 2, 3 (n-1)/n Ψ in stage 3, which gathers the parameters for the forward
and again for the backward. Where all ranks are on one node the parameters are one array in shared memory: a rank
updates its part in place and a barrier replaces every all_gather. `replicate` gives every rank its own copy.

`shard_over` n cuts over groups of n data ranks only and keeps a copy in each group (hybrid sharding; n: the data ranks
of a node): parameters then never leave the group, and the shards of the gradients are summed over the copies.
`reshard: false` keeps what a forward gathered until its backward: 2 (n-1)/n Ψ instead of 3, for the memory of stage 2.

Ranks along `cp` have whole parameters too, and gradients of their own tokens: n are the ranks of dp x cp together.
Gradients are summed with every microbatch from stage 2 (there is no room for whole ones), with the last one in stage 1.
Where several microbatches are under way at once, as in a pipeline, `accumulate` keeps whole gradients within the step.

References: Rajbhandari et al., ZeRO, arXiv:1910.02054; Zhao et al., PyTorch FSDP, arXiv:2304.11277 (units, prefetch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Work
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.modules import Module
from dtrain.strategies.zero.buffers import SHARDED_OVER, ZeroBuffers, ZeroGroup
from dtrain.strategies.zero.units import Rooms, Unit, Wrapped
from dtrain.strategy import Strategy, UnusedParametersError
from dtrain.tape import mode
from dtrain.tensor import Tensor

ENDS = 0  # the unit of the model's two ends; block i of the model is unit i + 1
AT_ONCE = 2  # blocks whose gradients are being made or summed


class ZeRO(Strategy):
    """Stage 1, 2 or 3 over the `dp` axis, and `ep` and `cp` for what is not cut over it."""

    axis = "dp"

    def __init__(
        self, stage: int, replicate: bool = False, accumulate: bool = False, shard_over: int = 0, reshard: bool = True
    ) -> None:
        """shard_over: data ranks that share one copy (0: all); reshard: what was gathered goes after the forward."""
        self.stage, self.replicate, self.accumulate = stage, replicate, accumulate or stage == 1
        self.shard_over, self.reshard = shard_over, reshard
        self.synchronise = True
        self.latest = ENDS
        self.works: list[Work] = []
        self.lent: dict[Unit, tuple[int, list[Array]]] = {}

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Move the parameters into the flat buffers of units, and follow what happens to these."""
        assert isinstance(model, Model)
        self.comm = mesh[SHARDED_OVER]
        unit_of = {p.name: i + 1 for i, block in enumerate(model.blocks) for p in block.named_parameters().values()}
        parameters = {p.name: p for p in model.named_parameters().values()}
        self.buffers = ZeroBuffers(
            self.stage, self.replicate, parameters, mesh, lambda name: unit_of.get(name, ENDS), self.shard_over
        )
        self.flat = self.buffers
        self.alone = not any(group.pages for group in self.buffers.groups)  # else a forward gathers
        members: dict[int, list[ZeroGroup]] = {}
        for group in self.buffers.groups:
            if group.comm.size == 1:  # no other rank has a part of it
                continue
            members.setdefault(unit_of.get(next(iter(group.parameters)), ENDS), []).append(group)
        self.units = {number: Unit(groups) for number, groups in sorted(members.items())}
        blocks = [unit for number, unit in self.units.items() if number != ENDS]
        ends = self.units.get(ENDS)
        if self.stage > 1:
            self.rooms = Rooms(self.comm, blocks, len(blocks) if self.accumulate else min(AT_ONCE, len(blocks)))
            self.end_rooms = Rooms(self.comm, [ends] if ends else [], 1)
        for unit in self.units.values():
            for name, parameter in unit.parameters.items():
                parameter.on_gradient(self._arrival(unit, name))
        for number in self.units:
            if number != ENDS:
                block = model.blocks[number - 1]
                forward, backward = partial(self._bring, number), partial(self._begin_backward, number)
                model.blocks[number - 1] = Wrapped(block, forward, backward)
        if ends is not None:
            model.enter, model.leave = self._with_ends(model.enter), self._with_ends(model.leave)
        return model

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backwards in this context only add up on this rank, where they can stay."""
        before, self.synchronise = self.synchronise, not self.accumulate
        try:
            yield
        finally:
            self.synchronise = before

    def reduce_gradients(self, model: Module) -> None:
        """Sum what the backwards did not complete, wait for all sums."""
        for unit in reversed(self.units.values()):
            if unit.sums and len(unit.missing) == len(unit.parameters):
                continue
            unused = [name for name in unit.missing if unit.parameters[name].grad is None]
            if unused or not self.accumulate:
                raise UnusedParametersError(sorted(unused or unit.missing))
            self._reduce(unit)
        summed = {name for unit in self.units.values() for name in unit.parameters}
        if unused := sorted(set(self.buffers.missing()) - summed):
            raise UnusedParametersError(unused)
        for work in self.works:
            work.wait()
        self.works.clear()
        if self.stage > 1:
            self.rooms.settle()
            self.end_rooms.settle()
        for group in self.buffers.groups:
            if group.copies.size > 1:
                group.copies.all_reduce(group.owned_grad, out=group.owned_grad)
        for unit in self.units.values():
            unit.sums = 0
            unit.let_go()

    def after_update(self, model: Module) -> None:
        """Every rank sees what the others updated: at once in shared memory, else gathered now, or when it is used."""
        works = [
            group.comm.all_gather_async(group.owned_data, out=group.data)
            for group in self.buffers.groups
            if group.comm.size > 1 and not group.is_shared and group.mine is None
        ]
        for work in works:
            work.wait()
        if any(group.is_shared for group in self.buffers.groups):
            self.comm.barrier()

    def notes(self) -> list[str]:
        """The bytes of parameters and gradients that this rank keeps between steps."""
        held = [group.bytes_held() for group in self.buffers.groups]
        parameters, gradients = (sum(each[kind] for each in held) for kind in ("parameters", "gradients"))
        shared = ", parameters once per node" if any(group.is_shared for group in self.buffers.groups) else ""
        return [
            f"zero{self.stage} on {self.comm.size} ranks{shared}: each keeps {parameters:,} bytes of parameters and "
            f"{gradients:,} of gradients"
        ]

    # Around forward and backward

    def _bring(self, number: int) -> None:
        """The parameters of a block are needed now; those of the next in this direction soon; others can go."""
        unit = self.units[number]
        unit.arrive()
        following = self.units.get(number + (number > self.latest) - (number < self.latest))
        if following not in (None, unit, self.units.get(ENDS)):
            following.fetch()
        self.latest = number
        for other, each in self.units.items() if self.reshard else ():
            if other != ENDS and each not in (unit, following):
                each.let_go()

    def _begin_backward(self, number: int) -> None:
        self._bring(number)
        self._lend(self.units[number], self.rooms if self.stage > 1 else None)

    def _with_ends(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The first or last part of the model, with the parameters of the ends, which stay for the whole step."""

        def with_ends(*inputs: Any) -> Tensor:
            self.units[ENDS].arrive()
            if mode.grad:
                self._lend(self.units[ENDS], self.end_rooms if self.stage > 1 else None)
            return function(*inputs)

        return with_ends

    def _lend(self, unit: Unit, rooms: Rooms | None) -> None:
        """Room for the gradients of the unit, unless it has some."""
        if rooms is None or unit in self.lent:
            return
        self.lent[unit] = rooms.take(unit)
        for group, array in zip(unit.groups, self.lent[unit][1], strict=True):
            for name, parameter in group.parameters.items():
                parameter.buffer = array[group.slices[name]].reshape(parameter.shape)

    def _arrival(self, unit: Unit, name: str) -> Callable[[Array], None]:
        def arrived(gradient: Array) -> None:
            if not self.synchronise:
                return
            if name not in unit.missing and not self.accumulate:  # the next microbatch, before the unit was complete
                raise UnusedParametersError(sorted(unit.missing))
            if name not in unit.missing or (self.accumulate and unit.sums):
                raise RuntimeError(f"a second gradient of {name}: run all backwards but the last within no_sync()")
            unit.missing.remove(name)
            if not unit.missing:
                self._reduce(unit)

        return arrived

    def _reduce(self, unit: Unit) -> None:
        """Start to sum the gradients of the unit: into the own part of each group."""
        unit.missing = set(unit.parameters)
        unit.sums += 1
        if self.stage == 1:
            for group in unit.groups:
                self.works.append(group.comm.reduce_scatter_async(group.grad, out=group.owned_grad))
            return
        number, arrays = self.lent.pop(unit)
        sums = [group.owned_grad if unit.sums == 1 else np.empty_like(group.owned_grad) for group in unit.groups]
        works = [
            group.comm.reduce_scatter_async(array, out=out)
            for group, array, out in zip(unit.groups, arrays, sums, strict=True)
        ]

        def finish(again: bool = unit.sums > 1) -> None:
            for work, group, out in zip(works, unit.groups, sums, strict=True):
                work.wait()
                if again:
                    group.owned_grad[...] += out

        for parameter in unit.parameters.values():
            parameter.grad = parameter.buffer = None
        (self.end_rooms if unit is self.units.get(ENDS) else self.rooms).leave(number, finish)
