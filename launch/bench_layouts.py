"""`dtrain bench layouts`: the training step in several layouts of the same ranks, beside PyTorch's counterparts.

    round 1   ddp  torch ddp   zero1  torch zero_redundancy   zero3  torch fsdp2   tp2   pp2   dp2tp2pp2
    round 2   …

Every measurement is a whole launch, as in `bench_step.py`; what has no counterpart in PyTorch's data parallelism is
compared with its DDP. Ratios are taken within a round, the median round is told.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch import environment, mpirun
from dtrain.launch.bench_launch import PAIRS, launch_dtrain, launch_torch
from dtrain.launch.bench_step import (
    LIMIT,
    WARMUP,
    Measurement,
    aligned,
    for_bench,
    machine,
    measured,
    peer_missing,
    peer_spec,
    tokens_per_step,
)

# name -> (keys of `parallel`, keys of `pipeline`, PyTorch's counterpart). Pipelines with two microbatches: none is
# smaller than the one of a data-parallel rank, and so are the matrices.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ddp": ({}, {}, "ddp"),
    "zero1": ({"data_parallel": "zero1"}, {}, "zero_redundancy"),
    "zero2": ({"data_parallel": "zero2"}, {}, "fsdp2"),
    "zero3": ({"data_parallel": "zero3"}, {}, "fsdp2"),
    "zero3_replicate": ({"data_parallel": "zero3", "replicate": True}, {}, "fsdp2"),
    "tp2": ({"tp": 2}, {}, "ddp"),
    "tp2_sequence": ({"tp": 2, "sequence": True}, {}, "ddp"),
    "pp2": ({"pp": 2}, {"microbatches": 2}, "ddp"),
    "pp2_interleaved": ({"pp": 2}, {"schedule": "interleaved", "microbatches": 2}, "ddp"),
    "dp2tp2pp2": ({"dp": 2, "tp": 2, "pp": 2}, {"microbatches": 2}, "ddp"),
}
DEFAULT = ("ddp", "zero1", "zero3", "tp2", "pp2", "dp2tp2pp2")


def bench_layouts(
    config: Config,
    names: Sequence[str] = DEFAULT,
    ranks: int = 8,
    peer: str | None = None,
    steps: int = 12,
    rounds: int = 3,
    json_path: Path | None = None,
    peer_python: str | None = None,
    limit: float = LIMIT,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure `config` in each of the layouts; tell a table, return (and write to `json_path`) its rows."""
    if environment.job().size > 1:
        raise UserError("dtrain bench layouts: starts mpirun itself; call it without mpirun, with --ranks")
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"--layouts: {name}; allowed: {', '.join(LAYOUTS)}")
    launcher, python = mpirun.find(), peer_python or sys.executable
    if peer is not None and (missing := peer_missing(config, python)):
        tell(missing)
        peer = None
    configs = {name: _in_layout(config, name, ranks, WARMUP + steps + PAIRS) for name in names}
    counterparts = list(dict.fromkeys(LAYOUTS[name][2] for name in names)) if peer else []
    results: dict[str, list[Measurement]] = {}
    vocabulary, versions = 0, dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder_name:
        for turn in range(-1, rounds):  # turn -1 fills the caches and is not counted
            for number, name in enumerate([*names, *(f"torch {each}" for each in counterparts)]):
                if turn < 0 and number > 0:
                    continue
                folder = Path(folder_name) / f"{turn}-{number}"
                folder.mkdir()
                if name in configs:
                    started, reports = launch_dtrain(launcher, configs[name], ranks, folder, limit)
                    vocabulary = reports[0]["vocabulary"]
                else:
                    spec = peer_spec(for_bench(config, ranks, 1), vocabulary, WARMUP + steps, peer == "torch-tuned")
                    spec["parallel"] = name.removeprefix("torch ")
                    started, reports = launch_torch(python, spec, ranks, folder, limit)
                versions |= reports[0]["versions"]
                one = measured(reports, started, WARMUP, tokens_per_step(config))
                if turn >= 0:
                    results.setdefault(name, []).append(one)
                    tell(f"round {turn + 1}/{rounds}  {name:<22}{one.tokens_per_second:>10,.0f} tokens/s")
    rows = [_row(name, results) for name in names]
    tell("")
    for line in _table(rows, ranks, machine(versions)):
        tell(line)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps({"ranks": ranks, "rows": rows, "machine": machine(versions)}, indent=2))
        except OSError as error:
            raise UserError(f"--json: {json_path}: cannot be written: {error.strerror}") from None
    return rows


def _in_layout(config: Config, name: str, ranks: int, steps: int) -> Config:
    parallel, pipeline, _ = LAYOUTS[name]
    changed = replace(
        config, parallel=replace(config.parallel, **parallel), pipeline=replace(config.pipeline, **pipeline)
    )
    return for_bench(changed, ranks, steps)


def _row(name: str, results: dict[str, list[Measurement]]) -> dict[str, Any]:
    ours = results[name]
    row: dict[str, Any] = {"layout": name} | {
        key: statistics.median(getattr(one, key) for one in ours)
        for key in ("tokens_per_second", "first_step_seconds", "memory_bytes")
    }
    theirs = results.get(f"torch {LAYOUTS[name][2]}")
    if theirs is not None:
        pairs = list(zip(ours, theirs, strict=True))
        row["counterpart"] = LAYOUTS[name][2]
        row["ratio"] = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)
        row["memory_ratio"] = statistics.median(a.memory_bytes / b.memory_bytes for a, b in pairs)
    return row


def _table(rows: Sequence[dict[str, Any]], ranks: int, told: dict[str, Any]) -> list[str]:
    cells = [["layout", "tokens/s", "first step s", "peak MiB", "torch", "ratio", "memory ratio"]]
    for row in rows:
        cells.append(
            [
                row["layout"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['first_step_seconds']:.2f}",
                f"{row['memory_bytes'] / 2**20:,.0f}",
                row.get("counterpart", ""),
                f"{row['ratio']:.2f}x" if "ratio" in row else "",
                f"{row['memory_ratio']:.2f}x" if "ratio" in row else "",
            ]
        )
    return [*aligned(cells), f"{ranks} ranks on {told['cores']} cores, {told['processor']}"]
