"""Plans: the search finds what brute force finds, numbers are those of real runs, only legal layouts are proposed.

Checks of the course: 53 (search = brute force, fast), M6 (the choice guide in its words).
"""

import dataclasses
import functools
import itertools
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain import graph
from dtrain.collectives import run_threads, single
from dtrain.config import filled
from dtrain.errors import UserError
from dtrain.launch import configuration, plan
from dtrain.launch.assembly import planned
from dtrain.launch.plan import compare, report
from dtrain.launch.plan.amounts import total
from dtrain.launch.plan.compare import spearman, spread
from dtrain.launch.plan.costs import BUCKET, cost
from dtrain.launch.plan.layout import Job, Layout
from dtrain.launch.plan.machine import NETWORK, NODE, SWITCH, Machine
from dtrain.launch.plan.microbatch import attention, work
from dtrain.launch.plan.pace import concurrency, held, pace
from dtrain.launch.plan.profile import profile
from dtrain.launch.plan.search import applied, cheapest, degrees, everything, rank
from dtrain.launch.plan.stages import stages
from dtrain.strategies.pipeline.schedules import SCHEDULES, programs
from dtrain.strategies.pipeline.timeline import Timeline
from tests import training

AXES = ("dp", "ep", "cp", "tp", "pp")
SIZES = SimpleNamespace(vocabulary=256, features=64)
GPT = {"kind": "gpt", "layers": 4, "dim": 64, "heads": 4, "sequence": 128}
MODELS = {
    "gpt": GPT,
    "llama": GPT
    | {"kv_heads": 2, "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False, "dim": 48},
    "bert": {**GPT, "kind": "bert", "dropout": 0.1},
    "mlp": {"kind": "mlp", "hidden": [48, 32]},
    "linear": {"kind": "mlp", "hidden": []},
    "moe": GPT | {"kind": "moe_gpt", "moe": {"experts": 6, "every": 2, "top": 2, "shared": 1, "capacity": None}},
}


def config(model="gpt", batch=16, **sections):
    data = {"data": {"kind": "images", "path": "digits"}} if MODELS[model]["kind"] == "mlp" else {}
    train = {"dtype": "float32", "global_batch": batch, "micro_batch": 1}
    return training.config(model=MODELS[model], train=train, **data, **sections)


@functools.cache
def job(ranks, model="gpt", batch=16, **machine):
    given = {"cores": 4, "per_node": 4, "flops": 1e10, "bandwidth": 2e9, **machine}
    return Job(profile(config(model, batch), SIZES), Machine(**given), ranks, batch, "adamw")


def meshes(costs):
    best = {}
    for each in sorted(costs, key=rank):
        best.setdefault(degrees(each.layout), each)
    return list(best.values())


@pytest.mark.parametrize(
    ("model", "ranks", "memory"),
    [
        ("gpt", 6, 1e12),
        ("llama", 8, 103 << 20),
        ("bert", 4, 1e12),
        ("mlp", 8, 1e12),
        ("linear", 4, 1e12),
        ("moe", 4, 103 << 20),
        ("moe", 1, 1e12),
    ],
)
def test_the_search_equals_brute_force(model, ranks, memory):
    here, batch = config(model, 48), 48
    task = job(ranks, model, batch, memory=memory)
    every = everything(task, here)
    fitting = [c for c in every if c.memory <= memory]
    found, smallest, costed = cheapest(task, here, 4)
    assert found == meshes(fitting)[:4]
    assert costed <= len(every)
    if not fitting:
        assert smallest.memory == min(c.memory for c in every)


def test_every_candidate_is_legal():
    here = config(batch=8)
    for each in everything(job(8, batch=8), here):
        given = configuration.for_ranks(applied(here, each.layout), 8)
        if given.parallel.pp > 1:
            count = given.train.global_batch // each.layout.data // given.train.micro_batch
            assert count == each.microbatches
            Timeline(programs(given.pipeline.schedule, given.parallel.pp, count, given.pipeline.chunks))
    found = {degrees(c.layout) for c in everything(job(8, batch=8), here)}
    sizes = itertools.product((1, 2, 4, 8), (1,), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4))  # 4 heads: tp of 8 as a grid
    assert found == {each for each in sizes if math.prod(each) == 8}


