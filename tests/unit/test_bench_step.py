"""`dtrain bench step`: the numbers against ones worked out by hand, the launches with small commands of our own."""

import ast
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dtrain.config import AdamWConfig, Config, GPTConfig, ImagesConfig, LAMBConfig, MLPConfig, TextConfig, TrainConfig
from dtrain.errors import UserError
from dtrain.launch import bare_matmuls, bench_launch, bench_step
from dtrain.launch.bare_matmuls import Product
from dtrain.launch.bench_step import Measurement
from dtrain.modules import Linear, Module

MIB = 2**20


def config(batch=16, model=None, optimizer=None):
    model = model or GPTConfig(layers=1, dim=16, heads=2, sequence=8)
    data = ImagesConfig(path="digits") if isinstance(model, MLPConfig) else TextConfig(path="stdlib")
    return Config(
        name="test",
        model=model,
        data=data,
        optimizer=optimizer or AdamWConfig(learning_rate=1e-3),
        train=TrainConfig(steps=100, global_batch=batch, micro_batch=1),
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def report(seconds, first=103.0, memory=MIB, **more):
    return {"step_seconds": seconds, "first_step_end": first, "memory_bytes": memory, "parameters": 7, **more}


def test_a_step_is_as_long_as_on_the_slowest_rank_and_the_median_counts():
    reports = [
        report([9.0, 1.0, 2.0, 5.0], first=101.5, memory=3 * MIB, bare_and_step_seconds=[(1, 2), (1, 4)]),
        report([9.0, 4.0, 1.0, 3.0], first=102.5, memory=2 * MIB, bare_and_step_seconds=[(3, 4)]),
    ]
    one = bench_step.measured(reports, started=100.0, warmup=1, tokens=8)  # slowest: 4, 2, 5
    assert one == Measurement(2.0, 2.5, 3 * MIB, 7, 0.5)


def test_ratios_are_taken_within_a_round():
    def side(*speeds):
        return [Measurement(speed, 1.0, MIB, 7, None) for speed in speeds]

    row = bench_step.summary(2, {"dtrain": side(10.0, 40.0, 30.0), "torch": side(20.0, 20.0, 10.0)})
    assert row["ratio"]["tokens_per_second"] == 2.0  # of 0.5, 2, 3
    assert row["dtrain"]["tokens_per_second"] == 30.0 and "bare_fraction" not in row["dtrain"]
    assert [each["tokens_per_second"] for each in row["torch"]["rounds"]] == [20.0, 20.0, 10.0]


def result(*sides):
    measurements = {side: [Measurement(12345.6, 1.25, 100 * MIB, parameters, 0.8)] for side, parameters in sides}
    return {
        "config": {
            "model": {"kind": "gpt", "layers": 4, "dim": 256, "heads": 8, "sequence": 128},
            "train": {"global_batch": 16, "dtype": "float32"},
            "optimizer": {"kind": "adamw"},
        },
        "steps": 12,
        "rounds": 1,
        "peer": "torch" if len(sides) > 1 else None,
        "machine": {"cores": 2, "processor": "P", "system": "S", "python": "3.11"},
        "rows": [bench_step.summary(ranks, measurements) for ranks in (1, 8)],
    }


def test_table_beside_a_peer():
    lines = bench_step.report(result(("dtrain", 7), ("torch", 7)))
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    words = ["1", "12,346", "12,346", "1.00x", "1.25", "1.25", "1.00x", "100", "100", "1.00x", "80%"]
    assert lines[2].split() == words
    assert "layers 4, dim 256" in lines[0] and lines[-1].startswith("machine: 2 cores, P, S; Python 3.11")


def test_table_of_dtrain_alone_and_another_model_is_told():
    assert bench_step.report(result(("dtrain", 7)))[2].split() == ["1", "12,346", "1.25", "100", "80%"]
    assert any("NOT the same model" in line for line in bench_step.report(result(("dtrain", 7), ("torch", 8))))


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro"), [(1, 16), (2, 8), (8, 2), (16, 1)])
def test_one_micro_batch_per_rank(ranks, micro):
    made = bench_step.for_bench(config(), ranks, 15)
    assert (made.train.micro_batch, made.train.steps, made.parallel.dp) == (micro, 15, ranks)
    assert made.checkpoint.every == 0 and made.train.validate.every == 0


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"train\.global_batch: 16"):
        bench_step.for_bench(config(), 3, 15)


def test_the_peer_is_told_the_whole_model():
    spec = bench_step.peer_spec(bench_step.for_bench(config(), 2, 9), 256, 9)
    assert spec["model"]["vocabulary"] == 256 and spec["model"]["kind"] == "gpt" and spec["steps"] == 9
    assert spec["train"]["micro_batch"] == 8 and spec["optimizer"]["betas"] == (0.9, 0.999)
    json.dumps(spec)


