"""What a rank keeps between two steps, in bytes: parameters, gradients, the optimizer's state; beside the formula.

    Ψ elements of b bytes on a rank after pp and tp have cut the model, n ranks along dp (or of parallel.shard_over), s
    bytes of state per element:

            parameters   gradients   optimizer
    ddp        b Ψ          b Ψ         s Ψ            AdamW: s = 8 in float32; 12 in float16 and bfloat16, the master
    zero1      b Ψ          b Ψ         s Ψ/n          copy included
    zero2      b Ψ          b Ψ/n       s Ψ/n
    zero3      b Ψ/n        b Ψ/n       s Ψ/n          parameters also b Ψ/n where the ranks of a node share one array

Measured is what lies in the flat buffers and in the optimizer; Ψ counts the padding between parameters too. Activations
and what comes and goes within a step are not in it.
Reference: Rajbhandari et al., ZeRO, arXiv:1910.02054, figure 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dtrain.trainer import Trainer

KINDS = ("parameters", "gradients", "optimizer")
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def kept(trainer: Trainer) -> dict[str, Any]:
    """Bytes by kind on each rank, and of the largest rank with its formula. Collective; the same on all ranks."""
    per_rank = trainer.mesh.comm.all_gather_object(_mine(trainer))
    largest = max(per_rank, key=lambda row: sum(row[kind] for kind in KINDS))
    return {**largest, "per_rank": [[row[kind] for kind in KINDS] for row in per_rank]}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """For the log."""
    total = sum(found[kind] for kind in KINDS)
    yield (
        f"memory kept by the largest rank: {found['parameters']:,} bytes of parameters + {found['gradients']:,} of "
        f"gradients + {found['optimizer']:,} of the optimizer = {total:,}"
    )
    yield f"       {found['formula']} = {found['by_formula']:,}, Ψ = {found['elements']:,} elements of its part, padded"


def _mine(trainer: Trainer) -> dict[str, Any]:
    groups, dtype = trainer.flat.groups, trainer.config.train.dtype
    held = [group.bytes_held() for group in groups]
    row: dict[str, Any] = {kind: sum(each[kind] for each in held) for kind in ("parameters", "gradients")}
    row["optimizer"] = sum(array.nbytes for part in trainer.optimizer.parts for array in part.state.values())
    elements = sum(group.size for group in groups)

    parallel = trainer.config.parallel
    n = parallel.shard_over or trainer.mesh.size("dp")
    stage = STAGES.get(parallel.data_parallel, 0) if trainer.mesh.size("dp") > 1 else 0
    shared = all(getattr(group, "is_shared", False) for group in groups)
    width = groups[0].dtype.itemsize if groups else 4
    state = len(trainer.optimizer.names) * max(width, 4) + 4 * (width == 2)
    cut = {"parameters": (shared and stage > 0) or stage == 3, "gradients": stage >= 2, "optimizer": stage >= 1}
    factors = {"parameters": width, "gradients": width, "optimizer": state}
    terms = [f"{factors[kind]}Ψ" + (f"/{n}" if cut[kind] and n > 1 else "") for kind in KINDS]
    expected = {kind: factors[kind] * elements // (n if cut[kind] else 1) for kind in KINDS}
    if not trainer.optimizer.names:  # none, or what is not per element, such as Adafactor's rows and columns
        terms[2], expected["optimizer"] = f"{row['optimizer']:,}", row["optimizer"]
    row["by_formula"] = sum(expected.values())
    return {**row, "elements": elements, "formula": f"{dtype}: {' + '.join(terms)}"}
