"""Plans: the search finds what brute force finds, numbers are those of real runs, only legal layouts are proposed.

Checks of the course: 53 (search = brute force, fast), M6 (the choice guide in its words).
"""

import dataclasses
import functools
import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain import graph
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.launch import configuration, plan
from dtrain.launch.assembly import planned
from dtrain.launch.plan import report
from dtrain.launch.plan.costs import Job, Layout, cost, held, pace, stages, work
from dtrain.launch.plan.machine import Machine
from dtrain.launch.plan.profile import profile, total
from dtrain.launch.plan.search import applied, cheapest, everything, rank
from dtrain.strategies.pipeline.schedules import SCHEDULES, programs
from dtrain.strategies.pipeline.timeline import Timeline
from tests import training

SIZES = SimpleNamespace(vocabulary=256, features=64)
GPT = {"kind": "gpt", "layers": 4, "dim": 64, "heads": 4, "sequence": 128}
MODELS = {
    "gpt": GPT,
    "llama": GPT
    | {"kv_heads": 2, "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False, "dim": 48},
    "bert": {**GPT, "kind": "bert", "dropout": 0.1},
    "mlp": {"kind": "mlp", "hidden": [48, 32]},
}


def config(model="gpt", batch=16, **sections):
    data = {"data": {"kind": "images", "path": "digits"}} if model == "mlp" else {}
    train = {"dtype": "float32", "global_batch": batch, "micro_batch": 1}
    return training.config(model=MODELS[model], train=train, **data, **sections)


@functools.cache
def job(ranks, model="gpt", batch=16, **machine):
    given = {"cores": 4, "per_node": 4, "flops": 1e10, "bandwidth": 2e9, **machine}
    return Job(profile(config(model, batch), SIZES), Machine(**given), ranks, batch, "adamw")


def meshes(costs):
    best = {}
    for each in sorted(costs, key=rank):
        best.setdefault((each.layout.dp, each.layout.tp, each.layout.pp), each)
    return list(best.values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("ranks", "memory"), [(1, 1e12), (6, 1e12), (8, 103 << 20)])
def test_the_search_equals_brute_force(model, ranks, memory):
    here, batch = config(model, 48), 48
    task = job(ranks, model, batch, memory=memory)
    fitting = [c for c in everything(task, here) if c.memory <= memory]
    found, smallest, costed = cheapest(task, here, 4)
    assert found == meshes(fitting)[:4]
    assert costed <= len(everything(task, here))
    if not fitting:
        assert smallest.memory == min(c.memory for c in everything(task, here))


def test_every_candidate_is_legal():
    here = config(batch=8)
    for each in everything(job(8, batch=8), here):
        given = configuration.for_ranks(applied(here, each.layout), 8)
        if given.parallel.pp > 1:
            count = given.train.global_batch // given.parallel.dp // given.train.micro_batch
            assert count == each.microbatches
            Timeline(programs(given.pipeline.schedule, given.parallel.pp, count, given.pipeline.chunks))
    degrees = {(c.layout.dp, c.layout.tp, c.layout.pp) for c in everything(job(8, batch=8), here)}
    assert degrees == {(d, t, p) for d, t, p in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)) if d * t * p == 8}


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"naive"}))
@pytest.mark.parametrize("backward", [2.0, 3.0])
def test_counted_timelines_are_those_that_are_played(schedule, backward):
    """Also of many microbatches, of which only the first are played."""
    seconds = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    for ranks, microbatches in [(2, 2), (2, 12), (4, 8), (4, 32)]:
        whole = Timeline(programs(schedule, ranks, microbatches), seconds)
        assert pace(schedule, ranks, microbatches, backward, 0.0) == pytest.approx(whole.length, rel=0.03)
        assert list(held(schedule, ranks, microbatches)) == whole.in_flight()


@pytest.mark.parametrize("model", MODELS)
def test_flops_and_parameters_are_those_of_the_graph(model):
    """The polynomial through short traces, at the length that is trained."""
    here = config(model)
    trainer = training.trainer(single(), model=MODELS[model], data=_data(here), train=_train(here))
    found = profile(here, trainer.data)
    assert found.parameters == trainer.num_parameters
    batch, _ = next(trainer.microbatches())
    with graph.tracing():
        captured = graph.capture(trainer.model.loss(batch))
    flops = sum(total(part.flops) for part in (found.entrance, *found.blocks, found.exit))
    tolerance = 0.1 if model == "bert" else 1e-9  # how many targets a sample of BERT asks for is drawn
    assert flops == pytest.approx(captured.flops, rel=tolerance)


def _data(here):
    return {"kind": here.data.kind, "path": here.data.path}