def test_experts_are_planned_over_ep_and_other_models_have_none():
    task, here = job(8, "moe", 24), config("moe", 24)
    found = {degrees(c.layout) for c in everything(task, here)}
    assert {ep for _, ep, *_ in found} == {1, 2, 4}  # 6 experts: not 8
    ddp = [c for c in everything(task, here) if c.layout.data_parallel == "ddp"]
    cut, whole = (next(c for c in ddp if degrees(c.layout) == mesh) for mesh in [(2, 4, 1, 1, 1), (8, 1, 1, 1, 1)])
    experts = sum(block.parameters.experts for block in task.profile.blocks) * 4
    assert whole.parameters - cut.parameters == pytest.approx(experts * 3 / 4)
    assert cut.tensor > 0 == whole.tensor


def test_long_samples_that_fit_nowhere_else_are_cut_over_cp():
    """Activations of one sample and one block are too large for a rank, and there are too few heads for tp."""
    one_head = {**GPT, "heads": 1, "sequence": 4096}
    here = training.config(model=one_head, train={"dtype": "float32", "global_batch": 8, "micro_batch": 1})
    task = Job(profile(here, SIZES), Machine(cores=8, per_node=8), 8, 8, "adamw")
    least = min(c.memory for c in everything(task, here) if c.layout.cp == 1)
    task = dataclasses.replace(task, machine=dataclasses.replace(task.machine, memory=least * 0.98))
    best = cheapest(task, here, 1)[0][0]
    assert best.layout.cp > 1
    assert "the tokens of a sample are cut" in " ".join(report.reasons(task, best))


def test_ulysses_is_planned_where_every_rank_gets_heads():
    contexts = {
        (c.layout.cp, c.layout.context) for c in everything(job(8, batch=8), config(batch=8)) if c.layout.tp == 1
    }
    assert contexts == {(1, "ring"), (2, "ring"), (4, "ring"), (8, "ring"), (2, "ulysses"), (4, "ulysses")}


def test_sums_over_a_network_hide_behind_the_backward():
    """In a node the cores that compute do the sums too."""
    near = job(4, batch=8, cores=8, per_node=8)
    far = job(4, batch=8, cores=8, per_node=1, flops=1e7)  # so slow that all but the last bucket is hidden
    layout = Layout(4, micro_batch=2)
    costs = [cost(task, layout, work(task, layout, stages(task.profile, layout))) for task in (near, far)]
    psi = far.profile.parameters * 4
    sums = [task.machine.collective("all_reduce", 4, 1, psi)[0] for task in (near, far)]
    assert costs[0].data == pytest.approx(sums[0])
    assert costs[1].data == pytest.approx(sums[1] * min(1, BUCKET / psi))


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"naive"}))
@pytest.mark.parametrize("backward", [2.0, 3.0])
def test_counted_timelines_are_those_that_are_played(schedule, backward):
    """Also of many microbatches, of which only the first are played."""
    seconds = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    for ranks, microbatches in [(2, 2), (2, 12), (4, 8), (4, 32)]:
        whole = Timeline(programs(schedule, ranks, microbatches), seconds)
        assert pace(schedule, ranks, microbatches, backward, 0.0) == pytest.approx(whole.length, rel=0.03)
        assert list(held(schedule, ranks, microbatches)) == whole.in_flight()
        busy = sum(span.stop - span.start for span in whole.spans)
        parts = concurrency(schedule, ranks, microbatches, backward, 0.0)
        assert sum(number * time for number, time in parts) == pytest.approx(busy, rel=0.03)
        assert sum(time for _, time in parts) == pytest.approx(whole.length, rel=0.03)


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


