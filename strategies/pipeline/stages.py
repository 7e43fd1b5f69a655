"""A model in stages: which blocks a rank keeps, and what one stage computes.

    stage 0          enter, blocks 0 1            rank 0, and with two chunks rank 0 has stage p too
    stage 1                 blocks 2 3
    stage S-1               blocks …, leave, loss

What a rank has nothing to do with becomes `Absent`. A parameter lies on the ranks whose stages use it: on several where
it is tied (an embedding that is also the head), and then its gradient is summed over these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from dtrain.arrays import Array
from dtrain.errors import UserError
from dtrain.layout import Only, Partial
from dtrain.mesh import Mesh
from dtrain.models import Model
from dtrain.models.blocks import Attention
from dtrain.models.moe import MoE
from dtrain.modules import Context, Module
from dtrain.parameter import Parameter
from dtrain.strategies.pipeline.cut import balanced, by_hand
from dtrain.tensor import Tensor


class Absent(Module):
    """A part of the model that is on other ranks."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """It cannot be called here."""
        raise RuntimeError(f"{self.name} is on another stage of the pipeline")


class Stage:
    """One of the stages of this rank; `first` and `last` have the ends of the model."""

    def __init__(self, model: Model, number: int, stages: int, part: slice) -> None:
        self.model, self.part = model, part
        self.first, self.last = number == 0, number == stages - 1

    @property
    def blocks(self) -> list[Module]:
        """Those of the model that are this stage's; other strategies may have replaced them."""
        return self.model.blocks[self.part]

    def parameters(self) -> list[Parameter]:
        """Those that this stage computes with, as far as they are found by its modules."""
        ends = [*(self.model.entrance if self.first else ()), *(self.model.exit if self.last else ())]
        modules = [*self.blocks, *(getattr(self.model, name) for name in ends)]
        return [p for module in modules if isinstance(module, Module) for p in module.named_parameters().values()]

    def forward(self, x: Tensor | None, batch: dict[str, Array], context: Context | None) -> Tensor:
        """From what came of the stage before (None: the first) to what goes to the next; of the last stage the loss."""
        if x is None:
            x = self.model.enter(batch["inputs"], context)
        x = self.model.through_blocks(x, context, self.blocks)
        return self.model.loss_from(x, batch) if self.last else x


def split(model: Model, mesh: Mesh, rank_of: Sequence[int], parts: Mapping[int, tuple[int, int]]) -> dict[int, Stage]:
    """Cut the model into len(rank_of) stages, of which stage s goes to rank_of[s] of mesh["pp"]; those of this rank.

    parts: see `blocks_of_stages`.
    """
    stages, rank = len(rank_of), mesh.coordinates["pp"]
    place = [stage for stage, (start, stop) in parts.items() for _ in range(start, stop)]  # the stage of each block

    homes: dict[Parameter, set[int]] = {}
    for name, part in list(model.parts()):
        attribute, _, index = name.partition(".")
        if attribute == "blocks":
            ranks = {rank_of[place[int(index)]]}
        elif attribute in model.entrance or attribute in model.exit:
            ranks = {rank_of[0]} if attribute in model.entrance else set()
            ranks |= {rank_of[-1]} if attribute in model.exit else set()
        else:
            raise UserError(
                f"parallel.pp: {type(model).__name__}.{name} is neither a block nor of its entrance or exit"
            )
        for parameter in part.named_parameters().values() if isinstance(part, Module) else [part]:
            homes.setdefault(parameter, set()).update(ranks)
        if rank not in ranks and isinstance(part, Module):
            absent = Absent()
            absent.name = part.name
            if attribute == "blocks":
                model.blocks[int(index)] = absent
            else:
                setattr(model, attribute, absent)
    for parameter, ranks in homes.items():
        if len(ranks) < mesh.size("pp"):
            parameter.layout = parameter.layout.with_(pp=Only(tuple(sorted(ranks))))
        if len(ranks) > 1:
            parameter.gradient_layout = parameter.gradient_layout.with_(pp=Partial())
    return {
        number: Stage(model, number, stages, slice(start, stop))
        for number, (start, stop) in parts.items()
        if rank_of[number] == rank
    }


def blocks_of_stages(model: Model, stages: int, sizes: Sequence[int] | None) -> dict[int, tuple[int, int]]:
    """Stage -> its first block and the one behind its last.

    sizes: blocks per stage, by hand; None: balanced by what each block costs.
    """
    if sizes is None:
        if stages > len(model.blocks):
            raise UserError(f"parallel.pp: {stages} stages need as many blocks; the model has {len(model.blocks)}")
        sizes = balanced(costs(model), stages)
    sizes = by_hand(sizes, len(model.blocks), stages)
    return {stage: (end - size, end) for stage, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))}


def costs(model: Model) -> list[float]:
    """What each block costs: the products that a token takes, and for the last block those of the exit.

    A token is multiplied with every number of a matrix, with those of its own experts only, and in attention twice with
    a vector per token of the sequence. An embedding is a look-up and costs nothing; a head is a product.
    """
    blocks = []
    for block in model.blocks:
        experts: dict[int, float] = {}
        cost = 0.0
        for module in block.named_modules().values():
            if isinstance(module, Attention):
                cost += 2.0 * getattr(model, "sequence", 0) * module.out.weight.shape[1]
            if isinstance(module, MoE):
                stacked = module.experts.named_parameters().values()
                experts |= {id(p): p.size / max(1, p.shape[0]) * module.router.config.top for p in stacked}
        cost += sum(experts.get(id(p), p.size) for p in block.named_parameters().values() if p.ndim > 1)
        blocks.append(cost)
    for name in model.exit:
        part = getattr(model, name)
        if blocks and isinstance(part, Module):
            blocks[-1] += sum(p.size for p in part.named_parameters().values() if p.ndim > 1)
    return blocks
