"""The search for a step's cheapest layouts: variables, what each choice costs alone, what it costs next to another.

    variable     an op, by how each axis of the mesh cuts it (rules.py)
                 a tensor with several readers: its layout, in which it waits for them, so that one redistribution
                 serves all who want the same
                 a parameter with several readers (tied): its layout
    own cost     products and bytes of the rank's share, forward and backward; sums of the gradients of parameters, and
                 their update
    between      the redistribution of the tensor from its maker's layout to its reader's, and of its gradient back

A parameter of one reader lies as that op wants it. All seconds are those of costs.py: same machine, same ring costs.
Not counted: overlap (`dtrain plan` without --layers knows it). ZeRO changes nothing of what is searched: sharding.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dtrain.arrays import Array
from dtrain.graph import Graph, Leaf, Line
from dtrain.launch.plan.costs import PASSES, STATES
from dtrain.launch.plan.layers import elimination
from dtrain.launch.plan.layers.rules import Cut, cuts
from dtrain.launch.plan.layers.states import Devices, Layout

Allowed = Callable[[Line, tuple[str, ...]], bool]
"""Whether a plan lets an op be cut like this: the names of its cuts, one per axis."""


class Impossible(ValueError):
    """An op cannot be cut as a plan wants it."""


@dataclass(frozen=True)
class Choice:
    """What a variable can be."""

    names: tuple[str, ...]
    """Of the cuts, an axis each."""
    inputs: tuple[Layout, ...]
    output: Layout
    seconds: float = 0.0
    """Of products and elementwise passes."""
    parameters: float = 0.0
    """Seconds of gradient sums, of sums inside the op, and of updates."""
    held: float = 0.0
    """Bytes of parameters on a rank, with gradients and state."""
    kept: float = 0.0
    """Bytes of the output on a rank."""


@dataclass
class Variable:
    """An op, or a tensor with several readers (`line` made it, None: a parameter)."""

    line: Line | None
    leaf: Leaf | None
    waits: bool
    choices: list[Choice]


@dataclass
class Edge:
    """A tensor from one variable to another."""

    source: int
    target: int
    index: int
    """Which input it is."""
    bytes: float


@dataclass
class Problem:
    """All of a graph on a mesh."""

    graph: Graph
    devices: Devices
    heads: int
    optimizer: str
    variables: list[Variable] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    _known: dict[object, list[Choice]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, devices: Devices, heads: int, optimizer: str, allowed: Allowed | None = None) -> Problem:
        """allowed: leaves some of the choices only."""
        self = cls(graph, devices, heads, optimizer)
        readers = Counter(s if isinstance(s, int) else id(s) for line in graph.lines for s in line.inputs)
        where: dict[int, int] = {}  # number of a line, or id of a leaf -> the variable that its readers read
        for line in graph.lines:
            for source, shape in zip(line.inputs, line.input_shapes, strict=True):
                if isinstance(source, Leaf) and source.trained and readers[id(source)] > 1 and id(source) not in where:
                    where[id(source)] = self._add(Variable(None, source, True, self._parameter_choices(source, shape)))
            choices = self._op_choices(line, readers, allowed)
            if not choices:
                raise Impossible(f"{line.op} of {line.scope or 'the model'}")
            number = self._add(Variable(line, None, False, choices))
            for index, (source, shape) in enumerate(zip(line.inputs, line.input_shapes, strict=True)):
                key = source if isinstance(source, int) else id(source)
                if key in where:
                    nbytes = math.prod(shape) * _itemsize(line)
                    self.edges.append(Edge(where[key], number, index, nbytes))
            where[line.number] = number
            if readers[line.number] > 1:
                states = self._known.get(line.shape)
                if states is None:
                    states = [Choice((), (layout,), layout) for layout in self._layouts(line.shape)]
                    self._known[line.shape] = states
                where[line.number] = self._add(Variable(line, None, True, states))
                self.edges.append(Edge(number, where[line.number], 0, line.bytes))
        return self

    def solve(self) -> Assignment:
        """The cheapest."""
        own, between = self.costs()
        _, chosen = elimination.cheapest(own, between)
        return Assignment(self, [v.choices[i] for v, i in zip(self.variables, chosen, strict=True)])

    @property
    def count(self) -> int:
        """Of all choices together."""
        return sum(len(variable.choices) for variable in self.variables)

    def costs(self) -> tuple[list[Array], dict[tuple[int, int], Array]]:
        """Seconds of each choice alone, and of each pair along an edge."""
        own = [np.array([c.seconds + c.parameters for c in variable.choices]) for variable in self.variables]
        between: dict[tuple[int, int], Array] = {}
        known: dict[tuple[float, int, int, int], Array] = {}
        for edge in self.edges:
            source, target = self.variables[edge.source].choices, self.variables[edge.target].choices
            key = (edge.bytes, id(source), id(target), edge.index)
            if key not in known:
                read = [choice.inputs[edge.index] for choice in target]
                known[key] = np.array([[self.devices.seconds(edge.bytes, c.output, b) for b in read] for c in source])
            pair = (edge.source, edge.target)
            between[pair] = between[pair] + known[key] if pair in between else known[key]
        return own, between

    def _add(self, variable: Variable) -> int:
        self.variables.append(variable)
        return len(self.variables) - 1

    def _op_choices(self, line: Line, readers: Counter[int], allowed: Allowed | None) -> list[Choice]:
        readers_of = [isinstance(s, Leaf) and s.trained and readers[id(s)] for s in line.inputs]
        key = (line.op, line.input_shapes, line.shape, line.flops, line.bytes, tuple(readers_of))
        if allowed is None and key in self._known:  # blocks are alike
            return self._known[key]
        devices, found = self.devices, []
        ways = cuts(line, self.heads)
        for way in itertools.product(ways, repeat=len(devices.sizes)):
            names = tuple(cut.name for cut in way)
            if _possible(way, devices.sizes) and (allowed is None or allowed(line, names)):
                found.append(self._op_choice(line, way, names, readers))
        self._known[key] = found
        return found

    def _op_choice(self, line: Line, way: Sequence[Cut], names: tuple[str, ...], readers: Counter[int]) -> Choice:
        devices, machine = self.devices, self.devices.machine
        inputs = tuple(tuple(cut.inputs[i] for cut in way) for i in range(len(line.inputs)))
        output = tuple(cut.output for cut in way)
        pieces = math.prod(size for size, cut in zip(devices.sizes, way, strict=True) if cut.extent)
        work = 3 * (line.flops / machine.flops + line.bytes / machine.bandwidth) / pieces / machine.threads()
        seconds = (work + 3 * machine.per_op) * machine.crowd()
        update, held = 0.0, 0.0
        for source, shape, layout in zip(line.inputs, line.input_shapes, inputs, strict=True):
            if isinstance(source, Leaf) and source.trained and readers[id(source)] == 1:
                sums, here = self._parameter(math.prod(shape) * _itemsize(line), layout)
                update, held = update + sums, held + here
        for axis, cut in enumerate(way):
            if cut.summed:  # of what the other axes leave of the targets
                others = math.prod(s for i, s in enumerate(devices.sizes) if i != axis and way[i].name == "samples")
                update += 3 * devices.collective("all_reduce", axis, 4 * cut.summed / others)
        return Choice(names, inputs, output, seconds, update, held, line.bytes / devices.share(output))

    def _parameter_choices(self, leaf: Leaf, shape: Sequence[int]) -> list[Choice]:
        found = []
        for layout in self._layouts(shape, ("R", "C")):
            seconds, held = self._parameter(leaf.bytes, layout)
            found.append(Choice((), (), layout, 0.0, seconds, held))
        return found

    def _parameter(self, nbytes: float, layout: Layout) -> tuple[float, float]:
        """(seconds of the gradient's sum and the update, bytes held) of a parameter."""
        machine = self.devices.machine
        here = nbytes / self.devices.share(layout)
        sums = sum(self.devices.collective("all_reduce", i, here) for i, state in enumerate(layout) if state == "C")
        held = here * (2 + STATES[self.optimizer])
        return sums + PASSES * held / machine.bandwidth / machine.threads() * machine.crowd(), held

    def _layouts(self, shape: Sequence[int], whole: Sequence[str] = ("R", "C", "P")) -> list[Layout]:
        """All layouts of a tensor."""
        states = [*whole, *(f"S{dim}" for dim in range(len(shape)))]
        return [
            layout for layout in itertools.product(states, repeat=len(self.devices.sizes))
            if all(
                shape[dim] >= math.prod(s for s, at in zip(self.devices.sizes, layout, strict=True) if at == f"S{dim}")
                for dim in range(len(shape))
            )
        ]  # fmt: skip


@dataclass
class Assignment:
    """A choice for every variable."""

    problem: Problem
    choices: list[Choice]
    spared: tuple[float, float] = (0.0, 0.0)
    """Seconds and bytes that ZeRO spares."""

    @property
    def compute(self) -> float:
        """Seconds."""
        return sum(choice.seconds for choice in self.choices)

    @property
    def parameters(self) -> float:
        """Seconds of gradient sums and updates."""
        return sum(choice.parameters for choice in self.choices) - self.spared[0]

    @property
    def moved(self) -> float:
        """Seconds of redistributions."""
        p = self.problem
        return sum(p.devices.seconds(edge.bytes, *self.ends(edge)) for edge in p.edges)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.parameters + self.moved

    @property
    def memory(self) -> float:
        """Bytes of parameters with their state, and of what ops make, on a rank."""
        return sum(choice.held + choice.kept for choice in self.choices) - self.spared[1]

    def ends(self, edge: Edge) -> tuple[Layout, Layout]:
        """The layouts of a tensor at its maker and at its reader."""
        return self.choices[edge.source].output, self.choices[edge.target].inputs[edge.index]


def _itemsize(line: Line) -> int:
    return np.dtype(line.dtype if line.dtype != "bfloat16" else "float16").itemsize


def _possible(way: Sequence[Cut], sizes: Sequence[int]) -> bool:
    """Whether every loop is long enough for all axes that cut it, and summands are not cut at once."""
    return all(
        not cut.extent
        or cut.extent >= math.prod(size for size, other in zip(sizes, way, strict=True) if other.name == cut.name)
        for cut in way
    )