def test_the_entrance_moves_tokens_and_positions():
    """The rows of positions are a view: nothing is moved for it, neither there nor in the exit."""
    vectors = 4.0 * GPT["sequence"] * GPT["dim"]  # bytes
    found = profile(config(), SIZES)
    assert total(found.entrance.moved) == pytest.approx(2 * vectors)  # the embedding, and the sum
    logits = 4 * GPT["sequence"] * SIZES.vocabulary
    assert total(found.exit.moved) == pytest.approx(vectors + logits + 4)  # the norm, the head, and the loss


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
    with pytest.raises(UserError, match=r"train.global_batch: 16; no layout of 67 ranks"):
        plan.plan(config(), 67, None, None, 2, 1e10, None, False, 3)


def test_auto_is_the_first_row_on_all_ranks(tmp_path):
    file = tmp_path / "auto.yaml"
    text = configuration.dump(config())
    start, _, rest = text.partition("parallel:")
    file.write_text(start + "parallel: auto\n" + rest[rest.index("pipeline:") :])
    loaded = configuration.load(file, ["parallel.memory_gb=1"])
    assert loaded.parallel.auto and loaded.parallel.memory_gb == 1
    assert loaded == configuration.load(file, ["parallel=auto", "parallel.memory_gb=1"])
    results = run_threads(4, lambda comm: planned(loaded, comm))
    assert all(result == results[0] for result in results)
    chosen, told = results[0]
    assert not chosen.parallel.auto and filled({axis: getattr(chosen.parallel, axis) for axis in AXES}, 4)
    assert any("dp=" in line or "fits" in line for line in told)
    losses = run_threads(2, lambda comm: training.losses(list(_auto(comm).run())))
    expected = training.losses(list(_auto(single(), parallel={}).run()))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-9)


def _auto(comm, **sections):
    train = {"steps": 2, "micro_batch": 3, "validate": {"every": 0}}
    return training.trainer(comm, **{"parallel": {"auto": True}, "train": train, **sections})


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    a, b = [3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]
    assert spearman(a, b) == pytest.approx(by_definition(a, b))


def by_definition(a, b):
    """By the definition: Pearson's correlation of the ranks, by counting who is smaller."""
    ranks = [np.array([sum(x < y for x in v) + (sum(x == y for x in v) - 1) / 2 for y in v]) for v in (a, b)]
    first, second = (r - r.mean() for r in ranks)
    return (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())


def test_layouts_that_are_measured_go_from_the_best_to_the_worst():
    found = cheapest(job(8, batch=8), config(batch=8), 100)[0]
    some = spread(found, 4)
    assert len(some) == 4 and some[0] is found[0] and some[-1] is found[-1]
    assert spread(found, 1000) == found
    lines = list(compare.report(some, [c.seconds * 2 for c in some], [c.memory / 2 for c in some]))
    assert len(lines) == 4 + 4
    assert all("2.00x" in line and "0.50x" in line for line in lines[1:5])
    assert "Spearman): 1.00" in lines[5]
    fastest = min(c.seconds for c in some)
    assert f"{some[0].seconds / fastest:.2f} times as long" in lines[7]


def test_a_call_in_a_node_costs_a_change_of_ranks_where_they_share_cores():
    """For each rank more than one on a core; over a network the cores do not matter, and rounds do."""
    machines = [Machine(cores=cores, per_node=4) for cores in (8, 4, 2, 1)]
    seconds = [m.collective("all_gather", 4, 1, 0.0)[0] - NODE.alpha - m.per_op for m in machines]
    assert seconds == pytest.approx([0, 0, SWITCH, 3 * SWITCH])
    assert Machine(cores=1, per_node=1).collective("all_gather", 4, 1, 0.0)[0] == pytest.approx(3 * NETWORK.alpha)


