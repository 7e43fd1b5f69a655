"""`dtrain plan CONFIG --ranks N --layers`: for every layer how it is cut over the ranks, by dynamic programming.

    recording.py     the recorded graph of a step, for any batch         runnable.py   plans that strategies can run
    rules.py         how each op can be cut along an axis                sharding.py   ZeRO for these
    report.py        what was found, and why
    states.py        layouts of tensors, and redistribution between them
    problem.py       a cost for every choice and every edge   ──►   elimination.py     the cheapest of all assignments

The search is over all layouts on a mesh of one axis or two, and exact. What it finds may mix layouts as no strategy
does; so the cheapest plan that can be run is looked for beside it, among all styles and degrees, at the same costs.
References: Jia et al., "Exploring hidden dimensions", arXiv:1802.04924; Zheng et al. (Alpa), arXiv:2201.12023.
"""

from __future__ import annotations

import time

from dtrain.config import Config
from dtrain.data import data_of
from dtrain.errors import UserError
from dtrain.graph import Graph
from dtrain.launch.plan.layers import report
from dtrain.launch.plan.layers.problem import Assignment, Problem
from dtrain.launch.plan.layers.recording import heads, recorded
from dtrain.launch.plan.layers.runnable import Plan, candidates, costed, megatron
from dtrain.launch.plan.layers.sharding import sharded
from dtrain.launch.plan.layers.states import meshes
from dtrain.launch.plan.machine import PROGRAM, Machine
from dtrain.launch.plan.report import assumed, size
from dtrain.launch.plan.search import ALIKE, ZERO

MODELS = ("gpt", "bert", "mlp", "dlrm")
Costed = tuple[Plan, Assignment]


def plan_layers(config: Config, ranks: int, machine: Machine, explain: bool) -> None:
    """Print the cheapest layouts of every layer, and the cheapest plan that runs."""
    if config.model.kind not in MODELS:
        raise UserError(
            f"model.kind: {config.model.kind}; --layers knows the ops of {', '.join(MODELS)}: how many rows an expert "
            "has is known in the run only. `dtrain plan` without --layers plans mixtures, experts over parallel.ep"
        )
    batch, kv_heads, optimizer = config.train.global_batch, heads(config), config.optimizer.kind
    graph = recorded(config, data_of(config), batch)
    print(f"{config.name}: {len(graph.lines)} ops, {graph.num_parameters:,} parameters, a batch of {batch} samples, "
          f"{ranks} ranks\n{assumed(machine)}\n")  # fmt: skip
    start, choices, best = time.perf_counter(), 0, None
    for devices in meshes(ranks, machine):
        problem = Problem.of(graph, devices, kv_heads, optimizer)
        found, choices = problem.solve(), choices + problem.count
        if best is None or found.seconds < best.seconds:
            best = found
    assert best is not None
    spent = time.perf_counter() - start
    mesh = " x ".join(map(str, best.problem.devices.sizes))
    print(f"The cheapest of all layouts, on a mesh of {mesh} (S0: cut along dim 0):\n")
    print("\n".join(report.table(best, explain)))
    named = [("any layouts", best)]
    plans: list[Costed] = []
    if config.model.kind != "dlrm":
        found_plans = (
            (plan, costed(plan, graph, machine, kv_heads, optimizer)) for plan in candidates(graph, ranks, batch)
        )
        plans = [one for plan, each in found_plans if each is not None for one in sharded(plan, each)]
        named += [(f"runs: {plan}", each) for plan, each in _told(plans, machine, graph)]
    print("\n" + "\n".join(report.totals(named)))
    shapes = len(meshes(ranks, machine))
    print(f"\nsearched {len(graph.lines)} ops on {shapes} meshes, {choices:,} choices, in {spent:.2f} s")
    if plans:
        chosen = _best(plans, machine)
        print(f"The best that runs:\n{chosen[0].overrides(batch)}")
    else:
        print("dlrm runs data-parallel; its tables are cut by parallel.embedding: see dtrain plan without --layers")


def _best(plans: list[Costed], machine: Machine) -> Costed:
    """The cheapest that fits, and of those that are as good the one with fewest styles; if none fits the smallest."""
    fitting = [p for p in plans if p[1].memory + PROGRAM <= machine.memory]
    if not fitting:
        least = min(plans, key=lambda p: p[1].memory)
        raise UserError(
            f"--memory: {size(machine.memory)} per rank; no plan of layers fits. The least is "
            f"{size(least[1].memory + PROGRAM)}, with {least[0]}"
        )
    limit = min(each.seconds for _, each in fitting) * (1 + ALIKE)
    alike = [p for p in fitting if p[1].seconds <= limit]
    return min(alike, key=lambda p: (p[0].tp > 1, len(p[0].styles), ZERO.index(p[0].data_parallel), p[1].seconds))


def _told(plans: list[Costed], machine: Machine, graph: Graph) -> list[Costed]:
    """The best that runs, data parallelism, Megatron's plan in the best degrees, and with all ranks."""
    full = [p for p in plans if megatron(p[0], graph) and p[0].data_parallel == "ddp"]
    widest = [p for p in full if p[0].dp == 1 and not p[0].sequence]
    some = [_best(plans, machine), *(p for p in plans if p[0].tp == 1)]  # with each stage of ZeRO
    some += [min(each, key=lambda p: p[1].seconds) for each in (full, widest) if each]
    return list({str(p[0]): p for p in some}.values())
