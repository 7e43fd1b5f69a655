"""The loss curve: as SVG (parsed as XML, coordinates checked) and as braille."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from dtrain.launch import pictures
from dtrain.launch.pictures import loss_curve, terminal_curve, ticks

SVG = "{http://www.w3.org/2000/svg}"


def rows(losses, validation=()):
    metrics = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    for step, loss in validation:
        next(row for row in metrics if row["step"] == step)["validation_loss"] = loss
    return metrics


def drawn(tmp_path, *arguments, **options):
    path = tmp_path / "loss.svg"
    assert loss_curve(*[arguments[0], path, *arguments[1:]], **options) == path
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return root, [element.text for element in root.iter(f"{SVG}text")]


def line(root, colour):
    paths = [p.get("d") for p in root.iter(f"{SVG}path") if p.get("stroke") == colour and "L" in p.get("d")]
    assert len(paths) == 1
    return [tuple(map(float, point.split())) for point in paths[0].removeprefix("M").split("L")]


def test_curve_has_points_where_the_losses_are(tmp_path):
    root, texts = drawn(tmp_path, rows([5.0, 3.0, 2.0], [(20, 3.5), (30, 2.5)]), 3.25, title="a < b & c")
    train, validation = line(root, pictures.TRAIN), line(root, pictures.VALIDATION)
    assert len(train) == 3 and len(validation) == 2
    assert train[-1][0] == pictures.WIDTH - pictures.RIGHT
    # y is linear in the loss, downwards: 5 -> 3 is twice as far as 3 -> 2
    assert train[1][1] - train[0][1] == pytest.approx(2 * (train[2][1] - train[1][1]), abs=0.2)
    assert validation[0][0] == train[1][0] and validation[0][1] < train[1][1]
    assert {"a < b & c", "step", "training 2", "validation 2.5", "unigram entropy 3.25"} <= set(texts)


def test_everything_lies_inside_of_the_picture(tmp_path):
    root, _ = drawn(tmp_path, rows([0.01, 900.0, 3.0]), 1e4)
    for x, y in line(root, pictures.TRAIN):
        assert pictures.LEFT <= x <= pictures.WIDTH - pictures.RIGHT
        assert pictures.TOP <= y <= pictures.HEIGHT - pictures.BOTTOM


def test_no_validation_and_no_reference(tmp_path):
    _, texts = drawn(tmp_path, rows([2.0, 1.0]))
    assert not [text for text in texts if text.startswith(("validation", "unigram"))]


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 2.0], [float("nan"), 1.0], [1.0, float("inf"), 0.5]])
def test_runs_that_say_little_still_get_a_picture(tmp_path, losses):
    root, _ = drawn(tmp_path, rows(losses))
    coordinates = " ".join(p.get("d") for p in root.iter(f"{SVG}path"))
    assert "nan" not in coordinates and "inf" not in coordinates


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.8, 5.1), (3.0, 3.0), (0, 7), (1e-5, 2e-5), (0, 123456), (-3, 8)])
def test_ticks_are_round_and_enclose(low, high):
    values = ticks(low, high)
    assert values[0] <= low and values[-1] >= high
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(values)}
    assert len(steps) == 1 and 2 <= len(values) <= 9
    mantissa = steps.pop() / 10 ** math.floor(math.log10(values[1] - values[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-6


def dots(text, width):
    """The set of (x, y) dots of a braille picture, y from the top."""
    found = set()
    for row, each in enumerate(text.splitlines()):
        for column, character in enumerate(each.partition("┤")[2]):
            bits = ord(character) - 0x2800
            for dy in range(4):
                for dx in range(2):
                    if bits & pictures._DOTS[dy][dx]:
                        found.add((2 * column + dx, 4 * row + dy))
    assert all(0 <= x < 2 * width for x, _ in found)
    return found


def test_terminal_curve_falls_from_the_top_left_to_the_bottom_right():
    text = terminal_curve([4.0, 3.0, 2.0, 1.0], width=20, height=5)
    lines = text.splitlines()
    assert len(lines) == 5 and lines[0].startswith("4.000 ┤") and lines[-1].startswith("1.000 ┤")
    found = dots(text, 20)
    assert (0, 0) in found and (39, 19) in found
    lowest = [max(y for x, y in found if x == column) for column in range(40)]
    assert lowest == sorted(lowest) and len({x for x, _ in found}) == 40


def test_many_values_are_averaged_into_the_columns():
    text = terminal_curve([0.0, 2.0] * 500, width=10, height=2)
    assert "1.000" in text and len(text.splitlines()) == 2


@pytest.mark.parametrize("losses", [[1.0], [2.0, 2.0, 2.0], [float("nan"), 3.0]])
def test_a_flat_curve_is_one_line_of_dots(losses):
    assert len({y for _, y in dots(terminal_curve(losses, width=8, height=3), 8)}) == 1


def test_nothing_to_draw():
    assert terminal_curve([]) == "" and terminal_curve([math.nan]) == ""
