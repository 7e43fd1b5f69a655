"""The benchmark of mixtures: what it compares costs the same, and it tells what came out."""

import json

import pytest
from msgspec.structs import replace

from dtrain.collectives import run_threads, single
from dtrain.data import open_data
from dtrain.errors import UserError
from dtrain.launch.bench_experts import bench_experts, dense_twin, flops_per_token
from tests import training

MODEL = {"kind": "moe_gpt", "layers": 3, "dim": 32, "heads": 4, "sequence": 16}
TRAIN = {"steps": 2, "global_batch": 4, "micro_batch": 1, "validate": {"every": 0, "batches": 1}}


def configured(moe=None, parallel=None, **model):
    return training.config(model={**MODEL, **model, "moe": moe or {}}, train=TRAIN, parallel=parallel or {})


@pytest.mark.parametrize(
    ("moe", "model"),
    [
        ({}, {}),
        ({"top": 1, "capacity": 1.0}, {}),
        ({"top": 2, "shared": 1, "experts": 6}, {"mlp": "swiglu", "bias": False}),
        ({"every": 2, "top": 3, "hidden": 20}, {"hidden": 50}),
    ],
    ids=str,
)
def test_the_twin_has_as_many_operations(moe, model):
    """Never fewer, and one unit of width less would be too few."""
    config = configured(moe, **model)
    data = open_data(config.data, sequence=16, seed=0)
    twin = dense_twin(config, data)
    narrower = replace(twin, model=replace(twin.model, hidden=twin.model.hidden - 1))
    mixture, dense, less = (flops_per_token(each, data) for each in (config, twin, narrower))
    assert less < mixture <= dense
    met = (config.model.moe.top + config.model.moe.shared) * config.model.expert_hidden
    if config.model.moe.every == 1:  # as wide as the experts that a token meets; the rest is the router and the gates
        assert met <= twin.model.hidden < met + config.model.moe.experts + 8
    assert twin.model.kind == "gpt" and twin.data == config.data and twin.optimizer == config.optimizer


def test_what_it_tells(tmp_path):
    lines: list[str] = []
    curves = bench_experts(configured(), single(), 2, tmp_path / "out.json", lines.append)
    assert [(curve.name, curve.seed) for curve in curves] == [
        ("dense", 3),
        ("experts", 3),
        ("dense", 4),
        ("experts", 4),
    ]
    assert all(list(curve.losses) == [2] and curve.seconds > 0 for curve in curves)
    assert curves[1].parameters > curves[0].parameters and 0 <= curves[1].dropped < 1 and curves[0].dropped == 0
    gain = sum(curves[i].losses[2] - curves[i + 1].losses[2] for i in (0, 2)) / 2
    assert f"lower by {gain:.4f} nats" in lines[-1] and len(lines) == 1 + 1 + 4 + 1
    assert [each["parameters"] for each in json.loads((tmp_path / "out.json").read_text())] == [
        curve.parameters for curve in curves
    ]


def test_ranks_give_the_losses_of_one():
    def compared(comm, config):
        return [each.losses[2] for each in bench_experts(config, comm, 1, None, [].append)]

    expected = compared(single(), configured())
    for losses in run_threads(2, compared, configured(parallel={"ep": 2})):
        assert losses == pytest.approx(expected, rel=1e-10)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"model.kind: gpt; .* allowed: moe_gpt"):
        bench_experts(training.config(), single(), 1)
    with pytest.raises(UserError, match=r"model.moe.router: expert_choice; .* Allowed: top"):
        bench_experts(configured({"router": "expert_choice"}), single(), 1)
