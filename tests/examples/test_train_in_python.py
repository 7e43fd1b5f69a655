"""examples/train_in_python.py: the same losses on one process and in 3-D with ZeRO."""

import importlib.util
from pathlib import Path

import numpy as np

from dtrain.collectives import run_threads, single

PATH = Path(__file__).parents[2] / "examples" / "train_in_python.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layouts_from_python(capsys):
    example = load(PATH)
    alone = example.main(single(), [])
    assert "loss" in capsys.readouterr().out and alone[-1] < alone[0] - 0.5
    words = ["dp=2", "tp=2", "pp=2", "data_parallel=zero3"]
    for losses in run_threads(8, example.main, words):
        np.testing.assert_allclose(losses, alone, rtol=1e-10)
    out = capsys.readouterr().out
    assert "embedding (256, 32)" in out and "zero3 on 2 ranks" in out
