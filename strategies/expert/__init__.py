"""Expert parallelism: every rank of the `ep` axis has some of the experts of each mixture, and samples of its own.

    rank 0   rows by expert  [0 1 | 2 3] ─┐            ┌─► rows of all ranks for experts 0 1 ── product per expert ─┐
    rank 1   rows by expert  [0 1 | 2 3] ─┴ all_to_all ┴─► rows of all ranks for experts 2 3 ── product per expert ─┤
                                   gates × rows, summed per token ◄── all_to_all ◄──────────────────────────────────┘

Per mixture and microbatch two all_to_alls forward (dispatch, combine) and two backward, of k·tokens·dim/ranks·(n-1)/n
rows' numbers each at most; how many rows go where is told beforehand in an all_gather of E numbers per rank. Rows are
never padded: with and without capacity the blocks are as uneven as the router makes them.

The samples differ along `ep` as along `dp`, so whatever is not cut over `ep` is summed over both; an expert's gradient
has the rows of all ranks of `ep` already and is summed over `dp` alone. Both derive from the experts' layout.

References: Lepikhin et al., GShard, arXiv:2006.16668; Rajbhandari et al., DeepSpeed-MoE, arXiv:2201.05596.
"""

from __future__ import annotations

from dtrain.layout import Shard
from dtrain.mesh import Mesh
from dtrain.models.moe import Experts, MoE
from dtrain.modules import Module
from dtrain.strategies.expert.exchange import Exchanged
from dtrain.strategy import Strategy


class ExpertParallel(Strategy):
    """Experts cut along the `ep` axis, in blocks."""

    axis = "ep"

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Cut the experts, and send rows to where they are."""
        comm = mesh["ep"]
        for module in model.named_modules().values():
            if isinstance(module, MoE):
                assert isinstance(module.experts, Experts)
                for parameter in module.experts.named_parameters().values():
                    parameter.cut(mesh, parameter.layout.with_(ep=Shard(0)))
                module.experts = Exchanged(module.experts, comm)
        return model


__all__ = ["Exchanged", "ExpertParallel"]
