"""Every file in configs/ runs as its first line says, with less of everything, and what its comment promises is there.

Each is also compared with one process: the same losses, to 1e-10 in float64 (promise 1 of the design).
"""

import functools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.config import Config, ParameterServerConfig
from dtrain.launch import configuration
from dtrain.launch.assembly import assemble
from dtrain.launch.run import run as run_job
from tests.system.program import MPIRUN, ROOT, losses, metrics, well

pytestmark = [pytest.mark.timeout(300)]

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = ["model.dim=32", "model.heads=4", "model.sequence=16", "sample.tokens=3"]
LESS = ["train.steps=2", "log.every=1"]
# By design not the losses of one process with one microbatch in float64; their own tests say what they are.
OTHER_NUMBERS = ("gpt_compressed", "gpt_float16", "gpt_lora", "local_sgd", "ps_async", "ps_ssp")

# On real processes, the others on threads: the same program, without eight starts of the interpreter.
PROCESSES = ("gpt_ddp", "gpt_3d_zero", "gpt_zero1")

# What the comments of the files promise: bytes of parameters, gradients, optimizer; parameters of ZeRO may be shared.
KEPT = {
    "gpt_ddp": "8Ψ + 8Ψ + 16Ψ",
    "gpt_zero1": "8Ψ/8 + 8Ψ + 16Ψ/8",
    "gpt_zero2": "8Ψ + 8Ψ/8 + 16Ψ/8",  # threads share no array
    "gpt_zero3": "8Ψ/8 + 8Ψ/8 + 16Ψ/8",
    "gpt_3d_zero": "8Ψ/2 + 8Ψ/2 + 16Ψ/2",
}
# (p-1)/(m+p-1), by v stages per rank (p-1)/(v m+p-1); ZB-H1: a third of the bubble of 1F1B, 3 of 27.
BUBBLES = {
    "gpt_pipeline": 3 / 11,
    "gpt_gpipe": 3 / 11,
    "gpt_interleaved": 3 / 19,
    "gpt_zero_bubble": 3 / 27,
    "gpt_3d": 1 / 5,
    "gpt_3d_zero": 1 / 5,
    "mlp_pipeline": 2 / 10,
}


def less(config: Path) -> list[str]:
    """Overrides that make a job small."""
    wide = [] if config.stem == "gpt_float16" else ["train.dtype=float64"]
    few = ["model.classes=1000"] if "classes:" in config.read_text() else []
    layers = [f"model.layers={8 if 'interleaved' in config.name else 4}"]
    return LESS + wide + few + (TINY + layers if "sequence:" in config.read_text() else [])


def first_line(config: Path) -> list[str]:
    """The command that a configuration begins with."""
    return shlex.split(config.read_text().splitlines()[0].removeprefix("#").partition("(")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@functools.cache
def alone(decisive: str) -> list[float]:
    """The losses of one process; `decisive`: the configuration without what must not change them."""
    trainer = assemble(msgspec.json.decode(decisive, type=Config), single())
    return [record.loss for record in trainer.run()]


def reference(config: Path, overrides: list[str]) -> list[float]:
    """The losses of one process with this configuration; files that differ in their layout only share a run."""
    loaded = configuration.load(config, [*overrides, "name=alone", "parallel={}", "pipeline={}", "checkpoint={}"])
    loaded = msgspec.structs.replace(loaded, parameter_server=ParameterServerConfig())
    whole = msgspec.structs.replace(loaded.train, micro_batch=loaded.train.global_batch, recompute=False)
    return alone(msgspec.json.encode(msgspec.structs.replace(loaded, train=whole)).decode())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config(config, folder, text, capsys):
    if "digits" in config.read_text():
        pytest.importorskip("sklearn")
    lines = config.read_text().splitlines()
    assert len(lines) <= 40 and lines[1].startswith("# "), "a command, then what to expect"
    command = first_line(config)
    assert str(config.relative_to(ROOT)) in command and "dtrain" in command
    ranks = int(command[2]) if command[0] == "mpirun" else 0
    overrides = less(config) + ([f"data.path={text}"] if "path: stdlib" in config.read_text() else [])
    overrides += [f"output={folder}", f"name={config.stem}"]
    if config.stem == "dlrm_fair":
        pytest.importorskip("statsmodels")
    if config.stem == "dlrm_hashed":
        rows = [f"{i % 7}w,{i % 5}v,{i / 600},{'yes' if i % 3 else 'no'}" for i in range(600)]
        (folder / "own.csv").write_text("\n".join(["A,B,x,bought", *rows]) + "\n")
        overrides += [f"data.path={folder / 'own.csv'}", "data.target=bought", "data.categories=[A,B]"]
    if config.stem == "gpt_lora":
        if not (folder / "gpt_ddp" / "checkpoints").exists():  # this test alone
            base = [*less(config), f"data.path={text}", f"output={folder}", "name=gpt_ddp"]
            run_job(configuration.load(ROOT / "configs" / "gpt_ddp.yaml", base), config, single())
        overrides.append(f"lora.from={folder / 'gpt_ddp'}")
    if config.stem in PROCESSES and MPIRUN:
        out = well("run", config, *overrides, ranks=ranks).out
    else:
        loaded = configuration.load(config, overrides)
        run_threads(max(1, ranks), lambda comm: run_job(loaded, config, comm))
        out = capsys.readouterr().out
    run = folder / config.stem
    assert len(metrics(run)) == 2
    if config.stem not in OTHER_NUMBERS:
        np.testing.assert_allclose(losses(run), reference(config, overrides), rtol=1e-10)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    if "parameter_server" in config.read_text():  # it has another summary
        return
    memory = summary["memory"]
    assert sum(memory[kind] for kind in ("parameters", "gradients", "optimizer")) == memory["by_formula"]
    assert memory["formula"] in out and f"{memory['by_formula']:,}" in out
    if config.stem in KEPT:
        assert memory["formula"] == f"float64: {KEPT[config.stem]}"
    if summary["pipeline"] is not None:
        assert math.isclose(summary["pipeline"]["planned_bubble"], BUBBLES[config.stem])
        assert 0 < summary["pipeline"]["measured_bubble"] < 1
        assert "measured" in (run / "pipeline.svg").read_text()
    assert (summary["pipeline"] is not None) == (config.stem in BUBBLES)
    if "gpt" in config.name and "bench" not in config.name:
        assert (run / "sample.txt").read_text().strip("\n")


def test_a_resolved_configuration_is_itself(tmp_path):
    for config in CONFIGS:
        written = tmp_path / config.name
        written.write_text(configuration.dump(configuration.load(config)))
        assert configuration.load(written) == configuration.load(config)
