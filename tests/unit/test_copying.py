"""Copies at every distance modulo a page: the element-wise way, its rest, and memcpy give the same bytes."""

import numpy as np
import pytest

from dtrain.collectives.copying import copy
from dtrain.collectives.dtypes import address


@pytest.mark.parametrize("nbytes", [0, 1, 2048, 2049, 5003, 20_000])
@pytest.mark.parametrize("distance", [0, 1, 7, 16, 63, 64, 4095])
def test_every_distance(nbytes: int, distance: int) -> None:
    room = np.zeros(1 << 17, np.uint8)
    start = -address(room) % 4096 + 16
    source = room[start : start + nbytes]
    begin = start + (1 << 16) + distance
    target = room[begin : begin + nbytes]
    source[...] = np.random.default_rng(nbytes).integers(1, 256, nbytes)
    expected = source.tobytes()
    copy(target, source)
    assert target.tobytes() == source.tobytes() == expected
    assert not room[begin + nbytes : begin + nbytes + 64].any()
    assert not room[begin - 64 : begin].any()
