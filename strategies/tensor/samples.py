"""The blocks data-parallel and the ends tensor-parallel, on the same ranks: for a head larger than all the rest.

    rank 0   samples 0 1 2 3 ── enter ──┬─ 0 1 ── blocks ── 0 1 ─┐            ┌─ classes 0 … 49999 ─┐
    rank 1   samples 0 1 2 3 ── enter ──┴─ 2 3 ── blocks ── 2 3 ─┴ all_gather ┴─ classes 50000 … ───┴ loss of 0 1 2 3

Every rank of the `tp` axis has all parameters of the blocks, computes them for its part of each microbatch, and their
gradients are sums over the axis. What is gathered is one vector per sample (and token); what need not be sent any more
is the gradient of the head, which is summed over the data axis only. Any number of samples works: parts may be uneven.
Reference: the split of layers by Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997.
"""

from __future__ import annotations

from dataclasses import replace

from dtrain import conjugate
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import spans
from dtrain.layout import Partial
from dtrain.models import Model
from dtrain.modules import Context, Module
from dtrain.strategies.tensor.layers import Then
from dtrain.tensor import Tensor

SAMPLES = 0  # the dim


class OfSamples(Module):
    """A block that sees this rank's samples only."""

    def __init__(self, inner: Module, comm: Communicator) -> None:
        self.inner, self.name, self.comm = inner, inner.name, comm

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """As the block; what depends on a sample goes by its number in the whole batch."""
        if context is not None:
            mine = slice(*spans(len(context.row_ids), self.comm.size)[self.comm.rank])
            context = replace(context, row_ids=context.row_ids[mine])
        return self.inner(x, context)


def cut_samples(model: Model, comm: Communicator, pipelined: bool) -> None:
    """Split after the entrance, gather after the last block; pipelined: these may be on different ranks."""
    enter = model.enter
    samples: list[int | None] = [None]  # of the microbatch at hand; ranks that do not know ask one another

    def enter_mine(inputs: Array, context: Context | None = None) -> Tensor:
        samples[0] = None if pipelined else len(inputs)
        return conjugate.split(enter(inputs, context), comm, SAMPLES)

    model.enter = enter_mine
    for number, block in enumerate(model.blocks):
        for parameter in block.named_parameters().values():
            parameter.gradient_layout = parameter.gradient_layout.with_(tp=Partial())
        model.blocks[number] = OfSamples(block, comm)
    model.blocks[-1] = Then(model.blocks[-1], lambda x: conjugate.gather(x, comm, SAMPLES, samples[0]))
