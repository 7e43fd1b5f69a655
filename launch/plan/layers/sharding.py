"""ZeRO along the data axis of a plan that runs: what it changes of sums over parameters, of their update and of memory.

    ddp      all_reduce of the gradients                    every rank holds and updates all that tp leaves
    zero1    reduce_scatter, all_gather of parameters       optimizer 1/dp, update 1/dp
    zero2    the same                                       gradients 1/dp too
    zero3    reduce_scatter, all_gather twice               parameters 1/dp too

In a node ranks share one copy of the parameters: nothing is gathered, and they are 1/dp from zero1 on. How ops are cut
does not depend on it, so the assignment that was found stays, and only its sums change. One microbatch, as all of
`--layers`; room for blocks whose gradients or parameters are whole for a moment is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dtrain.launch.plan.costs import PASSES, STATES
from dtrain.launch.plan.layers.problem import Assignment
from dtrain.launch.plan.layers.runnable import Plan

GATHERS = {"zero1": 1, "zero2": 1, "zero3": 2}


def sharded(plan: Plan, found: Assignment) -> Iterator[tuple[Plan, Assignment]]:
    """The plan as it is, and with each stage of ZeRO."""
    yield plan, found
    if plan.dp == 1:
        return
    devices, machine = found.problem.devices, found.problem.devices.machine
    states = STATES[found.problem.optimizer]
    held = [choice.held / (2 + states) for choice in found.choices if choice.held]  # bytes of parameters on a rank
    data, inside, away = 0, devices.inside(0), 1 - 1 / plan.dp  # axis dp is the first

    def seconds(kind: str) -> float:
        return sum(devices.collective(kind, data, nbytes) for nbytes in held)

    pass_over = PASSES * sum(held) * (2 + states) / machine.bandwidth / machine.threads() * machine.crowd()
    for kind, gathers in GATHERS.items():
        gathered = 0.0 if inside else gathers * seconds("all_gather")
        time = seconds("all_reduce") - seconds("reduce_scatter") - gathered + away * pass_over
        parts = states + (kind != "zero1") + (inside or kind == "zero3")
        yield replace(plan, data_parallel=kind), replace(found, spared=(time, away * parts * sum(held)))
