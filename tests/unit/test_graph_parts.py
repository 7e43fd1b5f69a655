"""Graphs cut into subgraphs: sends and receives pair up, and the parts on ranks give the bits of the whole.

Check of the course: 10.
"""

import numpy as np
import pytest

from dtrain import graph
from dtrain.collectives import run_threads, single
from dtrain.launch.graph_parts import execute, listing, partition
from tests import training

GPT = {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 16}


def recorded(**model):
    """The loss of a GPT, its graph."""
    trainer = training.trainer(single(), model=GPT | model)
    batch, _ = next(trainer.microbatches())
    with graph.tracing():
        loss = trainer.model.loss(batch)
    return loss, graph.capture(loss)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_on_ranks_give_the_bits_of_the_whole(ranks):
    loss, captured = recorded(tied=False)
    parts = partition(captured, ranks)
    results = run_threads(ranks, lambda comm: execute(loss, parts, comm))
    assert [result is None for result in results] == [True] * (ranks - 1) + [False]
    assert np.array_equal(results[-1], loss.data)


def test_a_send_and_a_receive_for_every_tensor_that_crosses():
    _, captured = recorded()
    parts = partition(captured, 4)
    assert list(parts.rank_of) == sorted(parts.rank_of) and set(parts.rank_of) == {0, 1, 2, 3}
    edges = set()
    for line in captured.lines:
        for source in line.inputs:
            if isinstance(source, int) and parts.rank_of[source] != parts.rank_of[line.number]:
                edges.add((source, parts.rank_of[line.number]))
    assert {(m.line, m.target) for m in parts.messages} == edges and len(parts.messages) == len(edges) >= 3
    text = list(listing(parts))
    sends, recvs = (sum(line.strip().startswith(word) for line in text) for word in ("send", "recv"))
    assert sends == recvs == len(edges)
    work = [sum(line.flops for line in captured.lines if parts.rank_of[line.number] == r) for r in range(4)]
    assert max(work) < 0.45 * captured.flops
