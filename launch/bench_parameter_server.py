"""`dtrain bench ps`: parameter servers with one slow worker, how long each mode takes, and how well it learns.

The same samples go into the same number of gradients in every mode; worker 0 takes `slow` times as long as it needs. A
synchronous run is as slow as worker 0. With SSP the others get at most `staleness` gradients ahead: of N gradients on W
workers, worker 0 has to compute (N - (W - 1) s) / W instead of N / W, and the time falls with it. Asynchronous, it
computes only what it has the time for. Times are ratios within one run, from the end of the first step on; the loss
curves stand in one picture.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import UserError
from dtrain.launch import environment, mpirun, pictures

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "local-sgd-8": {"mode": "local_sgd", "period": 8},
    "ssp-4": {"mode": "ssp", "staleness": 4},
    "ssp-16": {"mode": "ssp", "staleness": 16},
    "async": {"mode": "async"},
}


def bench(config: Path, overrides: Sequence[str], workers: int, servers: int, slow: float, output: Path) -> None:
    """Run `config` in every mode, print a line each, write output/losses.svg and output/results.json."""
    launcher, ranks = mpirun.find(), workers + servers
    for name in MODES:
        shutil.rmtree(output / name, ignore_errors=True)
    curves, results = {}, {}
    print(f"{workers} workers, {servers} servers, worker 0 slowed {slow:g} times")
    print(f"{'mode':<14}{'seconds':>9}{'of sync':>9}{'loss':>8}{'validation':>12}  gradients by worker", flush=True)
    for name, mode in MODES.items():
        section = json.dumps({"servers": servers, "slow": [slow], **mode})
        command = launcher.command(ranks, [sys.executable, "-m", "dtrain.launch", "run", str(config)])
        command += [*overrides, f"name={name}", f"output={output}", f"parameter_server={section}"]
        command += ["log.every=1", "checkpoint.every=0", "sample.tokens=0"]
        ended = subprocess.run(command, env=environment.GIVEN | launcher.leave(ranks), capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"mode {name} failed:\n{ended.stdout[-2000:]}{ended.stderr}")
        summary = json.loads((output / name / "summary.json").read_text())
        rows = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [(float(row["step"]), float(row["loss"])) for row in rows]
        found = summary["parameter_server"]
        results[name] = {
            "seconds": sum(row["step_seconds"] for row in rows[1:]),
            "loss": summary["final_loss"],
            "validation_loss": summary["final_validation_loss"],
            "gradients_by_worker": found["gradients_by_worker"],
            "staleness": found["staleness"],
        }
        seconds, first = results[name]["seconds"], results["sync"]["seconds"]
        validation = summary["final_validation_loss"]
        print(
            f"{name:<14}{seconds:>9.2f}{seconds / max(first, 1e-9):>9.2f}{summary['final_loss']:>8.3f}"
            f"{float('nan') if validation is None else validation:>12.3f}  {found['gradients_by_worker']}",
            flush=True,
        )
    title = f"{workers} workers, one slowed {slow:g} times: loss after as many samples"
    (output / "losses.svg").write_text(pictures.curves(curves, title))
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"loss curves: {output / 'losses.svg'}")
