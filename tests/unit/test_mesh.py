import re
from types import SimpleNamespace

import pytest

from dtrain.collectives import run_threads
from dtrain.errors import UserError
from dtrain.layout import REPLICATED, Layout, Partial, Replicate, Shard
from dtrain.mesh import Mesh, filled


def on_ranks(num_ranks, function, **sizes):
    return run_threads(num_ranks, lambda comm: function(Mesh(comm, **sizes)))


def test_the_course_example_of_16_ranks():
    # Check 48: TP4 DP2 PP2.
    groups = on_ranks(16, lambda mesh: {axis: mesh.groups(axis) for axis in ("tp", "dp", "pp")}, pp=2, dp=2, tp=4)
    assert all(each == groups[0] for each in groups)
    assert groups[0]["tp"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert groups[0]["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert groups[0]["pp"] == [[i, i + 8] for i in range(8)]


def test_the_course_example_with_experts():
    # Check 49: EP4 DP2 PP2 on 16 ranks; what is cut over ep is the same along dp.
    groups = on_ranks(16, lambda mesh: {axis: mesh.groups(axis) for axis in ("ep", "dp", "pp")}, pp=2, dp=2, ep=4)[0]
    assert groups["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert groups["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert groups["pp"] == [[i, i + 8] for i in range(8)]


def communicated(mesh):
    """Who is in my communicators, by communication."""
    return {
        axes: mesh[axes].all_gather_object(mesh.comm.rank)
        for axes in ("tp", "dp", "pp", "cp", ("dp", "tp"), ("pp", "dp", "tp"))
    }


@pytest.mark.parametrize("sizes", [{"pp": 2, "dp": 2, "tp": 2}, {"dp": 4, "tp": 2}, {"dp": 8}, {"pp": 4, "dp": -1}])
def test_communicators_are_the_groups(sizes):
    found = on_ranks(8, lambda mesh: (communicated(mesh), {axes: mesh.groups(*_tuple(axes)) for axes in AXES}), **sizes)
    for rank, (mine, groups) in enumerate(found):
        for axes, ranks in mine.items():
            (expected,) = [group for group in groups[axes] if rank in group]
            assert ranks == expected


AXES = ("tp", "dp", "pp", "cp", ("dp", "tp"), ("pp", "dp", "tp"))


def _tuple(axes):
    return (axes,) if isinstance(axes, str) else axes


def test_flattened_axes_and_rank_in_the_axis():
    found = on_ranks(8, lambda mesh: (mesh.coordinates, communicated(mesh), mesh["tp"].rank), pp=2, dp=2, tp=2)
    for rank, (coordinates, mine, tp_rank) in enumerate(found):
        assert rank == coordinates["pp"] * 4 + coordinates["dp"] * 2 + coordinates["tp"]
        assert coordinates["tp"] == tp_rank and coordinates["cp"] == 0
        assert mine["dp", "tp"] == ([0, 1, 2, 3] if rank < 4 else [4, 5, 6, 7])
        assert mine["pp", "dp", "tp"] == list(range(8))
        assert mine["cp"] == [rank]


def test_communicators_are_made_once_and_only_where_needed():
    def look(mesh):
        return (
            mesh["dp"] is mesh["dp"],
            mesh["tp", "dp"] is mesh["dp", "tp"],
            mesh["cp"].size,
            mesh["dp", "tp"] is mesh.comm,
        )

    assert on_ranks(4, look, dp=2, tp=2) == [(True, True, 1, True)] * 4


def test_order_is_configurable():
    (groups, *_) = on_ranks(8, lambda mesh: (mesh.groups("tp"), mesh.groups("dp")), dp=4, tp=2, order="dp-tp-cp-ep-pp")
    assert groups == ([[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(UserError, match=r"parallel\.order: tp-dp; must name each axis once"):
        on_ranks(1, lambda mesh: None, order="tp-dp")


def test_table():
    rows, lines = on_ranks(4, lambda mesh: (mesh.rows(), list(mesh.table())), dp=2, tp=2)[0]
    assert [(row["rank"], row["dp"], row["tp"], row["pp"]) for row in rows] == [
        (0, 0, 0, 0),
        (1, 0, 1, 0),
        (2, 1, 0, 0),
        (3, 1, 1, 0),
    ]
    assert lines[0] == "mesh   pp=1 dp=2 ep=1 cp=1 tp=2"
    assert lines[1].split() == ["rank", "dp", "tp", "host"]
    assert [line.split() for line in lines[2:6]] == [
        [str(row["rank"]), str(row["dp"]), str(row["tp"]), row["host"]] for row in rows
    ]
    assert lines[6:] == ["dp     [0 2] [1 3]", "tp     [0 1] [2 3]"]


def test_an_unknown_axis():
    with pytest.raises(KeyError, match="fsdp: no axis of the mesh; axes: pp, dp, ep, cp, tp"):
        on_ranks(1, lambda mesh: mesh["fsdp"])


ALL = "the sizes of all axes multiply to the number of ranks"
IMPOSSIBLE = [
    (8, {"dp": 3}, "parallel.dp: 3; does not fit 8 ranks: ALL. Nearest that can: 8, or -1; or start 3 ranks"),
    (
        8,
        {"dp": 2, "tp": 2},
        "parallel.dp: 2; does not fit 8 ranks with tp=2: ALL. Nearest that can: 4, or -1; or start 4 ranks",
    ),
    (8, {"dp": 1}, "parallel.dp: 1; does not fit 8 ranks: ALL. Nearest that can: 8, or -1; or start 1 ranks"),
    (8, {"dp": -1, "tp": 3}, "parallel.tp: 3; does not fit 8 ranks: ALL. Nearest that can: 2 or 4; or start 9 ranks"),
    (
        8,
        {"dp": -1, "tp": 16},
        "parallel.tp: 16; does not fit 8 ranks: ALL. Nearest that can: 4 or 8; or start 16 ranks",
    ),
    (
        8,
        {"dp": 2, "tp": 3},
        "parallel.tp: 3; does not fit 8 ranks with dp=2: ALL. Nearest that can: 4; or start 6 ranks",
    ),
    (
        12,
        {"dp": -1, "pp": 5, "tp": 4},
        "parallel.pp: 5; does not fit 12 ranks with tp=4: ALL. Nearest that can: 1 or 3; or start 20 ranks",
    ),
    (
        8,
        {"dp": -1, "pp": 3, "tp": 3},
        "parallel.tp: 3; does not fit 8 ranks with pp=3: ALL. Nearest that can: pp=2 x tp=4 or pp=4 x tp=2; or start 9 "
        "ranks",
    ),
    (4, {"dp": -2}, "parallel.dp: -2; must be 1 or more, or -1 for what the other axes leave (4 ranks)"),
    (4, {"tp": 0}, "parallel.tp: 0; must be 1 or more (4 ranks)"),
]


@pytest.mark.parametrize("num_ranks, sizes, message", IMPOSSIBLE)
def test_impossible_meshes_name_the_axis_and_what_would_fit(num_ranks, sizes, message):
    with pytest.raises(UserError, match=re.escape(message.replace("ALL", ALL)) + "$"):
        filled({"pp": 1, "dp": 1, "cp": 1, "ep": 1, "tp": 1} | sizes, num_ranks)


def test_every_possible_mesh_of_24_ranks_is_taken_and_no_other():
    for tp in range(1, 26):
        for pp in range(1, 26):
            sizes = {"pp": pp, "dp": -1, "cp": 1, "ep": 1, "tp": tp}
            if 24 % (tp * pp):
                with pytest.raises(UserError, match=r"parallel\.(tp|pp): \d+"):
                    filled(sizes, 24)
            else:
                assert filled(sizes, 24) == sizes | {"dp": 24 // (tp * pp)}


# Layout: where a tensor lies on the mesh


def place(sizes, **coordinates):
    return SimpleNamespace(sizes=sizes, coordinates=coordinates)


def test_parts_of_a_layout_tile_the_tensor():
    layout = Layout(tp=Shard(0), dp=Shard(1), pp=Shard(0), cp=Partial())
    sizes = {"tp": 2, "dp": 3, "pp": 2}
    parts = [
        layout.part(place(sizes, tp=tp, dp=dp, pp=pp), (7, 8)) for tp in range(2) for pp in range(2) for dp in range(3)
    ]
    # tp cuts 7 rows into 4 + 3, pp those into 2 + 2 and 2 + 1; dp cuts 8 columns into 3 + 3 + 2.
    rows, columns = [(0, 2), (2, 4), (4, 6), (6, 7)], [(0, 3), (3, 6), (6, 8)]
    assert parts == [(slice(*row), slice(*column)) for row in rows for column in columns]


def test_layout_is_a_value():
    assert Layout(tp=Shard(0)) == Layout(tp=Shard(0), dp=Replicate()) != Layout(tp=Shard(1))
    assert hash(Layout(tp=Shard(0))) == hash(Layout(tp=Shard(0), dp=Replicate()))
    assert Layout(tp=Shard(0), dp=Shard(1), pp=Partial()) == Layout(pp=Partial(), dp=Shard(1), tp=Shard(0))
    assert hash(Layout(tp=Shard(0), dp=Shard(1))) == hash(Layout(dp=Shard(1), tp=Shard(0)))
    assert Layout(tp=Shard(0), dp=Shard(0)) != Layout(dp=Shard(0), tp=Shard(0))  # cut in another order
    assert Layout(tp=Shard(0)).with_(tp=Replicate()) == REPLICATED
    assert Layout(dp=Partial())["dp"] == Partial("sum") and Layout()["tp"] == Replicate()
    assert Layout(dp=Partial(), tp=Shard(1)).axes(Shard) == ("tp",)
    assert repr(Layout(tp=Shard(dim=1))) == "Layout(tp=Shard(1))"
    assert REPLICATED.part(place({"tp": 2}, tp=1), (3, 4)) == (slice(0, 3), slice(0, 4))
    with pytest.raises(ValueError, match=r"tp=Shard\(2\) does not fit a tensor of shape \(3, 4\)"):
        Layout(tp=Shard(2)).part(place({"tp": 2}, tp=1), (3, 4))
    with pytest.raises(ValueError, match="dims of a layout count from 0"):
        Shard(-1)


def test_tp_may_be_a_grid_of_two_axes():
    def look(mesh):
        held = Layout(tp_row=Shard(0), tp_column=Shard(1)).part(mesh, (4, 6))
        mine = {axes: mesh[axes].all_gather_object(mesh.comm.rank) for axes in ("tp", "tp_row", "tp_column")}
        return mesh.coordinates, mine, held, mesh.index("tp"), mesh.size("tp"), list(mesh.table(["here"] * 12))

    found = on_ranks(12, look, dp=2, tp=6, grid=(2, 3))
    for rank, (place, mine, held, index, size, table) in enumerate(found):
        first = rank // 6 * 6
        row, column = divmod(rank - first, 3)
        assert (place["tp_row"], place["tp_column"], place["tp"]) == (row, column, index) and size == 6
        assert mine["tp"] == list(range(first, first + 6))
        assert mine["tp_column"] == [first + 3 * row + j for j in range(3)]
        assert mine["tp_row"] == [first + column, first + 3 + column]
        assert held == (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        assert table[0] == "mesh   pp=1 dp=2 ep=1 cp=1 tp=6 tp_row=2 tp_column=3"


def test_axes_of_one_rank_change_nothing():
    # Else arrays would have their home in another communicator's memory than the one that sums them.
    same = on_ranks(4, lambda mesh: mesh["dp", "ep"] is mesh["dp"] and mesh["cp", "dp"] is mesh["dp"], dp=2, tp=2)
    assert same == [True] * 4
    assert on_ranks(4, lambda mesh: mesh["ep", "cp"].size, dp=2, tp=2) == [1] * 4
