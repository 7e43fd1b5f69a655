"""Which module is cut how: a table of paths to styles, ours or the user's (`parallel.plan`), and what does not go.

{"blocks.\\d+.mlp": mlp, "head": head}       the first pattern that fits the whole path; other modules stay whole
{"blocks": samples, "head": head}           blocks whole, each rank with its part of the samples: samples.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dtrain.errors import UserError
from dtrain.models import Model
from dtrain.models.blocks import MLP, Attention
from dtrain.models.moe import MoE
from dtrain.modules import Embedding, Linear, Module

PLANS: dict[str, dict[str, str]] = {
    "transformer": {
        r"embedding": "vocabulary",
        r"blocks\.\d+\.attention": "attention",
        r"blocks\.\d+\.mlp": "mlp",
        r"blocks\.\d+\.moe": "moe",
        r"head": "head",
    },
    "mlp": {r"blocks\.\d+\.linear": "column_gather", r"head": "head"},
}
# style -> the modules that it is for
KINDS: dict[str, tuple[type[Module], ...]] = {
    "vocabulary": (Embedding,),
    "attention": (Attention,),
    "mlp": (MLP,),
    "moe": (MoE,),
    "head": (Linear,),
    "column_gather": (Linear,),
}
SAMPLES = "samples"
BRANCHES = (Attention, MLP, MoE)


def of_samples(plan: Mapping[str, str]) -> bool:
    """Whether each rank computes the blocks for its part of the samples."""
    return plan.get("blocks") == SAMPLES


def styled(model: Model, plan: Mapping[str, str], sequence: bool) -> dict[str, tuple[Module, str]]:
    """The modules that `plan` cuts, and their styles, by path; UserError where the model has no such parts."""
    modules = model.named_modules()
    found: dict[str, tuple[Module, str]] = {}
    used: set[str] = set()
    for path, module in modules.items():
        pattern = next((pattern for pattern in plan if re.fullmatch(pattern, path)), None)
        if pattern is None:
            continue
        used.add(pattern)
        style = plan[pattern]
        if style not in KINDS:
            raise UserError(f"plan: {path}: {style}; allowed: {', '.join(KINDS)}")
        if not isinstance(module, KINDS[style]):
            names = ", ".join(kind.__name__ for kind in KINDS[style])
            told = f"{path} is of kind {type(module).__name__}"
            raise UserError(f"parallel.plan: {pattern}: {style}; {told}, allowed: {names}")
        found[path] = module, style
    if plan not in PLANS.values():
        _check(model, plan, sequence, found, used)
    return found


def _check(model: Model, plan: Mapping[str, str], sequence: bool, found: Mapping[str, Any], used: set[str]) -> None:
    """What a plan of the user may not be."""
    modules = model.named_modules()
    for pattern in plan:
        if pattern not in used and plan[pattern] != SAMPLES:
            kinds = tuple({kind for kinds in KINDS.values() for kind in kinds})
            paths = ", ".join(path for path, module in modules.items() if isinstance(module, kinds))
            raise UserError(f"parallel.plan: {pattern}; fits no module that another pattern does not. Modules: {paths}")
    inside = next((path for path in found if path.startswith("blocks.")), None)
    if of_samples(plan) and (inside or sequence):
        other = f"{inside}: {found[inside][1]}" if inside else "parallel.sequence: true"
        raise UserError(f"parallel.plan: blocks: {SAMPLES}; leaves blocks whole, and does not go with {other}")
    if of_samples(plan) and not model.blocks:
        raise UserError(f"parallel.plan: blocks: {SAMPLES}; the model has no blocks")
    if of_samples(plan) and any(isinstance(module, MoE) for module in modules.values()):
        raise UserError(f"parallel.plan: blocks: {SAMPLES}; does not go with mixtures of experts: use parallel.dp")
    whole = [path for path, module in modules.items() if isinstance(module, BRANCHES) and path not in found]
    if sequence and whole:
        raise UserError(f"parallel.sequence: true; needs all branches cut, and parallel.plan leaves {whole[0]} whole")
    ends = {path: getattr(modules[path], "weight", None) for path in ("embedding", "head") if path in modules}
    if len(ends) == 2 and len(set(ends) & set(found)) == 1 and ends["embedding"] is ends["head"]:
        raise UserError(
            "parallel.plan: cuts one of embedding and head, which are one weight; allowed: both, none, or model.tied: "
            "false"
        )
