"""The search over layouts of every layer: brute force, conversions against arrays, course checks 51 to 54, K1 to K5."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain import redistribute
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.graph import Graph, Leaf, Line
from dtrain.launch import plan
from dtrain.launch.plan.costs import PASSES
from dtrain.launch.plan.layers import elimination, sharding
from dtrain.launch.plan.layers.problem import Problem
from dtrain.launch.plan.layers.recording import heads, recorded
from dtrain.launch.plan.layers.runnable import Plan, candidates, costed
from dtrain.launch.plan.layers.states import Devices, meshes
from dtrain.launch.plan.machine import PROGRAM, Machine
from dtrain.layout import Layout, Partial, Replicate, Shard
from tests import training
from tests.unit.test_tensor_parallel import TRAIN, compare

MACHINE = Machine(cores=8, per_node=8, flops=5e10, bandwidth=5e9)
SIZES = SimpleNamespace(vocabulary=256, features=64)
GPT = {"kind": "gpt", "layers": 2, "dim": 64, "heads": 4, "sequence": 128}


def leaf(name, *shape):
    return Leaf(name, shape, "float32", 4 * int(np.prod(shape)), True)


def line(number, op, inputs, shapes, shape, flops=10**6):
    return Line(number, op, f"layer{number}", tuple(inputs), tuple(shapes), shape, "float32", flops,
                4 * int(np.prod(shape)))  # fmt: skip


def chain(rows, *widths):
    """Products in a row, from a constant (rows, widths[0])."""
    lines, source = [], Leaf("", (rows, widths[0]), "float32", 0, False)
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        weight = leaf(f"layer{i}.weight", n, k)
        lines.append(line(i, "linear", [source, weight], [(rows, k), (n, k)], (rows, n), 2 * rows * k * n))
        source = i
    return Graph(tuple(lines))


def residual():
    """A product x = a(c); y = relu(x) + x; z = y w, w also the weight of x: a join, a shared parameter."""
    weight = leaf("a.weight", 64, 64)
    constant = Leaf("", (32, 64), "float32", 0, False)
    return Graph((
        line(0, "linear", [constant, weight], [(32, 64), (64, 64)], (32, 64)),
        line(1, "relu", [0], [(32, 64)], (32, 64)),
        line(2, "add", [1, 0], [(32, 64), (32, 64)], (32, 64)),
        line(3, "linear", [2, weight], [(32, 64), (64, 64)], (32, 64)),
    ))  # fmt: skip


@pytest.mark.parametrize("graph", [chain(16, 64, 512, 8), residual()], ids=["chain", "residual"])
@pytest.mark.parametrize("sizes", [(2,), (4,)])
def test_the_search_equals_brute_force(graph, sizes):
    problem = Problem.of(graph, Devices(sizes, MACHINE), 1, "adamw")
    own, between = problem.costs()
    everything = itertools.product(*(range(len(costs)) for costs in own))
    least = min(elimination.value(own, between, chosen) for chosen in everything)
    found = problem.solve()
    assert found.seconds == pytest.approx(least, rel=1e-12)


def test_elimination_equals_brute_force_on_any_graph():
    """Also where every variable meets every other."""
    rng = np.random.default_rng(0)
    own = [rng.random(n) for n in (3, 2, 4, 3, 2)]
    for pairs in (list(itertools.combinations(range(5), 2)), [(0, 3), (1, 3), (3, 4)], []):
        between = {(v, w): rng.random((len(own[v]), len(own[w]))) for v, w in pairs}
        total, chosen = elimination.cheapest(own, between)
        all_of_them = itertools.product(*(range(len(costs)) for costs in own))
        assert total == pytest.approx(min(elimination.value(own, between, each) for each in all_of_them))
        assert total == pytest.approx(elimination.value(own, between, chosen))


def calls(graph, sizes, wanted):
    """The collectives between layers when ops are cut as `wanted` says."""
    found = Problem.of(graph, Devices(sizes, MACHINE), 1, "adamw", lambda at, names: names == wanted[at.number]).solve()
    steps = [s for e in found.problem.edges for s in found.problem.devices.steps(e.bytes, *found.ends(e))]
    return [step.kind for step in steps if not step.backward]


def test_redistributions_that_are_inserted():
    """Check 52: (4,1) then (1,4) one all_gather; column then row no gather, one all_reduce where the sum is needed."""
    graph = chain(16, 64, 64, 64, 64)
    assert calls(graph, (4,), [("samples",), ("columns",), ("-",)])[:1] == ["all_gather"]
    assert calls(chain(16, 64, 64, 64), (4,), [("samples",), ("columns",)]) == ["all_gather"]
    assert calls(graph, (4,), [("columns",), ("rows",), ("-",)]) == ["all_reduce"]
    two = Devices((2, 2), MACHINE)  # check 51: from any of the four layouts of a matrix to any other
    layouts = [("R", "R"), ("S0", "R"), ("R", "S1"), ("S0", "S1")]
    for a, b in itertools.product(layouts, layouts):
        forward = [step.kind for step in two.steps(1024, a, b) if not step.backward]
        assert forward == ["all_gather"] * sum(x != "R" and y == "R" for x, y in zip(a, b, strict=True))


TENSOR = {"R": Replicate(), "C": Replicate(), "S0": Shard(0), "S1": Shard(1), "P": Partial()}
GRADIENT = TENSOR | {"C": Partial(), "P": Replicate()}


@pytest.mark.parametrize("axes", [("dp",), ("dp", "tp")])
def test_conversions_are_those_of_redistribute(axes):
    """Forward the tensor's, backward the gradient's the other way: the same collectives as `redistribute` plans."""
    devices = Devices((2,) * len(axes), MACHINE)

    def planned(table, source, target):
        layouts = [
            Layout(**{axis: table[s] for axis, s in zip(axes, states, strict=True)}) for states in (source, target)
        ]
        return sorted(step.name for step in redistribute.plan(*layouts) if step.name not in ("slice", "zeros"))

    layouts = [
        states for states in itertools.product(TENSOR, repeat=len(axes)) if states not in (("S0",) * 2, ("S1",) * 2)
    ]
    for source, target in itertools.product(layouts, layouts):
        steps = devices.steps(1024, source, target)
        forward = sorted(step.kind for step in steps if not step.backward)
        backward = sorted(step.kind for step in steps if step.backward)
        moved = {"S0", "S1"} & set(source) & set(target) and len(axes) == 2
        if not moved:  # a dim that goes from one axis to the other needs a way round that may differ
            assert forward == planned(TENSOR, source, target), (source, target)
            assert backward == planned(GRADIENT, target, source), (source, target)


def test_a_graph_of_another_batch_and_length_is_the_one_that_would_be_recorded():
    here = training.config(model=GPT, train={"dtype": "float32", "global_batch": 3, "micro_batch": 3})
    trainer = training.trainer(single(), model=GPT, train={"dtype": "float32", "global_batch": 3, "micro_batch": 3})
    found = recorded(here, trainer.data, 3)
    from dtrain.graph import capture, tracing

    batch, _ = next(trainer.microbatches())
    with tracing():
        expected = capture(trainer.model.loss(batch))
    assert [(a.op, a.shape, a.flops, a.bytes) for a in found.lines] == [
        (b.op, b.shape, b.flops, b.bytes) for b in expected.lines
    ]
    assert found.num_parameters == expected.num_parameters


def search(config, ranks, data=SIZES):
    graph = recorded(config, data, config.train.global_batch)
    best = min((Problem.of(graph, d, heads(config), "adamw").solve() for d in meshes(ranks, MACHINE)),
               key=lambda each: each.seconds)  # fmt: skip
    plans = [(p, costed(p, graph, MACHINE, heads(config), "adamw")) for p in candidates(graph, ranks, 16)]
    return best, [(plan, each) for plan, each in plans if each is not None]


def head_cut(found):
    """How the last product is cut."""
    return next(
        c.names for v, c in reversed(list(zip(found.problem.variables, found.choices, strict=True)))
        if v.line is not None and v.line.op == "linear"
    )  # fmt: skip


@pytest.mark.parametrize(("classes", "cut"), [(131072, True), (None, False)])
def test_a_huge_head_is_cut_and_a_small_one_is_not(classes, cut):
    """Check 54."""
    model = {"kind": "mlp", "hidden": [512, 64], "classes": classes}
    here = training.config(
        model=model, data={"kind": "images", "path": "digits"}, train={"dtype": "float32", "global_batch": 16}
    )
    data = training.trainer(single(), model={"kind": "mlp"}, data={"kind": "images", "path": "digits"}).data
    best, plans = search(here, 8, data)
    chosen, cheapest = min(plans, key=lambda each: each[1].seconds)
    assert ("head" in chosen.styles) == cut
    replicated = next(each for plan, each in plans if plan.tp == 1)
    if cut:
        assert head_cut(best) == ("columns",) * len(best.problem.devices.sizes)
        assert cheapest.seconds < 0.6 * replicated.seconds
    assert best.seconds <= cheapest.seconds * (1 + 1e-12)


def test_without_blocks_only_the_head_can_be_cut():
    data = {"kind": "images", "path": "digits"}
    here = training.config(model={"kind": "mlp", "hidden": []}, data=data, train={"dtype": "float32"})
    _, plans = search(here, 4, training.trainer(single(), model={"kind": "mlp"}, data=data).data)
    assert {tuple(plan.styles) for plan, _ in plans} == {(), ("head",)}


def test_plans_that_run_are_never_cheaper_than_the_search():
    best, plans = search(training.config(model=GPT, train={"dtype": "float32", "global_batch": 16}), 4)
    assert len(plans) > 10
    assert all(each.seconds >= best.seconds * (1 - 1e-12) for _, each in plans)


def test_megatrons_plan_has_its_collectives():
    """Two all_reduces forward and two backward per block, of b·s·h each."""
    here = training.config(model=GPT, train={"dtype": "float32", "global_batch": 16})
    graph = recorded(here, SIZES, 16)
    from dtrain.strategies.tensor.plans import PLANS

    full = {pattern: style for pattern, style in PLANS["transformer"].items() if style != "moe"}
    found = costed(Plan(1, 4, full), graph, MACHINE, 4, "adamw")
    steps = [s for e in found.problem.edges for s in found.problem.devices.steps(e.bytes, *found.ends(e))]
    whole = 16 * 128 * 64 * 4
    assert all(step.kind == "all_reduce" and step.bytes == whole for step in steps)
    blocks = [sum(step.backward is way for step in steps) for way in (False, True)]
    assert blocks == [2 * 2 + 1, 2 * 2 + 1]  # and one for the embedding forward, one for the head backward


@pytest.mark.parametrize("per_node", [8, 1])
def test_zero_of_a_plan_holds_what_the_formulas_say(per_node):
    """Adam, one microbatch: bytes of the ZeRO paper, and the search of degrees counts the same gathers."""
    here = training.config(model=GPT, train={"dtype": "float32", "global_batch": 16})
    machine = Machine(cores=8, per_node=per_node, flops=5e10, bandwidth=5e9)
    graph = recorded(here, SIZES, 16)
    plan_of = Plan(4)
    plain = costed(plan_of, graph, machine, 4, "adamw")
    plans = {each.data_parallel: found for each, found in sharding.sharded(plan_of, plain)}
    psi = 4 * graph.num_parameters
    shared = per_node == 8  # one copy of the parameters in a node
    kept = plain.memory - 4 * psi
    own = {"ddp": 4, "zero1": 1 + shared * -3 / 4 + 1 + 2 / 4, "zero2": 1 + shared * -3 / 4 + 3 / 4, "zero3": 1}
    for kind, parts in own.items():
        assert plans[kind].memory == pytest.approx(kept + parts * psi), kind
        assert plans[kind].compute == plain.compute and plans[kind].moved == plain.moved
    update = 0.75 * PASSES * 4 * psi / machine.bandwidth / machine.threads()
    gathered = {"zero1": 0, "zero2": 0, "zero3": 0} if shared else {"zero1": 1, "zero2": 1, "zero3": 2}
    calls = sum(choice.held > 0 for choice in plain.choices)  # those of an op together
    rounds = 3 * machine.levels()[not shared].beta * psi / 4  # of one all_gather; alpha apart
    for kind, times in gathered.items():
        spared = plain.parameters - plans[kind].parameters
        alphas = 3 * machine.levels()[1].alpha * calls * (1 - times) * (not shared)
        assert spared == pytest.approx(rounds * (1 - times) + update + alphas, rel=1e-6), kind
    assert len(list(sharding.sharded(Plan(1, 4), plain))) == 1


def test_little_memory_makes_a_plan_of_layers_shard_its_state(capsys):
    here = training.config(model=GPT, train={"dtype": "float32", "global_batch": 16})
    plan.plan(here, 4, None, None, 8, 5e10, None, False, 3, layers=True)
    assert "parallel.dp=4 parallel.tp=1 parallel.data_parallel=ddp" in capsys.readouterr().out.splitlines()[-1]
    graph = recorded(here, SIZES, 16)
    plain = costed(Plan(4), graph, MACHINE, 4, "adamw")
    zero = {each.data_parallel: found.memory for each, found in sharding.sharded(Plan(4), plain)}
    limit = PROGRAM + (zero["ddp"] + zero["zero1"]) / 2
    plan.plan(here, 4, limit, None, 8, 5e10, None, False, 3, layers=True)
    assert "parallel.dp=4 parallel.tp=1 parallel.data_parallel=zero1" in capsys.readouterr().out.splitlines()[-1]


def test_the_chosen_plan_trains_with_equal_loss():
    """Found for four ranks by the search; run by the strategies; compared with one process in float64."""
    model = {"kind": "mlp", "hidden": [32, 8], "classes": 5000}
    sections = {"model": model, "data": {"kind": "images", "path": "digits"}}
    here = training.config(**sections, train={**TRAIN, "dtype": "float64"})
    data = training.trainer(single(), **sections).data
    _, plans = search(here, 4, data)
    chosen, _ = min(plans, key=lambda each: each[1].seconds)
    assert chosen.styles
    parallel = {"dp": chosen.dp, "tp": chosen.tp, "plan": dict(chosen.styles)}

    def train(comm, parallel):
        micro = TRAIN | {"micro_batch": TRAIN["global_batch"] // chosen.dp}
        return training.losses(list(training.trainer(comm, **sections, train=micro, parallel=parallel).run()))

    for losses in run_threads(4, train, parallel):
        np.testing.assert_allclose(losses, train(single(), {}), rtol=1e-10)


def test_a_plan_of_a_transformer_trains_with_equal_loss():
    compare(2, "llama", tp=2, plan={"embedding": "vocabulary", "head": "head", r"blocks\.\d+\.mlp": "mlp"})


def test_what_is_printed(capsys):
    """The huge head is proposed as arguments of a run; a row per op, blocks that are alike in one."""
    head = training.config(
        model={"kind": "mlp", "hidden": [64], "classes": 131072},
        data={"kind": "images", "path": "digits"},
        train={"dtype": "float32", "global_batch": 16},
    )
    plan.plan(head, 4, None, None, 4, 5e10, None, False, 3, layers=True)
    told = capsys.readouterr().out
    assert '"parallel.plan={head: head}"' in told.splitlines()[-1]
    assert "runs: dp=4 tp=1" in told and "any layouts" in told
    with pytest.raises(UserError, match=r"--memory: 101MiB per rank; no plan of layers fits. The least is"):
        plan.plan(head, 4, 101 << 20, None, 4, 5e10, None, False, 3, layers=True)

    gpt = training.config(model={**GPT, "layers": 5}, train={"dtype": "float32", "global_batch": 16})
    lines = {}
    for explain in (False, True):
        plan.plan(gpt, 4, None, None, 4, 5e10, None, explain, 3, layers=True)
        lines[explain] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks.")]
    assert len(lines[True]) >= 5 * 10 > len(lines[False])
    with pytest.raises(UserError, match=r"model.kind: moe_gpt; --layers knows the ops of gpt, bert, mlp, dlrm"):
        plan.plan(training.config(model={**GPT, "kind": "moe_gpt"}), 2, None, None, 2, 1e10, None, False, 3, True)
