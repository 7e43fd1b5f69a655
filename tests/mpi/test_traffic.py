"""The table of traffic in the log and in summary.json: per step, per group, rank 0 and the largest rank."""

import numpy as np

from dtrain.collectives import Communicator
from dtrain.launch.traffic import Traffic, table
from dtrain.mesh import Mesh


def test_means_over_steps_of_what_was_done_since(comm: Communicator) -> None:
    world = comm.split(0)
    assert world is not None
    mesh = Mesh(world, dp=-1)
    world.broadcast(np.ones(5))  # before: not counted
    traffic = Traffic(mesh)
    gradients = np.ones(world.size * 1000, np.float32)
    for step in range(4):
        mesh["dp"].all_reduce(gradients, algorithm="native" if world.size > 1 else "auto")
        with world.counters.purpose("loss"):
            mesh["dp"].all_reduce(np.ones(2))
        if step == 0 and world.rank == world.size - 1 and world.size > 1:
            world.send(np.ones(3), 0)
        if step == 0 and world.rank == 0 and world.size > 1:
            world.recv(np.empty(3), world.size - 1)
    rows = traffic.rows(4)
    if world.size == 1:
        assert rows == [] and list(table(rows, "")) == []
        return
    assert {row["group"] for row in rows} == {"dp"}
    found = {(row["collective"], row["purpose"]): row for row in rows}
    assert set(found) == {("all_reduce", ""), ("all_reduce", "loss"), ("send", ""), ("recv", "")}
    ring = 2 * (world.size - 1) / world.size * gradients.nbytes
    row = found["all_reduce", ""]
    assert (row["algorithm"], row["calls"], row["sent"], row["received"]) == ("native", 1.0, ring, ring)
    assert found["send", ""]["sent"] == 0 and found["send", ""]["largest"]["sent"] == 24 / 4
    assert found["recv", ""]["received"] == 24 / 4
    assert rows[-1]["purpose"] == "loss"
    lines = list(table(rows, "title"))
    assert lines[0] == "title" and len(lines) == 2 + len(rows)
    assert max(map(len, lines)) <= 120


def test_groups_carry_the_names_of_the_axes(comm: Communicator) -> None:
    world = comm.split(0)
    assert world is not None
    name = world.name
    if world.size % 2 or world.size == 2:
        Mesh(world, tp=world.size)
        assert world.name == (name if world.size == 1 else "tp")
        return
    mesh = Mesh(world, dp=-1, tp=2)
    traffic = Traffic(mesh)
    for axis, words in (("dp", 3), ("tp", 5)):
        mesh[axis].all_reduce(np.ones(words))
    mesh["dp", "tp"].all_reduce(np.ones(7))
    assert [part.name for part in mesh.communicators()] == [name, "dp", "tp"]
    assert [row["group"] for row in traffic.rows(1)] == sorted(["dp", "tp", name])
    mesh.close()
