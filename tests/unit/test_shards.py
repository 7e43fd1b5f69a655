"""The shares of the parameter servers: even, whole where asked for, and nothing left out."""

import itertools

import numpy as np
import pytest

from dtrain.collectives import single
from dtrain.flat import FlatBuffers
from dtrain.strategies.parameter_server.shards import borders, shards
from tests import training
from tests.served import BASE


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("whole", [False, True])
def test_ranges_cover_everything_once_and_are_even(servers, whole):
    model = training.trainer(single(), **BASE).model
    (group,) = FlatBuffers(model.named_parameters(), single()).groups
    places = borders(group, servers, whole)
    assert places[0] == 0 and places[-1] == group.size and places == sorted(places)
    widest = max((where.stop - where.start) for where in group.slices.values())
    unit = widest if whole else max(max(np.prod(shape[1:], dtype=int) for shape in group.shapes.values()), 8)
    for a, b in itertools.pairwise(places):
        assert abs((b - a) - group.size / servers) <= 2 * unit
    for place in places[1:-1]:
        inside = [(name, where) for name, where in group.slices.items() if where.start < place < where.stop]
        assert not (whole and inside)
        for name, where in inside:
            assert (place - where.start) % np.prod(group.shapes[name][1:], dtype=int) == 0


def test_runs_and_tables_tile_each_range():
    model = training.trainer(single(), **{**BASE, "model": {**BASE["model"], "tied": False}}).model
    groups = FlatBuffers(model.named_parameters(), single()).groups
    found = shards(groups, 3, False, ["embedding.weight"])
    rows = sorted((table.first, table.last) for shard in found for table in shard.tables)
    assert rows[0][0] == 0 and rows[-1][1] == 256 and all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    for shard in found:
        spans = sorted((span.start, span.stop) for _, span in shard.runs)
        spans = sorted(spans + [(table.where.start, table.where.stop) for table in shard.tables])
        assert spans[0][0] == shard.ranges[0].start and spans[-1][1] == shard.ranges[0].stop
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
