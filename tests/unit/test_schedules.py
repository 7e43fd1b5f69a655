import math

import pytest

from dtrain.config import ConstantConfig, CosineConfig, InverseSqrtConfig, LinearConfig
from dtrain.schedules import SCHEDULES, learning_rate


def rates(config, total=10, peak=2.0, steps=None):
    return [learning_rate(config, step, peak, total) for step in range(1, (steps or total) + 1)]


def test_every_kind_of_the_configuration_has_a_row():
    kinds = {config().kind for config in (ConstantConfig, LinearConfig, CosineConfig, InverseSqrtConfig)}
    assert set(SCHEDULES) == kinds


def test_constant():
    assert rates(ConstantConfig(warmup_steps=4), steps=7) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert rates(ConstantConfig(), steps=2) == [2.0, 2.0]


def test_linear_by_hand():
    # Warm-up to 2 at the second update; then 8 equal parts of 2 - 0.4 down to 0.4 at the tenth.
    expected = [1.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4]
    assert rates(LinearConfig(warmup_steps=2, final_fraction=0.2)) == pytest.approx(expected, rel=1e-14)
    assert rates(LinearConfig())[-1] == 0.0


def test_cosine_by_hand():
    config = CosineConfig(warmup_steps=2, final_fraction=0.1)
    values = rates(config)
    assert values[:2] == [1.0, 2.0]
    assert values[5] == pytest.approx(2 * (0.1 + 0.9 / 2))  # halfway: update 6 of 2..10
    assert values[3] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))  # a quarter: cos 45 degrees
    assert values[-1] == pytest.approx(0.2)
    assert learning_rate(config, 50, 2.0, 10) == pytest.approx(0.2)  # beyond the end: stays


def test_inverse_sqrt():
    # The Transformer paper: lr ~ min(t^-0.5, t * warmup^-1.5), here scaled so that its maximum is the peak.
    values = rates(InverseSqrtConfig(warmup_steps=4), steps=20)
    paper = [2.0 * 2.0 * min(t**-0.5, t * 4**-1.5) for t in range(1, 21)]
    assert values == pytest.approx(paper, rel=1e-14)
    assert rates(InverseSqrtConfig(), steps=4) == pytest.approx([2 / math.sqrt(t) for t in range(1, 5)])


@pytest.mark.parametrize("config", [LinearConfig, CosineConfig], ids=lambda c: c.__name__)
def test_warmup_as_long_as_the_run(config):
    assert rates(config(warmup_steps=10)) == pytest.approx([0.2 * t for t in range(1, 11)])
    assert rates(config(warmup_steps=20)) == pytest.approx([0.1 * t for t in range(1, 11)])
