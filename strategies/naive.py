"""Naive data parallelism: every rank its part of the batch, then one all_reduce per parameter.

    rank 0   forward  backward  │ all_reduce p0, p1, p2, …  │ update
    rank 1   forward  backward  │ all_reduce p0, p1, p2, …  │ update

The readable oracle beside `ddp.py`: nothing overlaps, nothing is merged. Per step and rank 2 (n-1)/n Ψ elements are
sent in as many calls as there are parameters. Invariant: parameters are equal on all ranks before and after each step.
"""

from __future__ import annotations

from dtrain.collectives import single
from dtrain.flat import FlatBuffers
from dtrain.mesh import Mesh
from dtrain.modules import Module
from dtrain.strategy import Strategy, UnusedParametersError, unused_parameters


class NaiveDataParallel(Strategy):
    """One all_reduce per parameter after the backward."""

    axis = "dp"

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Make the flat buffers, in memory of this rank alone."""
        self.flat = FlatBuffers(model.named_parameters(), single(), mesh=mesh)
        return model

    def reduce_gradients(self, model: Module) -> None:
        """Sum every gradient over the ranks, one parameter after another."""
        if names := unused_parameters(model):
            raise UnusedParametersError(names)
        assert self.flat is not None
        for group in self.flat.groups:
            for parameter in group.parameters.values():
                assert parameter.grad is not None
                group.peers.all_reduce(parameter.grad, out=parameter.grad)