def test_cores_that_do_less_together_make_waiting_for_one_another_cheap():
    """Two cores that are threads of one: a pipeline of two stages takes no longer than both ranks at once."""
    layouts = [Layout(2, micro_batch=8), Layout(pp=2, micro_batch=8)]
    for together, least in ((1.0, 1.4), (0.5, 0.9)):
        task = job(2, batch=16, cores=2, per_node=2, together=together)
        whole, piped = (cost(task, each, work(task, each, stages(task.profile, each))).seconds for each in layouts)
        assert least < piped / whole < least + 0.25


@pytest.mark.parametrize("model", ["gpt", "llama", "mlp"])
def test_a_grid_of_ranks_has_a_block_of_everything(model):
    """Parameters are those of the flat buffers of a real run, on the fullest of four ranks."""
    here = config(model, 8, parallel={"tp": 4, "tensor": "2d"})

    def sizes(comm):
        trainer = training.trainer(
            comm, model=MODELS[model], data=_data(here), train=_train(here, micro_batch=8, global_batch=8),
            parallel={"tp": 4, "tensor": "2d"},
        )  # fmt: skip
        return sum(group.data.nbytes for group in trainer.flat.groups), trainer.data

    held = run_threads(4, sizes)
    task = Job(profile(here, held[0][1]), Machine(), 4, 8, "adamw")
    layout = Layout(tp=4, tensor="2d", micro_batch=8)
    found = cost(task, layout, work(task, layout, stages(task.profile, layout)))
    assert found.parameters == pytest.approx(max(nbytes for nbytes, _ in held), rel=0.05)  # biases count as matrices
    line, alone = Layout(tp=4, micro_batch=8), Layout(micro_batch=8)
    one, whole = (cost(task, each, work(task, each, stages(task.profile, each))) for each in (line, alone))
    assert found.activations == pytest.approx(whole.activations / 4)
    assert found.activations < one.activations and found.tensor > one.tensor


def test_what_a_grid_broadcasts_is_what_the_page_says():
    """7 b s h along rows and 12 h² along columns in a block; samples of a microbatch are shared out over the rows."""
    task = job(8)
    block, boundary = task.profile.blocks[0], task.profile.boundary
    assert block.fed == pytest.approx(7 * boundary) and block.made == pytest.approx(9 * boundary)
    assert (block.matrices, block.norms) == (4, 2)
    assert block.parameters.units + block.parameters.heads == pytest.approx(12 * 64**2, rel=0.02)
    found = {(c.layout.tp, c.layout.grid, c.layout.micro_batch) for c in everything(task, config())
             if c.layout.tensor == "2d"}  # fmt: skip
    assert {(tp, grid) for tp, grid, _ in found} == {(4, (2, 2)), (8, (2, 4))}
    assert {micro_batch for *_, micro_batch in found} == {2, 4, 8, 16}
    some = next(c for c in everything(task, config()) if c.layout.tensor == "2d")
    assert "SUMMA" in " ".join(report.reasons(task, some)) and "parallel.tensor=2d" in plan.as_overrides(some)


@pytest.mark.parametrize("cp", [2, 4])
def test_a_ring_multiplies_many_small_blocks(cp):
    """Beyond the FLOPs, which it has in common with attention in one piece."""
    task = job(cp, cores=8, per_node=8)
    ring, ulysses, one = (
        attention(task, Layout(cp=size, context=context, micro_batch=4))
        for size, context in ((cp, "ring"), (cp, "ulysses"), (1, "ring"))
    )
    assert ulysses == pytest.approx(one / cp)
    heads = 4 * GPT["heads"] * task.machine.per_head
    assert ring - ulysses > (2 * cp + 1 - 2 / cp) * heads * 0.99  # runs of a ring are shorter than 64 tokens


def test_a_rank_shares_its_core_while_gradients_are_summed():
    layout = Layout(4, micro_batch=2)
    alone, shared = (job(4, batch=8, cores=cores, per_node=4) for cores in (4, 1))
    one, four = (cost(task, layout, work(task, layout, stages(task.profile, layout))).data for task in (alone, shared))
    assert four == pytest.approx(4 * (one + 3 * SWITCH))
