"""Pictures: every message is an arrow between the right ranks and steps; the command says what it draws."""

import xml.etree.ElementTree as ElementTree

import pytest

from dtrain.collectives.schedules import ALGORITHMS, schedule
from dtrain.collectives.schedules.crossover import bytes_text, crossovers, plot, seconds_text
from dtrain.collectives.schedules.drawing import ADD, COPY, LEFT, ROW, TOP, draw_svg, draw_text
from dtrain.errors import UserError
from dtrain.launch.main import run
from dtrain.launch.show_collective import show_collective

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("collective, name", [(c, n) for c, rows in ALGORITHMS.items() for n in rows])
def test_every_message_is_an_arrow(collective, name):
    plan = schedule(collective, name, 4)
    root = ElementTree.fromstring(draw_svg(plan))
    arrows = [path for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    receives = [receive for rank in range(4) for step in plan.of(rank) for receive in step.receives]
    assert len(arrows) == len(receives)
    assert sum(path.get("stroke") == ADD for path in arrows) == sum(receive.reduce for receive in receives)
    text = draw_text(plan, width=1000)
    if "more" not in text:
        assert text.count("→") == text.count("←") == len(receives)


def test_arrows_lead_from_sender_to_receiver():
    root = ElementTree.fromstring(draw_svg(schedule("broadcast", "binomial", 2)))
    (arrow,) = [path for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    assert arrow.get("d") == f"M{LEFT + 5:.1f} {TOP + ROW / 2:.1f}L{LEFT + 96 - 6:.1f} {TOP + 1.5 * ROW:.1f}"
    assert arrow.get("stroke") == COPY


def test_text():
    assert draw_text(schedule("all_reduce", "tree", 2)).splitlines() == [
        "all_reduce tree: 2 ranks, 1 chunks, 2 steps; 2α + 2nβ + 1nγ",
        "",
        "       │ step 0 │ step 1",
        "────────────────────────",
        "rank 0 │ ←1 +c0 │ →1 c0",
        "rank 1 │ →0 c0  │ ←0 c0",
    ]
    narrow = draw_text(schedule("all_reduce", "ring", 8), width=60)
    assert narrow.count("rank 7") > 1 and "step 13" in narrow
    assert max(map(len, narrow.splitlines()[1:])) <= 60


def test_too_much_to_draw():
    with pytest.raises(ValueError, match="too many for a picture"):
        draw_svg(schedule("all_reduce", "ring", 64))


def test_crossovers():
    sizes = [1, 3, 5]
    times = {"flat": [2.0, 2.0, 2.0], "steep": [1.0, 3.0, 5.0]}
    assert crossovers(sizes, times) == [(1, "steep"), (2.0, "flat")]
    assert crossovers(sizes, {"a": [1, 1, 1], "b": [1, 1, 1]}) == [(1, "a")]
    root = ElementTree.fromstring(plot("a & b", sizes, times))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a & b" in texts and "flat from 2 B" in texts
    assert bytes_text(1536) == "1.5 KiB" and seconds_text(2.5e-6) == "2.5 µs" and seconds_text(3e-8) == "30 ns"


CLUSTER = (
    "levels:\n- {name: node, ranks: 4, alpha: 1e-6, beta: 1e-10}\n- {name: net, alpha: 1e-5, beta: 1e-10, links: 1}\n"
)


def test_command_draws(tmp_path, capsys):
    run(["show", "collective", "all_reduce", "--algorithm", "ring", "--ranks", "5", "-o", str(tmp_path / "ring.svg")])
    out = capsys.readouterr().out
    assert "proven: 8 steps, 40 messages; per rank at most 1.6 n sent, 0.8 n added" in out
    assert ElementTree.parse(tmp_path / "ring.svg").getroot().tag == f"{SVG}svg"
    run(["show", "collective", "broadcast", "--algorithm", "chain", "--ranks", "3", "--set", "segments=2"])
    assert "segments=2" in capsys.readouterr().out
    run(["show", "collective", "all_gather", "--ranks", "6"])
    assert "recursive_doubling   It needs a power of two." in capsys.readouterr().out


def test_command_simulates(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(CLUSTER)
    show_collective("all_reduce", "all", 16, {}, 0, tmp_path / "c.yaml", "1K:256M", tmp_path / "x.svg")
    out = capsys.readouterr().out
    fastest = out.split("fastest: ")[1].splitlines()[0]
    assert fastest.startswith("direct from 1 KiB") and "," in fastest
    assert ElementTree.parse(tmp_path / "x.svg").getroot().tag == f"{SVG}svg"
    assert len([line for line in out.splitlines() if "*" in line]) == 19


def test_command_simulates_own_beside_others(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(CLUSTER)
    (tmp_path / "mine.py").write_text("from dtrain.collectives.schedules.ring import all_reduce as twin\n")
    own = f"{tmp_path}/mine.py:twin"
    show_collective("all_reduce", f"tree,{own},ring", 16, {}, 0, tmp_path / "c.yaml", "1M")
    head, row = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert head == ["bytes", "tree", own, "ring"] and row[-2:] == row[-4:-2]


def test_command_mistakes(tmp_path):
    with pytest.raises(UserError, match="all_sum: not a collective; allowed: all_reduce"):
        run(["show", "collective", "all_sum"])
    with pytest.raises(UserError, match="--algorithm: rings: not an algorithm of all_reduce"):
        run(["show", "collective", "all_reduce", "--algorithm", "rings"])
    with pytest.raises(UserError, match="several need --simulate"):
        run(["show", "collective", "all_reduce", "--algorithm", "ring,tree"])
    with pytest.raises(UserError, match=r"c\.yaml: No such file"):
        run(["show", "collective", "all_reduce", "--simulate", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("levels: [{name: a, alpha: x, beta: 1}]")
    with pytest.raises(UserError, match=r"c.yaml: levels\[0\].alpha=x: must be a number from 0"):
        run(["show", "collective", "all_reduce", "--simulate", str(tmp_path / "c.yaml")])
    with pytest.raises(UserError, match="must be KEY=NUMBER"):
        run(["show", "collective", "broadcast", "--algorithm", "chain", "--set", "segments"])
    with pytest.raises(UserError, match="it needs a power of two"):
        run(["show", "collective", "all_gather", "--algorithm", "recursive_doubling", "--ranks", "6"])
    for arguments, message in [
        (("broadcast", "--ranks", "4", "--root", "4"), r"--root 4: .*allowed: 0 to 3"),
        (("all_reduce", "--root", "1"), "all_reduce has no root"),
        (("all_reduce", "-o", "x.svg"), "--output: one algorithm can be drawn"),
        (("all_reduce", "--algorithm", "double_tree", "--set", "segments=0"), "segments=0: allowed: .*from 1"),
        (("all_reduce", "--algorithm", "hierarchical", "--set", "local=-1"), "local=-1: allowed: .*from 0"),
    ]:
        with pytest.raises(UserError, match=message):
            run(["show", "collective", *arguments])


def test_ones_own_for_another_collective(tmp_path):
    """A function that cannot be called as this collective calls it is told, not a traceback."""
    (tmp_path / "mine.py").write_text("from dtrain.collectives.schedules.ring import all_reduce as twin\n")
    with pytest.raises(UserError, match=r"\(rank, size, root\) must be possible: .*unexpected keyword argument 'root'"):
        run(["show", "collective", "broadcast", "--algorithm", f"{tmp_path}/mine.py:twin"])
