"""`dtrain bench step`: tokens/s, start-up and memory of a training step, beside PyTorch and beside its bare matmuls.

    round 1   dtrain on 1 rank   torch on 1 rank   dtrain on 2 ranks   torch on 2 ranks  ...
    round 2   dtrain on 1 rank   torch on 1 rank   ...

Every measurement is a whole launch, and the two sides take turns, so that a machine that gets slower or busier does so
for both; ratios are taken within a round and the median round is told. One BLAS thread per rank on both sides, and one
micro-batch per rank and step. A step lasts as long as on its slowest rank; the median step counts, after WARMUP steps.
The first step is over when the last rank has made it, on the clock that started with the launch.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from dtrain.config import CheckpointConfig, Config, GPTConfig, ValidateConfig
from dtrain.errors import UserError
from dtrain.launch import configuration, environment, mpirun
from dtrain.launch.bench_launch import PAIRS, Report, launch_dtrain, launch_torch

WARMUP = 3  # untimed steps: caches, pools and the allocator settle
LIMIT = 300.0  # seconds per launch


@dataclass(frozen=True)
class Measurement:
    """What one launch gave."""

    tokens_per_second: float
    first_step_seconds: float
    """From the launch to the end of the first step on the last rank."""
    memory_bytes: int
    """Peak resident, largest rank."""
    parameters: int
    bare_fraction: float | None
    """Time of the bare matmuls / time of the step beside them, the median pair; None where it is not measured."""


def bench_step(
    config: Config,
    peer: str | None = None,
    ranks: Sequence[int] = (1, 2, 8),
    steps: int = 12,
    rounds: int = 3,
    json_path: Path | None = None,
    peer_python: str | None = None,
    limit: float = LIMIT,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure `config` on each number of ranks, tell a table, return (and write to `json_path`) all numbers."""
    if environment.job().size > 1:
        raise UserError("dtrain bench step: starts mpirun itself; call it without mpirun, with --ranks")
    configs = {size: for_bench(config, size, WARMUP + steps + PAIRS) for size in ranks}
    launcher = mpirun.find()
    python = peer_python or sys.executable
    versions: dict[str, str] = {}
    if peer is not None:
        missing = peer_missing(config, python)
        if missing:
            tell(missing)
            peer = None
    sides = ["dtrain"] + (["torch"] if peer else [])
    rows: dict[int, dict[str, list[Measurement]]] = {size: {side: [] for side in sides} for size in ranks}
    vocabulary = 0
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        for turn in range(-1, rounds):  # turn -1 fills the caches (compiled kernels, tokens, files) and is not counted
            for size in ranks if turn >= 0 else [min(ranks)]:
                for side in sides:
                    folder = Path(name) / f"{turn}-{size}-{side}"
                    folder.mkdir()
                    if side == "dtrain":
                        started, reports = launch_dtrain(launcher, configs[size], size, folder, limit)
                        vocabulary = reports[0]["vocabulary"]
                    else:
                        spec = peer_spec(configs[size], vocabulary, WARMUP + steps, peer == "torch-tuned")
                        started, reports = launch_torch(python, spec, size, folder, limit)
                    versions |= reports[0]["versions"]
                    one = measured(reports, started, WARMUP, tokens_per_step(config))
                    if turn >= 0:
                        rows[size][side].append(one)
                        tell(_progress(turn, rounds, size, side, one))
    table = [summary(size, rows[size]) for size in ranks]
    result = {
        "config": msgspec.to_builtins(config),
        "steps": steps,
        "rounds": rounds,
        "peer": peer,
        "machine": machine(versions),
        "rows": table,
    }
    tell("")
    for line in report(result):
        tell(line)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json: {json_path}: cannot be written: {error.strerror}") from None
    return result


def for_bench(config: Config, ranks: int, steps: int) -> Config:
    """Return `config` with one micro-batch per rank, `steps` steps, and nothing beside the steps; UserError."""
    whole = configuration.for_ranks(replace(config, train=replace(config.train, micro_batch=1)), ranks)
    train = replace(
        whole.train,
        micro_batch=whole.train.global_batch // whole.parallel.dp,
        steps=steps,
        validate=ValidateConfig(every=0),
    )
    return replace(whole, train=train, checkpoint=CheckpointConfig(every=0, resume="never"))


def tokens_per_step(config: Config) -> int:
    """Targets of a global batch (of a classifier: samples)."""
    return config.train.global_batch * int(getattr(config.model, "sequence", 1))


def peer_spec(config: Config, vocabulary: int, steps: int, tuned: bool = False) -> dict[str, Any]:
    """What launch/peers/torch_gpt.py needs to know."""
    plain = msgspec.to_builtins(config)
    model = plain["model"] | {"vocabulary": config.model.vocabulary or vocabulary}  # type: ignore[union-attr]
    return {
        "seed": config.seed,
        "steps": steps,
        "tuned": tuned,
        "model": model,
        "optimizer": plain["optimizer"],
        "train": plain["train"],
    }