@pytest.mark.parametrize("options", [{"model": MLPConfig()}, {"optimizer": LAMBConfig(learning_rate=1.0)}])
def test_what_the_peer_does_not_have_is_refused(options):
    with pytest.raises(UserError, match="--peer torch: the peer has"):
        bench_step.peer_missing(config(**options), sys.executable)


def test_without_torch_the_remedy_is_told(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert "pip install" in bench_step.peer_missing(config(), str(python))
    with pytest.raises(UserError, match="--peer-python"):
        bench_step.peer_missing(config(), str(tmp_path / "none"))


def test_under_mpirun_it_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="without mpirun"):
        bench_step.bench_step(config())


def test_the_peer_imports_nothing_of_ours():
    source = (Path(bench_launch.__file__).parent / "peers" / "torch_gpt.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in modules and not [name for name in modules if name.split(".")[0] == "dtrain"]


# --- bare matmuls -----------------------------------------------------------------------------------------------------


class TwoLayers(Module):
    def __init__(self):
        self.first, self.second = Linear(12, 20), Linear(20, 5, bias=False)


def test_products_of_a_classifier():
    made = bare_matmuls.of_step(TwoLayers(), config(batch=12, model=MLPConfig()), data_ranks=2)
    assert sum(product.flops * count for product, count in made.items()) == 3 * 2 * 6 * (12 * 20 + 20 * 5)
    assert set(made.values()) == {6}  # portions of one sample


def test_products_of_attention():
    class Nothing(Module):
        pass

    model = GPTConfig(layers=3, dim=16, heads=4, sequence=8)
    made = bare_matmuls.of_step(Nothing(), config(batch=6, model=model), data_ranks=2)
    assert sum(p.flops * count for p, count in made.items()) == 6 * (2 * 8 * 8 * 4) * 4 * 3 * 3  # products, heads, ...


@pytest.mark.parametrize("product", bare_matmuls.linear(6, 4, 3) + bare_matmuls.attention(5, 6, 2))
def test_products_have_the_shapes_they_say(product, monkeypatch):
    shapes = []
    monkeypatch.setattr(np, "matmul", lambda a, b, out: shapes.append((a.shape, b.shape, out.shape, a.dtype)))
    bare_matmuls.runner(Counter({product: 2}), "float64")()
    batch = (product.batch,) if product.batch > 1 else ()
    a, b = (*batch, product.rows, product.inner), (*batch, product.inner, product.columns)
    assert shapes == [(a, b, (*batch, product.rows, product.columns), np.float64)] * 2


def test_transposed_operands_are_views():
    calls = []
    run = bare_matmuls.runner(Counter({Product(1, 4, 3, 2, a_transposed=True): 1}), "float32")
    real = np.matmul
    np.matmul = lambda a, b, out: calls.append((a.flags.f_contiguous, b.flags.c_contiguous))
    try:
        run()
    finally:
        np.matmul = real
    assert calls == [(True, True)]


# --- launches ---------------------------------------------------------------------------------------------------------

PYTHON = [sys.executable, "-S", "-c"]


def test_all_run_at_once_with_one_thread_each(tmp_path):
    code = "import os; open(os.environ['NAME'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    commands = [([*PYTHON, code], {"NAME": str(tmp_path / name)}) for name in "ab"]
    before = time.time()
    assert before <= bench_launch.run_together(commands, tmp_path / "output", 60) <= time.time()
    assert [(tmp_path / name).read_text() for name in "ab"] == ["1", "1"]


def test_one_that_fails_ends_the_others_and_is_quoted(tmp_path):
    mark = tmp_path / "pid"
    sleeper = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    failing = f"import os, sys, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\nsys.exit('no memory')"
    started = time.time()
    with pytest.raises(bench_launch.BenchError, match="no memory"):
        bench_launch.run_together([([*PYTHON, sleeper], {}), ([*PYTHON, failing], {})], tmp_path / "output", 60)
    assert time.time() - started < 50
    assert ended(mark)


def test_a_launch_past_its_limit_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    with pytest.raises(bench_launch.BenchError, match="not done after 2 s"):
        bench_launch.run_together([([*PYTHON, parent], {})], tmp_path / "output", 2)
    assert ended(mark)


def test_one_that_ignores_sigterm_is_killed(tmp_path):
    import subprocess

    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([*PYTHON, code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    bench_launch.stop(process, grace=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def ended(mark):
    """Has the process whose number is in `mark` gone (or is it a zombie that nobody fetched yet)?"""
    number = int(mark.read_text())
    for _ in range(200):
        try:
            os.kill(number, 0)
            if Path(f"/proc/{number}/stat").exists() and ") Z " in Path(f"/proc/{number}/stat").read_text():
                return True
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
