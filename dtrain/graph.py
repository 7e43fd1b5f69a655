"""The graph of a computation as data: what ran, on which shapes, at what cost, in the order in which it ran.

    with tracing():
        loss = model.loss(batch)          # before its backward, which frees the tape
    graph = capture(loss)
    print(table(graph)); to_svg(graph, "graph.svg")

A line of the graph is an op; its inputs are earlier lines or leaves (parameters and constants). The order is that of
the forward: it is a valid schedule. FLOPs are those of the forward (the backward of a matrix product costs twice as
much); bytes are those of the output, also where NumPy made it a view.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtrain.op import Shape
from dtrain.tape import GraphError, Node, tracing
from dtrain.tensor import Tensor

__all__ = ["Graph", "Leaf", "Line", "capture", "dot", "nodes", "svg", "table", "to_json", "to_svg", "tracing"]


@dataclass(frozen=True)
class Leaf:
    """A tensor that was not computed: a parameter (`trained`) or a constant."""

    name: str
    shape: Shape
    dtype: str
    bytes: int
    trained: bool

    @property
    def label(self) -> str:
        """The last word of the name."""
        return self.name.rpartition(".")[2] or ("parameter" if self.trained else "constant")


@dataclass(frozen=True)
class Line:
    """One op: `inputs` are numbers of earlier lines, or leaves."""

    number: int
    op: str
    scope: str
    inputs: tuple[int | Leaf, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    dtype: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Graph:
    """All lines in the order of the forward."""

    lines: tuple[Line, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward."""
        return sum(line.flops for line in self.lines)

    @property
    def bytes(self) -> int:
        """The bytes of all outputs together."""
        return sum(line.bytes for line in self.lines)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every leaf once, in the order of first use."""
        found = {id(source): source for line in self.lines for source in line.inputs if isinstance(source, Leaf)}
        return tuple(found.values())

    @property
    def num_parameters(self) -> int:
        """How many trained numbers the graph uses; a shared parameter counts once."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves if leaf.trained)


def capture(loss: Tensor) -> Graph:
    """The graph that computed `loss`. Under `tracing()` lines know their scope, and recomputed segments are seen."""
    recorded = nodes(loss)
    numbers = {node: number for number, node in enumerate(recorded)}
    leaves: dict[Tensor, Leaf] = {}
    return Graph(tuple([_line(node, numbers, leaves) for node in recorded]))


def nodes(loss: Tensor) -> list[Node]:
    """The records behind `loss`, in the order of the forward."""
    if loss.node is None:
        raise GraphError("the tensor has no graph: it is a leaf, needs no gradient, or was computed under no_grad()")
    seen: set[Node] = {loss.node}
    stack = [loss.node]
    while stack:
        node = stack.pop()
        if not node.inputs:
            raise GraphError(f"the graph behind {node.op.name} was freed by a backward: capture it before")
        for source in node.inputs:
            if isinstance(source, Node) and source not in seen:
                seen.add(source)
                stack.append(source)
    return sorted(seen, key=lambda node: node.order)


def _line(node: Node, numbers: dict[Node, int], leaves: dict[Tensor, Leaf]) -> Line:
    inputs: list[int | Leaf] = []
    for source in node.inputs:
        if isinstance(source, Node):
            inputs.append(numbers[source])
        else:
            inputs.append(leaves.setdefault(source, _leaf(source)))
    size = math.prod(node.shape) * node.dtype.itemsize
    flops = int(node.op.flops(node.shapes, node.shape, node.attributes))
    return Line(
        numbers[node], node.op.name, node.scope, tuple(inputs), node.shapes, node.shape, str(node.dtype), flops, size
    )


def _leaf(tensor: Tensor) -> Leaf:
    name = getattr(tensor, "name", "")
    return Leaf(
        name, tensor.shape, str(tensor.dtype), math.prod(tensor.shape) * tensor.dtype.itemsize, tensor.requires_grad
    )


def table(graph: Graph) -> str:
    """The graph as text, one line per op and the totals."""
    rows = [("", "op", "inputs", "output", "FLOP", "bytes", "scope")]
    for line in graph.lines:
        inputs = " ".join([f"#{s}" if isinstance(s, int) else s.label for s in line.inputs])
        shape = "×".join(map(str, line.shape)) or "scalar"
        rows.append((f"#{line.number}", line.op, inputs, shape, short(line.flops), short(line.bytes, 1024), line.scope))
    rows.append(("", "total", "", "", short(graph.flops), short(graph.bytes, 1024), f"{len(graph.lines)} ops"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(["  ".join([cell.ljust(w) for cell, w in zip(row, widths, strict=True)]).rstrip() for row in rows])


def to_json(graph: Graph) -> str:
    """The lines as JSON, for other programs: an input is the number of a line, or a leaf."""
    return json.dumps([asdict(line) for line in graph.lines], indent=1) + "\n"


def dot(graph: Graph) -> str:
    """The graph in the language of Graphviz; parameters as boxes, constants left out."""
    rows = ["digraph {", "  node [shape=plain]"]
    for line in graph.lines:
        rows.append(f'  {line.number} [label="{line.op} {list(line.shape)}\\n{line.scope}"]')
        for source in line.inputs:
            if isinstance(source, int):
                rows.append(f"  {source} -> {line.number}")
            elif source.trained:
                rows.append(f'  "{source.name}" [shape=box, label="{source.name} {list(source.shape)}"]')
                rows.append(f'  "{source.name}" -> {line.number}')
    return "\n".join([*rows, "}"]) + "\n"


def short(count: int, base: int = 1000) -> str:
    """1234567 -> "1.23M"; with base 1024 "1.18Mi"."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= base and len(units) > 1:
        value /= base
        units.pop(0)
    if not units[0]:
        return str(count)
    return f"{value:.3g}{units[0].upper() + 'i' if base == 1024 else units[0]}"


def svg(source: Graph | Tensor) -> str:
    """The picture of a graph, or of the graph that computed a tensor, as the text of an SVG file."""
    from dtrain.graph_svg import draw

    return draw(source if isinstance(source, Graph) else capture(source))


def to_svg(source: Graph | Tensor, path: Any) -> None:
    """Write the picture to a file."""
    Path(path).write_text(svg(source), encoding="utf-8")