def peer_missing(config: Config, python: str) -> str | None:
    """Why the peer cannot run here, and what to do about it; None when it can; UserError when it never could."""
    if not isinstance(config.model, GPTConfig) or config.optimizer.kind not in ("adam", "adamw", "sgd"):
        asked = f"{config.model.kind} with {config.optimizer.kind}"
        raise UserError(f"--peer torch: the peer has model.kind: gpt with sgd, adam or adamw, not {asked}")
    try:
        found = subprocess.run([python, "-c", "import torch"], capture_output=True, timeout=120, check=False)
    except OSError as error:
        raise UserError(f"--peer-python: {python}: cannot be run: {error.strerror}") from None
    if found.returncode == 0:
        return None
    return (
        f"--peer torch: {python} cannot import torch, so dtrain runs alone. To compare, in an environment of its own: "
        "python -m venv peer && peer/bin/pip install numpy torch --index-url https://download.pytorch.org/whl/cpu, "
        "then --peer-python peer/bin/python"
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def measured(reports: Sequence[Report], started: float, warmup: int, tokens: int) -> Measurement:
    """Put the reports of all ranks of one launch together; `tokens` per step."""
    slowest = [max(seconds) for seconds in zip(*(report["step_seconds"] for report in reports), strict=True)]
    step = statistics.median(slowest[warmup:])
    pairs = [pair for report in reports for pair in report.get("bare_and_step_seconds", ())]
    return Measurement(
        tokens_per_second=tokens / step,
        first_step_seconds=max(report["first_step_end"] for report in reports) - started,
        memory_bytes=max(report["memory_bytes"] for report in reports),
        parameters=reports[0]["parameters"],
        bare_fraction=statistics.median(bare / whole for bare, whole in pairs) if pairs else None,
    )


def summary(ranks: int, sides: dict[str, list[Measurement]]) -> dict[str, Any]:
    """One row: medians over the rounds, and medians of the ratios dtrain / torch within a round."""
    keys = ("tokens_per_second", "first_step_seconds", "memory_bytes", "bare_fraction")
    row: dict[str, Any] = {"ranks": ranks}
    for side, results in sides.items():
        values = {key: [getattr(result, key) for result in results] for key in keys}
        row[side] = {key: statistics.median(each) for key, each in values.items() if None not in each}
        row[side] |= {"parameters": results[0].parameters, "rounds": [asdict(result) for result in results]}
    if "torch" in sides:
        pairs = list(zip(sides["dtrain"], sides["torch"], strict=True))
        row["ratio"] = {
            key: statistics.median(getattr(ours, key) / getattr(theirs, key) for ours, theirs in pairs)
            for key in keys[:3]
        }
    return row


def machine(versions: dict[str, str]) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "cores": environment.cores(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


# --- telling ----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """The table of a result, as lines."""
    config, told, rows = result["config"], result["machine"], result["rows"]
    model, train = config["model"], config["train"]
    sizes = ", ".join(f"{key} {model[key]}" for key in ("layers", "dim", "heads", "sequence") if key in model)
    lines = [
        f"{model['kind']} ({sizes}), {rows[0]['dtrain']['parameters']:,} parameters, "
        f"global batch {train['global_batch']}, {train['dtype']}, {config['optimizer']['kind']}; "
        f"medians of {result['rounds']} launches of {result['steps']} steps, one BLAS thread per rank"
    ]
    lines += aligned([_titles(result["peer"]), *([*_cells(row)] for row in rows)])
    for row in rows:
        if "torch" in row and row["torch"]["parameters"] != row["dtrain"]["parameters"]:
            lines.append(f"NOT the same model: torch has {row['torch']['parameters']:,} parameters")
            break
    versions = [f"{name} {told[key]}" for name, key in _VERSIONS if key in told]
    lines.append(f"machine: {told['cores']} cores, {told['processor']}, {told['system']}; {', '.join(versions)}")
    return lines


# Title, key, unit, format of what is told of each side.
_COLUMNS = (
    ("tokens/s", "tokens_per_second", 1.0, ",.0f"),
    ("first step s", "first_step_seconds", 1.0, ".2f"),
    ("peak MiB", "memory_bytes", 2.0**20, ",.0f"),
)

_VERSIONS = (
    ("Python", "python"),
    ("NumPy", "numpy"),
    ("BLAS", "blas"),
    ("MPI", "mpi"),
    ("kernels", "kernels"),
    ("torch", "torch"),
    ("under Python", "torch_python"),
)


def _titles(peer: str | None) -> list[str]:
    beside = [peer, "ratio"] if peer else []
    return ["ranks", *(name for title, *_ in _COLUMNS for name in (title, *beside)), "bare matmuls / step"]


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield str(row["ranks"])
    for _, key, unit, form in _COLUMNS:
        yield from (f"{row[side][key] / unit:{form}}" for side in ("dtrain", "torch") if side in row)
        if "ratio" in row:
            yield f"{row['ratio'][key]:.2f}x"
    yield f"{row['dtrain']['bare_fraction']:.0%}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _progress(turn: int, rounds: int, ranks: int, side: str, result: Measurement) -> str:
    return (
        f"round {turn + 1}/{rounds}  {ranks} rank{'s' * (ranks > 1)}  {side:<6}  "
        f"{result.tokens_per_second:>9,.0f} tokens/s  first step {result.first_step_seconds:6.2f} s  "
        f"peak {result.memory_bytes / 2**20:5.0f} MiB"
    )
