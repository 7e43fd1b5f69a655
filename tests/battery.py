"""Every combination of strategies that fits into 8 ranks, each compared with one process in float64.

    dp x tp x pp <= 8   x   data_parallel (5, zero also with copies)   x   schedule (6)   x   tensor (3)   x   recompute
    x   three models    =   all_cases();   covering(cases): a part in which every pair of options still meets

DTRAIN_BATTERY=all python -m pytest tests/unit/test_battery.py -q runs all of them over 5 steps, DTRAIN_BATTERY=3/12 the
third of twelve parts; without it a covering part runs over 2 steps, on threads and, for their number of ranks, under
mpirun. `make battery` runs all in parts.

All five axes, with cp or ep among them and mixtures of experts as a fourth model, are `wide_cases()` on 8 ranks; of
them a covering part runs in `make battery`, and its first eight otherwise.

What comes along: several microbatches per rank, fewer of them than stages (SHORT), one block more than stages, heads
and vocabulary that tp does not divide or has fewer of, dropout, tied and untied ends, AdamW with clipping.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from dtrain.collectives import Communicator
from dtrain.launch.verify import Reference, Report, Tolerance, comparable, verify
from dtrain.strategies.pipeline.schedules import SCHEDULES
from tests import training

RANKS = 8
STEPS = 5 if "DTRAIN_BATTERY" in os.environ else 2
TOLERANCE = Tolerance(1e-9, "asked for")
TENSOR = {"1d": {}, "sequence": {"sequence": True}, "2d": {"tensor": "2d"}}
SHORT = ("gpipe", "zb_h1")  # schedules that are given two microbatches, however many stages

SMALL: dict[str, Any] = {"dim": 16, "heads": 4, "sequence": 4}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "gpt", "dropout": 0.1, **SMALL},
    "llama": {
        "kind": "gpt", "norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False, "tied": False,
        "kv_heads": 2, "hidden": 13, **SMALL,
    },
    "bert": {"kind": "bert", "mask_fraction": 0.4, **SMALL},
    "moe": {
        "kind": "moe_gpt", "dropout": 0.1, "moe": {"top": 2, "capacity": 1.0, "noise": 0.3, "z_loss": 0.01}, **SMALL,
    },
}  # fmt: skip
DENSE = ("gpt", "llama", "bert")
DATA = [
    ("naive", False), ("ddp", False), *((f"zero{stage}", copies) for stage in (1, 2, 3) for copies in (False, True))
]  # fmt: skip


class Case(NamedTuple):
    """One combination; None where an axis of size 1 leaves no choice."""

    dp: int
    tp: int
    pp: int
    data: tuple[str, bool] | None
    schedule: str | None
    tensor: str | None
    recompute: bool
    model: str
    cp: int = 1
    ep: int = 1
    context: str | None = None

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp * self.cp * self.ep

    def __str__(self) -> str:
        data = "" if self.data is None else f" {self.data[0]}{' copies' if self.data[1] else ''}"
        more = [f" {self.schedule}"] * (self.pp > 1) + [f" {self.tensor}"] * (self.tensor is not None)
        more += [" recompute"] * self.recompute + [f" cp{self.cp} {self.context}"] * (self.cp > 1)
        more += [f" ep{self.ep}"] * (self.ep > 1)
        return f"dp{self.dp} tp{self.tp} pp{self.pp}{data}{''.join(more)} {self.model}"

    @property
    def options(self) -> list[tuple[str, Any]]:
        shown = self._replace(**{axis: min(getattr(self, axis), 3) for axis in ("dp", "tp", "pp", "cp", "ep")})
        return list(zip(self._fields, shown, strict=True))


def all_cases(ranks: Sequence[int] = range(2, RANKS + 1)) -> list[Case]:
    """All, in a fixed order."""
    sizes = range(1, RANKS + 1)
    return [
        Case(dp, tp, pp, data, schedule, tensor, recompute, model)
        for dp, tp, pp in itertools.product(sizes, repeat=3)
        if dp * tp * pp in ranks
        for data in (DATA if dp > 1 else [None])
        for schedule in (SCHEDULES if pp > 1 else [None])
        for tensor in (TENSOR if tp > 1 else [None])
        for recompute in (False, True)
        for model in DENSE
    ]


def wide_cases(ranks: int = RANKS) -> list[Case]:
    """Those on so many ranks that have cp or ep, in a fixed order."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [
        Case(dp, tp, pp, data, schedule, tensor, recompute, model, cp, ep, context)
        for dp, tp, pp, cp, ep in itertools.product(sizes, repeat=5)
        if dp * tp * pp * cp * ep == ranks and cp * ep > 1
        for data in (DATA if dp * ep > 1 else [None])
        for schedule in (SCHEDULES if pp > 1 else [None])
        for tensor in (("1d", "sequence") if tp > 1 else [None])
        for recompute in (False, True)
        for model in (MODELS if ep == 1 else ["moe"])
        for context in (("ring", "ulysses") if cp > 1 else [None])
        if context != "ulysses" or cp * tp <= SMALL["heads"]
    ]


