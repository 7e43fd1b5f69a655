"""What each rank of a layout has to do and to hold: the parts of the model that are its own, cut by tp, cp and ep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from dtrain.launch.plan.amounts import Amount, Part, total
from dtrain.launch.plan.layout import Layout
from dtrain.launch.plan.profile import Profile
from dtrain.strategies.pipeline.cut import balanced


@dataclass(frozen=True)
class Stage:
    """What one rank of the pipeline does with one microbatch, and holds of it."""

    products: float  # FLOPs
    moved: float
    ops: float
    parameters: float  # elements
    largest_unit: float  # elements of the largest block
    ends: float  # elements of the model's two ends
    saved: float  # bytes kept for the backward, all of it
    inputs: float  # bytes of what goes into its blocks: all that recomputation keeps of them
    edges: float  # bytes that the model's two ends keep
    inside: float  # the largest block, while it is computed again
    largest: float  # bytes of the largest output
    reduces: int  # all_reduces of the boundary's size in a forward
    experts: float  # of the parameters, those of experts
    blocks: int
    rows: float  # bytes that go to experts
    mixtures: int
    matrices: int  # what follows: of all samples, whole; a grid of ranks multiplies them by SUMMA
    norms: int
    fed: float  # bytes
    made: float
    weights: float  # elements


def stages(profile: Profile, layout: Layout) -> tuple[Stage, ...]:
    """What each rank of the pipeline has, cut as the pipeline does it."""
    pp, tp, sequence, number = layout.pp, layout.tp, layout.sequence, layout.pp * layout.chunks

    is_grid, (rows, columns) = layout.tensor == "2d", layout.grid

    def owned(amount: Amount) -> float:
        if is_grid:  # vectors lie in all rows
            return replace(amount, whole=amount.whole * rows).on_grid(rows, columns, profile.kv_heads)
        return amount.on_rank(tp, sequence, profile.kv_heads, layout.ep)

    def here(amount: Amount) -> float:
        return (amount.on_grid(rows, columns, profile.kv_heads) if is_grid else owned(amount)) / layout.cp

    weights = [total(block.flops) for block in profile.blocks] or [0.0]
    weights[-1] += total(profile.exit.flops)
    sizes = _sizes(tuple(weights), number)
    ends = list(accumulate(sizes))
    boundary = profile.boundary / (tp if sequence or is_grid else 1) / layout.cp
    turns = layout.schedule == "zb_v"  # stages go down the ranks and up again
    ranks = [min(s, number - 1 - s) if turns else s % pp for s in range(number)]
    found = []
    for rank in range(pp):
        mine = [s for s in range(number) if ranks[s] == rank]
        blocks: list[Part] = [b for s in mine for b in profile.blocks[ends[s] - sizes[s] : ends[s]]]
        first, last = 0 in mine, number - 1 in mine
        edges = [profile.entrance] * first + [profile.exit] * last
        parts = [*blocks, *edges]
        tied = profile.tied / tp if first and last else 0.0
        found.append(
            Stage(
                products=sum(here(part.flops) for part in parts),
                moved=sum(here(part.moved) for part in parts),
                ops=sum(total(part.ops) for part in parts),
                parameters=sum(owned(part.parameters) for part in parts) - tied,
                largest_unit=max(owned(block.parameters) for block in blocks) if blocks else 0.0,
                ends=sum(owned(part.parameters) for part in edges) - tied,
                saved=sum(here(part.saved) for part in parts),
                inputs=len(blocks) * boundary,
                edges=sum(here(part.saved) for part in edges),
                inside=max((here(block.saved) for block in blocks), default=0.0),
                largest=max(here(part.largest) for part in parts),
                reduces=profile.tensor_reduces * len(blocks) + first + last,
                experts=sum(block.parameters.experts for block in blocks) / tp / layout.ep,
                blocks=len(blocks),
                rows=sum(block.rows for block in blocks),
                mixtures=sum(block.rows > 0 for block in blocks),
                matrices=sum(part.matrices for part in parts),
                norms=sum(part.norms for part in parts),
                fed=sum(part.fed for part in parts) / layout.cp,
                made=sum(part.made for part in parts) / layout.cp,
                weights=sum(
                    part.parameters.units + part.parameters.heads for part in [*blocks, *[profile.exit] * last]
                ),
            )
        )
    return tuple(found)


@cache
def _sizes(weights: tuple[float, ...], stages: int) -> list[int]:
    return balanced(weights, stages)
