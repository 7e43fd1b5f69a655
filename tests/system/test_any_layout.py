"""A run that is cut over ranks is a run: it samples, stops, goes on in its own layout bit for bit and in any other to
1e-10, and its checkpoints are those of a whole model. Ranks are threads; `test_configs.py` starts processes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dtrain import checkpoint
from dtrain.checkpoint import Reader
from dtrain.collectives import run_threads
from dtrain.launch import checkpoints, configuration
from dtrain.launch.run import run as run_job
from dtrain.launch.sample import sample
from tests.system.program import losses, results, write_config

ZERO3 = {"data_parallel": "zero3", "replicate": True}
LAYOUTS = {
    "whole": (1, {}, {}),
    "3d": (8, {"tp": 2, "pp": 2}, {}),
    "3d-zero3": (8, {"tp": 2, "pp": 2, "sequence": True, **ZERO3}, {}),
    "zero3": (8, ZERO3, {}),
    "zero1-shared": (4, {"data_parallel": "zero1"}, {}),
    "interleaved": (2, {"pp": 2}, {"schedule": "interleaved"}),
    "uneven": (3, {"tp": 3}, {}),
    "zero2-in-zb_v": (4, {"pp": 2, "data_parallel": "zero2"}, {"schedule": "zb_v"}),
}


def run(config: Path, name: str, layout: str, *overrides: str) -> Path:
    """The job `name` in a layout, to its end; its folder."""
    ranks, parallel, pipeline = LAYOUTS[layout]
    words = [f"name={name}", f"parallel={json.dumps(parallel)}", f"pipeline={json.dumps(pipeline)}", *overrides]
    loaded = configuration.load(config, words)
    run_threads(ranks, lambda comm: run_job(loaded, config, comm))
    return Path(loaded.output) / name


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    train = {"steps": 4, "global_batch": 16, "micro_batch": 2, "validate": {"every": 2, "batches": 1}}
    model = {"layers": 4, "dropout": 0.1}
    checkpoints = {"every": 2, "keep": 0}
    return write_config(tmp_path_factory.mktemp("any"), text, train=train, model=model, checkpoint=checkpoints)


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[str, Path]:
    """An uninterrupted run in each layout."""
    return {layout: run(config, layout, layout) for layout in LAYOUTS}


def stopped(whole: Path, name: str) -> Path:
    """A copy of a run as it was when its second step had been saved."""
    copy = whole.parent / name
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    (copy / "summary.json").unlink()
    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_validation_and_the_sample_are_those_of_one_process(runs, layout):
    np.testing.assert_allclose(losses(runs[layout]), losses(runs["whole"]), rtol=1e-10)
    validated = [[row["validation_loss"] for row in results(runs[name])[1::2]] for name in (layout, "whole")]
    np.testing.assert_allclose(validated[0], validated[1], rtol=1e-10)
    assert (runs[layout] / "sample.txt").read_bytes() == (runs["whole"] / "sample.txt").read_bytes()


@pytest.mark.parametrize("layout", ["3d-zero3", "zero1-shared", "interleaved", "uneven"])
def test_resumed_in_its_own_layout_it_has_the_same_bits(runs, config, layout):
    again = run(config, stopped(runs[layout], f"again-{layout}").name, layout)
    assert results(again) == results(runs[layout])
    equal, words = checkpoints.diff(again, runs[layout])
    assert equal and "0 different" in words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("3d", "zero3"),
        ("zero3", "3d"),
        ("3d-zero3", "whole"),
        ("whole", "3d-zero3"),
        ("interleaved", "uneven"),
        ("zero1-shared", "zero2-in-zb_v"),
    ],
)
def test_resumed_in_another_layout_it_goes_on(runs, config, before, after):
    other = run(config, stopped(runs[before], f"{before}-to-{after}").name, after)
    assert [row["step"] for row in results(other)] == list(range(1, 5))
    np.testing.assert_allclose(losses(other), losses(runs["whole"]), rtol=1e-10)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "whole"])
def test_its_checkpoint_is_that_of_a_whole_model(runs, layout, tmp_path, capfdbinary):
    assert "all checksums right" in checkpoints.verify(runs[layout])
    reader, whole = (Reader(checkpoint.latest(runs[name] / "checkpoints")) for name in (layout, "whole"))
    assert set(reader.names()) == set(whole.names())
    for name in whole.names():
        np.testing.assert_allclose(reader.tensor(name), whole.tensor(name), rtol=1e-7, atol=1e-12, err_msg=name)

    safetensors = pytest.importorskip("safetensors.numpy")
    checkpoints.export(runs[layout], tmp_path / "out")
    for name, tensor in safetensors.load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, reader.tensor(name))
    sample(runs[layout], "def ", 8, seed=4)
    said = capfdbinary.readouterr().out
    sample(runs["whole"], "def ", 8, seed=4)
    assert capfdbinary.readouterr().out == said != b""
