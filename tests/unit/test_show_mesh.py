import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.launch import configuration
from dtrain.launch.show_mesh import panels, picture, show_mesh, svg
from dtrain.mesh import Grid

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "dp-tp-cp-ep-pp"])
def test_every_rank_stands_once_in_its_row_and_column(order):
    grid = Grid(24, {"pp": 2, "dp": 4, "tp": 3}, order)
    fast, next_fast, slow = ("tp", "dp", "pp") if order.startswith("tp") else ("dp", "tp", "pp")
    seen = []
    for title, rows in panels(grid):
        for place, ranks in rows:
            for column, rank in enumerate(ranks):
                at = grid.coordinates_of(rank)
                assert (title, place, column) == (f"{slow}={at[slow]}", f"{next_fast}={at[next_fast]}", at[fast])
                seen.append(rank)
    assert seen == list(range(24))
    assert [int(word) for line in picture(grid) if "─►" not in line for word in line.split()[1:]] == seen


def test_one_rank_and_many():
    assert list(picture(Grid(1, {"dp": 1}))) == [" " * 17 + "dp ─►", " " * 17 + "  0", ""]
    assert list(picture(Grid(1024, {"pp": 4, "dp": -1, "tp": 8})))[-1] == "… and 768 more ranks"


def test_the_picture_has_a_cell_per_rank_in_the_color_of_its_host():
    grid = Grid(8, {"pp": 2, "dp": 2, "tp": 2})
    root = ElementTree.fromstring(svg(grid, [f"host{rank // 4}" for rank in range(8)]))
    cells = root.findall(f"{SVG}g")
    assert [cell.find(f"{SVG}text").text for cell in cells] == list("01234567")
    assert cells[5].find(f"{SVG}title").text == "rank 5: pp=1 dp=0 ep=0 cp=0 tp=1, host1"
    colors = [cell.find(f"{SVG}rect").get("fill") for cell in cells]
    assert len(set(colors[:4])) == len(set(colors[4:])) == 1 and colors[0] != colors[4]


def test_the_command_tells_what_crosses_hosts(tmp_path, capsys):
    config = configuration.load(Path("configs/gpt_ddp.yaml"), ["parallel.pp=2"])
    show_mesh(config, 8, 4, tmp_path / "mesh.svg")
    told = capsys.readouterr().out
    assert "pp     [0 4] [1 5] [2 6] [3 7]\ndp     [0 1 2 3] [4 5 6 7]\n" in told
    assert "pp: 4 groups of 2 ranks, 4 of them on several hosts\ndp: 2 groups of 4 ranks, each on one host\n" in told
    assert (tmp_path / "mesh.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match=r"--output: .*cannot be written: No such file"):
        show_mesh(config, 8, None, tmp_path / "nowhere" / "mesh.svg")
