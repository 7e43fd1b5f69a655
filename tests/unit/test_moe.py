"""Mixtures of experts in one process: a loop over tokens and experts as the oracle, losses that balance, capacity.

Checks of the course: 56 (auxiliary loss at its two ends), 57 (capacity, and what happens above it), 59 (entropy of the
usage; the balance term of MoECore).
"""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.special

from dtrain import models
from dtrain.collectives import single
from dtrain.config import Config, ModelConfig
from dtrain.models import routing
from dtrain.models.moe import MoE
from dtrain.modules import Context
from dtrain.tensor import Tensor
from tests import training

EXPERTS, DIM, TOKENS, BATCH = 5, 6, 9, 3
Sizes = type("Sizes", (), {"vocabulary": 11, "features": 0})


def make(std=0.5, seed=0, **moe) -> Any:
    """A model of one block with a mixture, of values large enough for each expert to matter."""
    mlp = moe.pop("mlp", "gelu")
    config = msgspec.convert(
        {"kind": "moe_gpt", "layers": 1, "dim": DIM, "heads": 2, "sequence": TOKENS, "mlp": mlp,
         "moe": {"experts": EXPERTS, **moe}}, ModelConfig
    )  # fmt: skip
    model = models.build(config, Sizes(), "float64", seed)
    rng = np.random.default_rng(seed)
    for parameter in model.blocks[0].moe.named_parameters().values():
        parameter.data = rng.normal(0, std, parameter.shape)
    return model


def mixture(**moe) -> MoE:
    return make(**moe).blocks[0].moe


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, TOKENS, DIM)), rng.normal(size=(BATCH, TOKENS, DIM))


def context(**options) -> Context:
    return Context(seed=0, step=0, row_ids=np.arange(BATCH), **options)


def activation(module, expert, x):
    up = module.up.data[expert] @ x
    if module.gate is None:
        return 0.5 * up * (1 + scipy.special.erf(up / math.sqrt(2)))
    gate = module.gate.data[expert] @ x
    return gate * scipy.special.expit(gate) * up


