"""A recorded graph cut into a subgraph per rank: what each computes, and a send and a receive on every cut edge.

    rank 0   #0 ── #1 ── #2 ─ send ┐            the order of the forward is kept: rank r has the lines before those of
    rank 1                    recv ┴ #3 ── …    r + 1, so that messages go upwards only; balanced by FLOPs

A tensor that several ops of a rank read crosses once. `execute` runs the parts on ranks, from the records alone, and
the last one has the bits of the whole: the ops are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.graph import Graph, nodes, short
from dtrain.strategies.pipeline.cut import balanced
from dtrain.tape import Node
from dtrain.tensor import Tensor


@dataclass(frozen=True)
class Message:
    """The output of a line, from the rank that makes it to one that reads it."""

    line: int
    source: int
    target: int
    bytes: int


@dataclass(frozen=True)
class Parts:
    """Which rank has which lines, and what is sent."""

    graph: Graph
    rank_of: tuple[int, ...]
    messages: tuple[Message, ...]


def partition(graph: Graph, ranks: int) -> Parts:
    """Cut such that the rank with most FLOPs has as few as can be."""
    sizes = balanced([float(max(1, line.flops)) for line in graph.lines], ranks)
    ends = list(accumulate(sizes))
    rank_of = tuple(rank for rank, size in enumerate(sizes) for _ in range(size))
    assert len(rank_of) == ends[-1] == len(graph.lines)
    crossing = {
        (source, rank_of[line.number]): None
        for line in graph.lines
        for source in line.inputs
        if isinstance(source, int) and rank_of[source] != rank_of[line.number]
    }
    messages = tuple(Message(s, rank_of[s], target, graph.lines[s].bytes) for s, target in sorted(crossing))
    return Parts(graph, rank_of, messages)


def listing(parts: Parts) -> Iterator[str]:
    """A block of lines per rank: what it receives, computes, sends."""
    for rank in range(max(parts.rank_of) + 1):
        lines = [line for line in parts.graph.lines if parts.rank_of[line.number] == rank]
        names = [*dict.fromkeys(line.scope for line in lines if line.scope)]
        through = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}" if names else ""
        flops = sum(line.flops for line in lines)
        yield (
            f"rank {rank}: ops #{lines[0].number}-#{lines[-1].number} ({through}), {short(flops)}FLOP, "
            f"{flops / max(1, parts.graph.flops):.1%} of all"
        )
        for m in parts.messages:
            shape = "×".join(map(str, parts.graph.lines[m.line].shape))
            if m.target == rank:
                yield f"    recv #{m.line} {shape} from rank {m.source}, {short(m.bytes, 1024)}B"
            if m.source == rank:
                yield f"    send #{m.line} {shape} to rank {m.target}, {short(m.bytes, 1024)}B"
    total = sum(m.bytes for m in parts.messages)
    yield f"{len(parts.messages)} messages, {short(total, 1024)}B in all; the backward sends as many back"


def execute(loss: Tensor, parts: Parts, comm: Communicator) -> Array | None:
    """Run this rank's lines of the graph that computed `loss`, whose leaves it has; the result, on the last rank."""
    recorded = nodes(loss)
    number = {node: i for i, node in enumerate(recorded)}
    made: dict[int, Array] = {}
    sending = []
    for i, node in enumerate(recorded):
        if parts.rank_of[i] != comm.rank:
            continue
        inputs = [_input(source, number, made, recorded, parts, comm) for source in node.inputs]
        made[i] = np.asarray(node.op.forward(*inputs, **node.attributes)[0])
        for m in parts.messages:
            if m.line == i:
                sending.append(comm.send_async(np.ascontiguousarray(made[i]), m.target, m.line))
    for work in sending:
        work.wait()
    return made.get(len(recorded) - 1)


def _input(
    source: Node | Tensor, number: dict[Node, int], made: dict[int, Array], recorded: list[Node], parts: Parts,
    comm: Communicator,
) -> Any:  # fmt: skip
    if isinstance(source, Tensor):
        return source.data
    line = number[source]
    if line not in made:
        room = np.empty(source.shape, source.dtype)
        made[line] = comm.recv_async(room, parts.rank_of[line], line).wait()
    return made[line]
