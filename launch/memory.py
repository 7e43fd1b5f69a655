"""What a rank keeps between two steps, in bytes: parameters, gradients, the optimizer's state; beside the formula.

    Ψ elements of b bytes on a rank after pp and tp have cut the model, n ranks of dp x cp (or of parallel.shard_over),
    s bytes of state per element:

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

from dtrain.strategies.zero.buffers import ZeroGroup
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


def peak_line(peaks: list[int]) -> str:
    """For the log: the most memory that a rank had, and which."""
    most, least = max(peaks), min(peaks)
    told = f"peak memory of a process: {most / 2**20:,.0f} MiB"
    if len(peaks) > 1:
        told += f" on rank {peaks.index(most)}, {least / 2**20:,.0f} MiB on rank {peaks.index(least)}"
    return told


def _mine(trainer: Trainer) -> dict[str, Any]:
    groups, dtype = trainer.flat.groups, trainer.config.train.dtype
    held = [group.bytes_held() for group in groups]
    row: dict[str, Any] = {kind: sum(each[kind] for each in held) for kind in ("parameters", "gradients")}
    row["optimizer"] = sum(array.nbytes for part in trainer.optimizer.parts for array in part.state.values())
    row["elements"] = sum(group.size for group in groups)

    # Groups that lie alike: experts may be cut over fewer ranks than the rest.
    alike: dict[tuple[int, bool, int], int] = {}
    for group in groups:
        n = group.comm.size if isinstance(group, ZeroGroup) else 1
        key = n, isinstance(group, ZeroGroup) and group.is_shared, group.dtype.itemsize
        alike[key] = alike.get(key, 0) + group.size
    stage = STAGES.get(trainer.config.parallel.data_parallel, 0)
    by_element = bool(trainer.optimizer.names)  # else such as Adafactor's rows and columns: no formula, as it is
    parts, row["by_formula"] = [], 0 if by_element else row["optimizer"]
    for (n, shared, width), elements in alike.items():
        state = len(trainer.optimizer.names) * max(width, 4) + 4 * (width == 2) if by_element else 0
        cut = {"parameters": shared or stage == 3, "gradients": stage >= 2, "optimizer": stage >= 1}
        factors = {"parameters": width, "gradients": width, "optimizer": state}
        terms = [f"{factors[kind]}Ψ" + (f"/{n}" if cut[kind] and n > 1 else "") for kind in KINDS if factors[kind]]
        parts.append(" + ".join(terms) + (f" (Ψ = {elements:,})" if len(alike) > 1 else ""))
        row["by_formula"] += sum(factors[kind] * elements // (n if cut[kind] else 1) for kind in KINDS)
    row["formula"] = f"{dtype}: {' and '.join(parts)}" + ("" if by_element else f" + {row['optimizer']:,}")
    return row