def _train(here, **more):
    return {"dtype": "float32", "micro_batch": 1, "global_batch": 1, "steps": 2, "validate": {"every": 0}, **more}


@pytest.mark.parametrize(("model", "recompute"), [("gpt", False), ("gpt", True), ("llama", True), ("bert", False)])
def test_predicted_memory_is_near_the_measured(model, recompute):
    """Flat buffers and state to 2 %; what a step allocates beyond them, at its peak, within 25 %."""
    here = config(model, 8)
    trainer = training.trainer(
        single(), model=MODELS[model], train=_train(here, micro_batch=8, global_batch=8, recompute=recompute)
    )
    task = Job(profile(here, trainer.data), Machine(per_node=1), 1, 8, "adamw")
    layout = Layout(micro_batch=8, recompute=recompute)
    expected = cost(task, layout, work(task, layout, stages(task.profile, layout)))
    groups = trainer.flat.groups
    assert sum(g.data.nbytes for g in groups) == pytest.approx(expected.parameters, rel=0.02)
    assert sum(g.grad.nbytes for g in groups) == pytest.approx(expected.gradients, rel=0.02)
    state = sum(a.nbytes for part in trainer.optimizer.parts for a in part.state.values())
    assert state == pytest.approx(expected.optimizer, rel=0.02)
    trainer.train_step()
    tracemalloc.start()
    try:
        trainer.train_step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak == pytest.approx(expected.activations + expected.work, rel=0.25)


def test_a_small_memory_changes_the_layout_and_the_reasons():
    def choose(memory):
        task = job(8, batch=64, cores=32, per_node=8, memory=memory)
        best = cheapest(task, config(batch=64), 1)[0][0]
        return best, " ".join(report.reasons(task, best))

    free, why = choose(float("inf"))
    assert free.layout.dp == 8 and "It fits" in why and "plain data parallelism can be used" in why
    smallest = cheapest(job(8, batch=64, cores=32, per_node=8, memory=1.0), config(batch=64), 1)[1]
    tight, why = choose(smallest.memory * 1.0001)
    assert tight.memory <= smallest.memory * 1.0001 < free.memory
    assert "the model must be cut" in why and f"tp={tight.layout.tp}" in why


def test_state_that_does_not_fit_is_sharded():
    task = job(8, batch=64, cores=32, per_node=1, flops=1e12)  # eight nodes: nothing is shared
    memories = {
        c.layout.data_parallel: c.memory
        for c in everything(task, config(batch=64))
        if c.layout.dp == 8 and c.layout.micro_batch == 1 and c.layout.recompute
    }
    limit = (memories["ddp"] + memories["zero1"]) / 2
    task = dataclasses.replace(task, machine=dataclasses.replace(task.machine, memory=limit))
    best = next(c for c in cheapest(task, config(batch=64), 9)[0] if c.layout.dp == 8)
    assert best.layout.data_parallel != "ddp"
    assert "the state must be sharded" in " ".join(report.reasons(task, best))


def test_what_never_fits_and_what_cannot_be_shared_out(tmp_path):
    with pytest.raises(UserError, match=r"nothing fits. The least is .*: allow more, or start more ranks"):
        plan.plan(config(), 2, 1 << 20, None, 2, 1e10, None, False, 3)
    with pytest.raises(UserError, match=r"train.global_batch: 16; no layout of 7 ranks"):
        plan.plan(config(), 7, None, None, 2, 1e10, None, False, 3)


def test_auto_is_the_first_row_on_all_ranks(tmp_path):
    file = tmp_path / "auto.yaml"
    text = configuration.dump(config())
    start, _, rest = text.partition("parallel:")
    file.write_text(start + "parallel: auto\n" + rest[rest.index("pipeline:") :])
    loaded = configuration.load(file, ["parallel.memory_gb=1"])
    assert loaded.parallel.auto and loaded.parallel.memory_gb == 1
    results = run_threads(4, lambda comm: planned(loaded, comm))
    assert all(result == results[0] for result in results)
    chosen, told = results[0]
    assert not chosen.parallel.auto and chosen.parallel.dp * chosen.parallel.tp * chosen.parallel.pp == 4
    assert any("dp=" in line or "fits" in line for line in told)
    losses = run_threads(2, lambda comm: training.losses(list(_auto(comm).run())))
    expected = training.losses(list(_auto(single(), parallel={}).run()))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-9)


def _auto(comm, **sections):
    train = {"steps": 2, "micro_batch": 3, "validate": {"every": 0}}
    return training.trainer(comm, **{"parallel": {"auto": True}, "train": train, **sections})
