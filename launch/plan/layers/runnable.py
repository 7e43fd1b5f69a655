"""The plans that strategies can run (`parallel.plan`), as restrictions of the search: how each op is cut under them.

    axis dp      samples, everywhere
    axis tp      by style: attention   qkv columns, heads, out rows             head        columns, loss by vocabulary
                           mlp         up columns, width, down rows             vocabulary  rows of the embedding
                           column_gather  columns, then whole                   samples     all blocks by samples
                 what lies between: whole, or by tokens with `parallel.sequence`

How tensors wait for several readers stays free. So pure data parallelism, Megatron's plan and every mixture cost what
the search over all layouts would count for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dtrain.config.rules import divisors
from dtrain.graph import Graph, Leaf, Line
from dtrain.launch.plan.layers.problem import Assignment, Impossible, Problem
from dtrain.launch.plan.layers.rules import cuts
from dtrain.launch.plan.layers.states import Devices
from dtrain.launch.plan.machine import Machine
from dtrain.strategies.tensor.plans import PLANS, of_samples

# (style, op, end of the weight's name) -> the cut; "" fits any
STYLES: dict[tuple[str, str, str], str] = {
    ("attention", "linear", "qkv"): "columns",
    ("attention", "packed_attention", ""): "heads",
    ("attention", "linear", "out"): "rows",
    ("mlp", "linear", "up"): "columns",
    ("mlp", "linear", "gate"): "columns",
    ("mlp", "gelu", ""): "width",
    ("mlp", "swiglu", ""): "width",
    ("mlp", "linear", "down"): "rows",
    ("head", "linear", ""): "columns",
    ("vocabulary", "embedding", ""): "vocabulary",
    ("column_gather", "linear", ""): "columns",
}


@dataclass(frozen=True)
class Plan:
    """Degrees, and styles by path as in `parallel.plan`."""

    dp: int
    tp: int = 1
    styles: Mapping[str, str] = field(default_factory=dict)
    sequence: bool = False
    data_parallel: str = "ddp"

    def cut(self, line: Line) -> tuple[str, ...]:
        """How it cuts an op along its axes, those of size 1 left out."""
        names = {cut.name for cut in cuts(line, 1 << 30)}
        samples = "samples" if "samples" in names else "-"
        return (samples,) * (self.dp > 1) + (self._tensor(line, samples),) * (self.tp > 1)

    def _tensor(self, line: Line, samples: str) -> str:
        path = module(line)
        if of_samples(self.styles) and path.startswith("blocks."):
            return samples
        if line.op == "cross_entropy" and "head" in self.styles.values():
            return "vocabulary"
        for pattern, style in self.styles.items():
            for name in (path, path.rpartition(".")[0]):  # its own path, or that of the branch that it is in
                if re.fullmatch(pattern, name):
                    last = path.rpartition(".")[2]
                    found = STYLES.get((style, line.op, last)) or STYLES.get((style, line.op, ""))
                    if found:
                        return found
        return "tokens" if self.sequence and path.startswith("blocks.") else "-"

    def overrides(self, batch: int) -> str:
        """As arguments of `dtrain run`."""
        parts = [f"parallel.dp={self.dp}", f"parallel.tp={self.tp}"] + ["parallel.sequence=true"] * self.sequence
        parts += [f"parallel.data_parallel={self.data_parallel}"] * (self.dp > 1)
        if self.tp > 1:
            styles = ", ".join(f"{_quoted(pattern)}: {style}" for pattern, style in self.styles.items())
            parts.append(f'"parallel.plan={{{styles}}}"')
        return " ".join([*parts, f"train.micro_batch={batch // self.dp}"])

    def __str__(self) -> str:
        styles = ", ".join(f"{pattern}: {style}" for pattern, style in self.styles.items())
        sharded = f" {self.data_parallel}" * (self.data_parallel != "ddp")
        return f"dp={self.dp}{sharded} tp={self.tp}" + f" {{{styles}}}" * (self.tp > 1) + " sequence" * self.sequence


def module(line: Line) -> str:
    """The path of the module whose weight an op uses, else of the one that it runs in."""
    weights = [s.name for s in line.inputs if isinstance(s, Leaf) and s.trained and s.name.endswith(".weight")]
    if weights and line.op in ("linear", "embedding", "embedding_bag"):
        name = weights[-1].removesuffix(".weight")
        return "head" if line.op == "linear" and name == "embedding" else name  # tied
    return line.scope


def candidates(graph: Graph, ranks: int, batch: int) -> Iterator[Plan]:
    """All that are looked at."""
    leaves = {leaf.name: leaf for leaf in graph.leaves if leaf.trained}
    transformer = any(name.endswith("attention.qkv.weight") for name in leaves)
    full = PLANS["transformer" if transformer else "mlp"]
    has_blocks = any(name.startswith("blocks.") for name in leaves)
    parts = [p for p in full if p.startswith("blocks") and not p.endswith("moe") and has_blocks]
    inside = [{p: full[p] for i, p in enumerate(parts) if number >> i & 1} for number in range(2 ** len(parts))]
    ends = [{"head": "head"}, {}]
    if transformer:
        tied = "head.weight" not in leaves
        ends = [{"embedding": "vocabulary", **end} if end or not tied else {} for end in ends]
        ends += [] if tied else [{"head": "head"}, {}]
    for tp in divisors(ranks):
        dp = ranks // tp
        if batch % dp:
            continue
        if tp == 1:
            yield Plan(dp)
            continue
        for end in ends:
            for styles in inside:
                yield from (Plan(dp, tp, end | styles) for _ in range(bool(end | styles)))
                if transformer and len(styles) == len(parts):
                    yield Plan(dp, tp, end | styles, sequence=True)
            if has_blocks:
                yield Plan(dp, tp, {"blocks": "samples"} | end)


def megatron(plan: Plan, graph: Graph) -> bool:
    """Whether it cuts all that can be."""
    full = PLANS["transformer" if any("attention" in line.scope for line in graph.lines) else "mlp"]
    return plan.tp > 1 and set(plan.styles) >= {pattern for pattern in full if not pattern.endswith("moe")}


def costed(plan: Plan, graph: Graph, machine: Machine, heads: int, optimizer: str) -> Assignment | None:
    """The plan with all its costs; None where some op cannot be cut so finely."""
    devices = Devices(tuple(size for size in (plan.dp, plan.tp) if size > 1) or (1,), machine)
    wanted = {line.number: plan.cut(line) or ("-",) for line in graph.lines}
    try:
        return Problem.of(graph, devices, heads, optimizer, lambda line, names: names == wanted[line.number]).solve()
    except Impossible:
        return None


def _quoted(pattern: str) -> str:
    return pattern if re.fullmatch(r"\w+", pattern) else f"'{pattern}'"