def covering(cases: Sequence[Case], limit: int | None = None) -> list[Case]:
    """A part of the cases in which every two options that occur together in any do so (sizes of axes as 1, 2, or more):
    the greedy choice, always the first of those with most pairs that are still missing, small meshes first. `limit`:
    the best so many."""
    ordered = sorted(cases, key=lambda case: case.ranks)  # stable
    bits: dict[Any, int] = {}
    masks = [0] * len(ordered)
    for i, case in enumerate(ordered):
        for pair in itertools.combinations(case.options, 2):
            masks[i] |= 1 << bits.setdefault(pair, len(bits))
    missing = (1 << len(bits)) - 1
    chosen: list[Case] = []
    while missing and len(chosen) != limit:
        best = max(range(len(ordered)), key=lambda i: (masks[i] & missing).bit_count())
        chosen.append(ordered[best])
        missing &= ~masks[best]
    return chosen


def piece(cases: Sequence[Case], asked: str) -> list[Case]:
    """What DTRAIN_BATTERY asks for: "all", or "3/12" for the third of twelve parts."""
    number, _, of = ("1/1" if asked == "all" else asked).partition("/")
    return list(cases[int(number) - 1 :: int(of)])


def sections(case: Case) -> dict[str, Any]:
    """The configuration of a case."""
    batch = 20 if 5 in (case.dp, case.pp) else 28 if 7 in (case.dp, case.pp) else 24
    stages = case.pp * (SCHEDULES[case.schedule].chunks if case.schedule else 1)
    share = batch // (case.dp * case.ep)
    count = next(n for n in (2, 3, 5, 7, 1) if share % n == 0)
    if case.pp > 1 and case.schedule not in SHORT:
        count = case.pp
    axes = {axis: getattr(case, axis) for axis in ("dp", "tp", "pp", "cp", "ep")}
    parallel: dict[str, Any] = {**axes, "context": case.context or "ring", "bucket_mb": 0.01}
    if case.data is not None:
        parallel |= {"data_parallel": case.data[0], "replicate": case.data[1]}
    if case.tensor is not None:
        parallel |= TENSOR[case.tensor]
    return {
        "model": {**MODELS[case.model], "layers": stages + 1, "sequence": max(SMALL["sequence"], case.cp)},
        "data": {"kind": "text", "path": argparse.__file__},
        "train": {
            "steps": STEPS, "global_batch": batch, "micro_batch": share // count, "dtype": "float64",
            "recompute": case.recompute,
        },
        "parallel": parallel,
        "pipeline": {"schedule": case.schedule or "1f1b"},
    }  # fmt: skip


@cache
def _reference(model: str, layers: int, sequence: int, batch: int) -> Reference:
    """Recomputation and microbatches are the layout's: the reference has neither."""
    config = training.config(
        model={**MODELS[model], "layers": layers, "sequence": sequence},
        data={"kind": "text", "path": argparse.__file__},
        train={"steps": STEPS, "global_batch": batch, "micro_batch": batch, "dtype": "float64"},
    )
    return Reference.train(comparable(config, STEPS), STEPS)


def reference(case: Case) -> Reference:
    """One process on the data and the model of a case; kept."""
    changed = sections(case)
    model = changed["model"]
    return _reference(case.model, model["layers"], model["sequence"], changed["train"]["global_batch"])


def run(comm: Communicator, case: Case) -> Report:
    """Compare a case with one process on exactly its ranks. Collective."""
    mine = reference(case) if comm.rank == 0 else None
    return verify(training.config(**sections(case)), comm, STEPS, TOLERANCE, mine or Reference())
