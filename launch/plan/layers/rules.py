"""How each op can be shared out along one axis of the mesh: a table, one row per kind of op.

An op is a nest of loops, and an axis cuts one of them, or none (every rank then does all of it). What has that loop as
a dim is cut along it; what has not is used whole, and its gradient is partial; where it is a sum, so is the output:

    linear   y(b,t,n) = Σk x(b,t,k) w(n,k)       cut b   x S0  w C   y S0     data parallelism
                                                 cut n   x C   w S0  y S2     column-parallel
                                                 cut k   x S2  w S1  y P      row-parallel

The input of a cut can be a parameter just as well as an activation: state C of a parameter is the gradient sum of data
parallelism. See states.py for the letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.graph import Leaf, Line

Rule = Callable[[Line, int], "list[Cut]"]


@dataclass(frozen=True)
class Cut:
    """One way for one axis."""

    name: str
    inputs: tuple[str, ...]
    output: str
    extent: int
    """Into how many pieces it can be cut at most; 0: no work is saved."""
    summed: int = 0
    """Numbers that the op itself sums over the axis, in three all_reduces."""


def cuts(line: Line, heads: int) -> list[Cut]:
    """All ways of an op, the one that cuts nothing first. heads: key/value heads of an attention."""
    number = len(line.inputs)
    found = [Cut("-", ("R",) * number, "R", 0)]
    rule = RULES.get(line.op, _samples)
    found += [cut for cut in rule(line, heads) if cut.extent > 1]
    if line.op in LINEAR:  # what is linear can be done with summands as well
        inputs = tuple("R" if isinstance(source, Leaf) else "P" for source in line.inputs)
        if "P" in inputs:
            found.append(Cut("summands", inputs, "P", 0))
    return found


def _aligned(line: Line, dims: Sequence[int], names: Sequence[str]) -> list[Cut]:
    """Output dims that inputs have too, aligned at the last dim as in broadcasting."""
    rank, found = len(line.shape), []
    for dim, name in zip(dims, names, strict=True):
        states = []
        for shape in line.input_shapes:
            mine = dim - rank + len(shape)
            states.append(f"S{mine}" if mine >= 0 and shape[mine] == line.shape[dim] else "C")
        found.append(Cut(name, tuple(states), f"S{dim}", line.shape[dim]))
    return found


def _names(line: Line, last: str) -> list[str]:
    """Samples, tokens, and what the last dim is."""
    return [*(["samples", "tokens"] + [f"dim {i}" for i in range(2, 9)])[: len(line.shape) - 1], last]


def _elementwise(line: Line, heads: int) -> list[Cut]:
    return _aligned(line, range(len(line.shape)), _names(line, "width"))


def _rows(line: Line, heads: int) -> list[Cut]:
    """The last dim is needed whole."""
    dims = range(len(line.shape) - 1)
    return _aligned(line, dims, _names(line, "")[:-1])


def _samples(line: Line, heads: int) -> list[Cut]:
    """An op that no rule is written for: only samples, where all have them."""
    states = []
    for source, shape in zip(line.inputs, line.input_shapes, strict=True):
        if isinstance(source, Leaf) and source.trained:
            states.append("C")
        elif shape and line.shape and shape[0] == line.shape[0]:
            states.append("S0")
        else:
            return []
    return [Cut("samples", tuple(states), "S0", line.shape[0])] if line.shape else []


def _linear(line: Line, heads: int) -> list[Cut]:
    last, more = len(line.shape) - 1, len(line.inputs) - 2  # a bias or none
    names = _names(line, "")[:-1]
    found = [Cut(name, (f"S{dim}", "C") + ("C",) * more, f"S{dim}", line.shape[dim]) for dim, name in enumerate(names)]
    found.append(Cut("columns", ("C", "S0") + ("S0",) * more, f"S{last}", line.shape[last]))
    found.append(Cut("rows", (f"S{last}", "S1") + ("R",) * more, "P", line.input_shapes[0][-1]))
    return found


def _embedding(line: Line, heads: int) -> list[Cut]:
    table, last = line.input_shapes[0], len(line.shape) - 1
    if not isinstance(line.inputs[0], Leaf):  # rows of an activation: each sample chooses among its own
        return [Cut("samples", ("S0",), "S0", line.shape[0]), Cut("width", ("S1",), f"S{last}", table[1])]
    found = [Cut(name, ("C",), f"S{dim}", line.shape[dim]) for dim, name in enumerate(_names(line, "")[:-1])]
    return [*found, Cut("vocabulary", ("S0",), "P", table[0]), Cut("width", ("S1",), f"S{last}", table[1])]


def _attention(line: Line, heads: int) -> list[Cut]:
    """Samples or heads; tokens meet here."""
    last = f"S{len(line.shape) - 1}"
    return [Cut("samples", ("S0",), "S0", line.shape[0]), Cut("heads", (last,), last, heads)]


def _cross_entropy(line: Line, heads: int) -> list[Cut]:
    """Targets are summed over; the vocabulary with three all_reduces of a number per target."""
    shape, last = line.input_shapes[0], len(line.input_shapes[0]) - 1
    names = ["samples", "tokens"][:last]
    found = [Cut(name, (f"S{dim}",), "P", shape[dim]) for dim, name in enumerate(names)]
    return [*found, Cut("vocabulary", (f"S{last}",), "R", shape[last], math.prod(shape[:-1]))]


def _reshape(line: Line, heads: int) -> list[Cut]:
    """Dims that stay, and the outer one of those that are joined or taken apart."""
    source, found = line.input_shapes[0], []
    for i, length in enumerate(source):
        for j, other in enumerate(line.shape):
            before = math.prod(source[:i]) == math.prod(line.shape[:j])
            whole = length % other == 0 or other % length == 0 if min(length, other) else False
            if before and whole and min(length, other) > 1:
                found.append(Cut(f"dim {i}" if i else "samples", (f"S{i}",), f"S{j}", min(length, other)))
    return found


LINEAR = ("add", "reshape", "permute", "index", "bias_residual", "concat", "stack")
RULES: dict[str, Rule] = {
    "linear": _linear,
    "embedding": _embedding,
    "embedding_bag": _embedding,
    "packed_attention": _attention,
    "cross_entropy": _cross_entropy,
    "reshape": _reshape,
}
RULES |= dict.fromkeys(("layer_norm", "rms_norm", "softmax", "log_softmax"), _rows)
RULES |= dict.fromkeys(
    ("add", "sub", "mul", "div", "scale", "neg", "astype", "gelu", "relu", "silu", "tanh", "swiglu", "bias_residual"),
    _elementwise,
)