def by_hand(module: MoE, x, top, capacity, router="top"):
    """A loop over sequences, choices, tokens: (mixture(x), number of choices that found no room)."""
    y, dropped = np.zeros_like(x), 0
    for s in range(len(x)):
        p = scipy.special.softmax(x[s] @ module.router.weight.data.T, axis=-1)
        room = TOKENS if capacity is None else math.ceil(top * TOKENS * capacity / EXPERTS)
        taken: list[tuple[int, int, float]] = []
        if router == "expert_choice":
            for e in range(EXPERTS):
                taken += [(t, e, p[t, e]) for t in sorted(range(TOKENS), key=lambda t, e=e: -p[t, e])[:room]]
        else:
            best = [sorted(range(EXPERTS), key=lambda e, t=t: -p[t, e])[:top] for t in range(TOKENS)]
            used = [0] * EXPERTS
            for choice in range(top):
                for t in range(TOKENS):
                    e = best[t][choice]
                    if used[e] == room:
                        dropped += 1
                        continue
                    used[e] += 1
                    taken.append((t, e, p[t, e] / (p[t, best[t]].sum() if top > 1 else 1)))
        for t, e, gate in taken:
            y[s, t] += gate * (module.experts.down.data[e] @ activation(module.experts, e, x[s, t]))
    if module.shared is not None:
        gate = module.shared.gate
        for s, t in np.ndindex(y.shape[:2]):
            up = module.shared.up.weight.data @ x[s, t]
            inner = 0.5 * up * (1 + scipy.special.erf(up / math.sqrt(2)))
            if gate is not None:
                inner = (g := gate.weight.data @ x[s, t]) * scipy.special.expit(g) * up
            y[s, t] += module.shared.down.weight.data @ inner
    return y, dropped


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "moe",
    [
        {"top": 1}, {"top": 1, "capacity": None}, {"top": 2, "capacity": 0.6},
        {"top": 2, "capacity": None, "shared": 2}, {"top": 3, "capacity": 1.0},
        {"top": 5}, {"top": 1, "capacity": 0.2}, {"top": 2, "router": "expert_choice"},
        {"top": 1, "router": "expert_choice", "capacity": 1.0, "shared": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_over_experts_gives_the_same(moe, mlp):
    module = mixture(mlp=mlp, hidden=7, **moe)
    x, residual = inputs()
    noted = context()
    expected, dropped = by_hand(module, x, moe["top"], moe.get("capacity", 1.25), moe.get("router", "top"))
    y = module(Tensor(x), Tensor(residual), noted)
    np.testing.assert_allclose(y.data, residual + expected, rtol=1e-12, atol=1e-12)
    asked, taken = np.split(noted.recorded["blocks.0.moe.router"][4:], 2)
    assert asked.sum() - taken.sum() == dropped, "what finds no room is counted"


@pytest.mark.parametrize(
    "moe",
    [{"top": 1, "capacity": 0.6}, {"top": 2, "capacity": None, "shared": 1}, {"router": "expert_choice", "top": 2}],
    ids=str,
)
def test_gradients_of_loss_and_auxiliary_losses(moe):
    """What backward leaves is the gradient of the cross-entropy and the weighted auxiliary losses together."""
    model = make(**moe, balance=0.3, z_loss=0.2)
    ids = np.random.default_rng(2).integers(0, 11, (BATCH, TOKENS + 1))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}

    def total():
        noted = context(loss_gradient=1.0)
        loss = model.loss(batch, noted)
        told = noted.recorded["blocks.0.moe.router"]
        balance = 0.3 if moe.get("router") != "expert_choice" else 0.0
        return loss, loss.item() + balance * told[2] + 0.2 * told[3]

    loss, _ = total()
    loss.backward()
    for name, parameter in model.named_parameters().items():
        rng, step = np.random.default_rng(3), 1e-6
        for _ in range(4):
            place = tuple(rng.integers(0, length) for length in parameter.shape)
            value = parameter.data[place]
            ends = []
            for shifted in (value + step, value - step):
                parameter.data[place] = shifted
                ends.append(total()[1])
            parameter.data[place] = value
            numeric = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(parameter.grad[place], numeric, rtol=2e-5, atol=2e-7, err_msg=f"{name}{place}")


def told(module: MoE, x) -> Any:
    noted = context()
    module(Tensor(x), Tensor(x), noted)
    return noted.recorded["blocks.0.moe.router"]


def test_the_auxiliary_loss_is_alpha_where_all_is_even_and_alpha_times_experts_where_one_has_all():
    """Per token, so that it is weighed like the cross-entropy."""
    module = mixture(top=1, capacity=None)
    # Token t surely wants expert t % 5: with 10 tokens all are even. A huge logit makes the probability 1.
    module.router.weight.data = np.zeros((EXPERTS, DIM))
    module.router.weight.data[:, :EXPERTS] = 1e3 * np.eye(EXPERTS)
    even = np.zeros((BATCH, 10, DIM))
    even[:, np.arange(10), np.arange(10) % EXPERTS] = 1.0
    tokens, without, balance, _, *loads = told(module, even)
    assert (tokens, without, loads) == (10 * BATCH, 0, [2 * BATCH] * 10)
    assert balance / tokens == pytest.approx(1.0, rel=1e-14)
    collapsed = np.zeros((BATCH, 10, DIM))
    collapsed[..., 3] = 1.0
    tokens, _, balance, _, *loads = told(module, collapsed)
    assert balance / tokens == pytest.approx(EXPERTS, rel=1e-14)
    assert loads[:EXPERTS] == [0, 0, 0, 10 * BATCH, 0]
    # No preference at all: equal probabilities, whatever the choice does.
    tokens, _, balance, _, *_ = told(module, np.zeros((BATCH, 10, DIM)))
    assert balance / tokens == pytest.approx(1.0, rel=1e-14)


def test_the_balance_term_of_the_course():
    """The sum of tokens_e * probability_e with 10 experts and 10 tokens: 10 for one expert, 1 for all alike."""
    experts = 10
    module = mixture(top=1, capacity=None, experts=experts)
    module.router.weight.data = np.zeros((experts, DIM))
    x = np.ones((BATCH, 10, DIM))
    assert told(module, x)[2] / BATCH / experts == pytest.approx(1.0)
    module.router.weight.data[4] = 1e3
    assert told(module, x)[2] / BATCH / experts == pytest.approx(10.0)


def test_capacity_and_what_is_above_it():
    """GShard 2 N / E for two experts per token, Switch C N / E; rounded up, never more than there are tokens."""
    assert routing.capacity(64, 8, 2, 1.0) == 2 * 64 // 8
    assert [routing.capacity(64, 8, 1, factor) for factor in (1.0, 1.25, 1.1, 100)] == [8, 10, 9, 64]
    assert routing.capacity(1000, 10, 1, 1.1) == 110, "what is a whole number stays one"
    module = mixture(top=1, capacity=1.0)
    module.router.weight.data = np.zeros((EXPERTS, DIM))
    module.router.weight.data[2] = 50
    x, residual = np.ones((BATCH, TOKENS, DIM)), inputs()[1]
    noted = context()
    y = module(Tensor(x), Tensor(residual), noted).data
    room = math.ceil(TOKENS / EXPERTS)
    np.testing.assert_array_equal(y[:, room:], residual[:, room:])  # unchanged through the residual, to the bit
    assert (y[:, :room] != residual[:, :room]).all()
    _, without, _, _, *loads = noted.recorded["blocks.0.moe.router"]
    assert without == BATCH * (TOKENS - room) and loads[EXPERTS + 2] == BATCH * room


def test_second_choices_queue_behind_all_first_ones():
    choices = np.array([[[0, 1], [1, 0], [0, 1]]])
    np.testing.assert_array_equal(routing.within_capacity(choices, 2, 2)[0], [[1, 1], [1, 0], [1, 0]])


def test_equal_scores_and_the_lower_index():
    assert routing.top_k(np.zeros((2, 4)), 2).tolist() == [[0, 1], [0, 1]]
    assert routing.expert_choice(np.zeros((1, 4, 2)), 1).tolist() == [[[True, True], *[[False, False]] * 3]]


def trained(**sections):
    model = {"kind": "moe_gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 16, **sections.pop("model", {})}
    trainer = training.trainer(single(), model=model, **sections)
    return trainer, list(trainer.run())


def test_micro_batches_change_nothing():
    """Capacity, balance and noise are of a sequence: drops and losses are those of the whole batch at once."""
    runs = [
        trained(model={"moe": {"top": 2, "capacity": 0.8, "noise": 0.3, "z_loss": 0.01, "bias_rate": 0.01}},
                train={"steps": 3, "micro_batch": size, "global_batch": 8, "recompute": size == 2})[1]
        for size in (1, 2, 8)
    ]  # fmt: skip
    for run in runs[1:]:
        np.testing.assert_allclose(training.losses(run), training.losses(runs[0]), rtol=1e-12)
        for step, first in zip(run, runs[0], strict=True):
            assert step.details["dropped"] == first.details["dropped"] and first.details["dropped"][0] > 0
            np.testing.assert_allclose(step.details["balance_loss"], first.details["balance_loss"], rtol=1e-12)


def test_noise_is_another_one_in_every_step_and_for_every_sample():
    draw = [routing.noise(0, "r", step, np.array([4, 5]), (3, 2)) for step in (0, 1)]
    assert len({draw[step][sample].tobytes() for step in (0, 1) for sample in (0, 1)}) == 4
    np.testing.assert_array_equal(routing.noise(0, "r", 1, np.array([5]), (3, 2))[0], draw[1][1])
    assert routing.noise(0, "r", 1, np.array([], int), (3, 2)).shape == (0, 3, 2)


def test_biases_even_the_loads_without_a_loss(tmp_path):
    """From a router with strong preferences; checkpoints have the biases."""
    runs = {}
    for rate in (0.0, 0.02):  # of a model that does not learn, so that only the biases change anything
        moe = {"top": 1, "capacity": None, "balance": 0.0, "bias_rate": rate}
        optimizer = {"kind": "sgd", "learning_rate": 0.0}
        trainer, _ = trained(model={"moe": moe}, train={"steps": 1, "micro_batch": 8}, optimizer=optimizer)
        trainer.model.blocks[1].moe.router.weight.data *= 20  # probabilities that differ by more than a rate
        trainer.total_steps = 20
        runs[rate] = trainer, [record.details["entropy"][1] for record in trainer.run()]
    (_, without), (_, told) = runs.values()
    assert np.mean(told[-3:]) > math.log(8) - 0.03 > max(without[-3:]) + 0.03
    trainer, _ = runs[0.02]
    assert np.abs(trainer.model.router_bias).max() > 0.05
    folder = trainer.save(tmp_path)
    again, _ = trained(model={"moe": moe}, train={"steps": 1}, optimizer=optimizer)
    again.load(folder)
    np.testing.assert_array_equal(again.model.router_bias, trainer.model.router_bias)
    assert again.model.blocks[1].moe.router.bias.tolist() == trainer.model.router_bias[1].tolist(), "the router sees it"


def test_what_the_log_tells():
    _, records = trained(model={"moe": {"every": 2, "top": 2}}, train={"steps": 2})
    details = records[-1].details
    assert len(details["load"]) == 1 and len(details["load"][0]) == 8
    assert sum(details["load"][0]) == pytest.approx(1) and 0 < details["entropy"][0] <= math.log(8) + 1e-12
    assert 0 <= details["dropped"][0] < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_precisions_learn_the_same(dtype):
    """The router computes in float32 at least."""
    moe = {"model": {"moe": {"top": 2, "z_loss": 0.001}}}
    _, expected = trained(**moe, train={"steps": 4})
    _, records = trained(**moe, train={"steps": 4, "dtype": dtype})
    bound = 1e-5 if dtype == "float32" else 0.01
    np.testing.assert_allclose([r.loss for r in records], [r.loss for r in expected], rtol=bound)


def test_mistakes_are_named():
    def refused(match, parallel=None, **moe):
        sections = {**training.BASE, "model": {**training.BASE["model"], "kind": "moe_gpt", "moe": moe}}
        with pytest.raises(msgspec.ValidationError, match=match):
            msgspec.convert({**sections, "parallel": parallel or {}}, Config)

    refused(r"model.moe.top: 9; must be at most model.moe.experts: 8", top=9)
    refused(r"model.moe.every: 3; must be at most model.layers: 2", every=3)
    refused(r"model.moe.capacity: 0.0; must be above 0, or null for no limit", capacity=0.0)
    refused(r"model.moe.capacity: null; router: expert_choice needs one", router="expert_choice", capacity=None)
    refused(r"parallel.ep: 9; must be at most model.moe.experts: 8", {"ep": 9})
    with pytest.raises(msgspec.ValidationError, match=r"parallel.ep: 2; model.kind: gpt has no experts: allowed: 1"):
        msgspec.convert({**training.BASE, "parallel": {"ep": 2}}, Config)


def test_the_picture_and_the_line_of_the_log(tmp_path):
    from xml.etree import ElementTree

    from dtrain.launch import experts

    _, records = trained(model={"moe": {"top": 2, "capacity": 0.8}}, train={"steps": 2})
    rows = [{"step": record.step, "experts": record.details} for record in records]
    path = experts.picture(rows, tmp_path / "experts.svg", "a <title>")
    assert path is not None and experts.picture([{"step": 1}], path, "") is None
    shades = [each for each in ElementTree.parse(path).iter() if each.tag.endswith("rect")]
    assert len(shades) == 1 + 2 * 2 * 8, "the paper, and a field per mixture, step and expert"
    dropped = 50 * sum(records[-1].details["dropped"])
    assert f"dropped {dropped:.1f} %" in experts.line(records[-1].details)
