"""A user's own all_reduce gets proof, simulation, drawing, a run, a benchmark, tests: it is one function.

    python examples/my_collective.py
    mpirun -n 4 dtrain bench all_reduce --algorithms examples/my_collective.py:ROW,ring,native
    dtrain show collective all_reduce --algorithm examples/my_collective.py:ROW --ranks 4
    DTRAIN_OWN=all_reduce=examples/my_collective.py:ROW python -m pytest tests/unit -k two_rings

Two rings at once: the even chunks travel to the right, the odd ones to the left, so that both directions of every link
are used. Half the time of one ring where the two directions do not share a link, 2(p-1)(α + n/(2p)·β).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dtrain.collectives import run_threads
from dtrain.collectives.schedules import Algorithm, Cost, Receive, Send, Step, bind, schedule
from dtrain.collectives.schedules.drawing import draw_svg, draw_text
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.refusal import ScheduleError
from dtrain.collectives.schedules.schedule import custom
from dtrain.collectives.schedules.simulator import simulate, uniform


def two_rings(rank: int, size: int) -> Iterator[Step]:
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(2 * (size - 1) if size > 1 else 0):
        reduce = k < size - 1
        j = k if reduce else k - size  # after the sums, the same way once more with whole chunks
        yield Step(
            sends=[Send(right, [2 * ((rank - j) % size)]), Send(left, [2 * ((rank + j) % size) + 1])],
            receives=[
                Receive(left, [2 * ((rank - j - 1) % size)], reduce),
                Receive(right, [2 * ((rank + j + 1) % size) + 1], reduce),
            ],
        )


ROW = Algorithm(
    two_rings,
    cost=lambda size: Cost(2 * (size - 1), (size - 1) / size, (size - 1) / size),
    parts=lambda size: 2 * size,  # chunks; as many as ranks would need no row, the function alone would do
    regular=True,  # no `if` on the rank: all ranks at once, so a thousand are proven and simulated in no time
)


def main() -> None:
    mine = {size: bind("all_reduce", "two_rings", ROW, size) for size in range(1, 33)}

    for plan in mine.values():
        proof = prove(plan)
    print(f"proven for 1 to 32 ranks; at 32: {proof.steps} steps, {proof.sent.max():.4f} n sent per rank")

    try:
        shorter = custom(lambda rank, size: list(two_rings(rank, size))[:-1], parts=8)
        prove(bind("all_reduce", "half_a_ring", shorter, 4))
    except ScheduleError as error:
        print("without its last step:", error)

    nbytes, links = [1e3, 1e6, 1e9], uniform(alpha=1e-6, beta=1e-10)
    ratio = simulate(schedule("all_reduce", "ring", 32), links, nbytes) / simulate(mine[32], links, nbytes)
    print("times faster than one ring at 1 kB, 1 MB, 1 GB:", ratio.round(3))

    print(draw_text(mine[3]))
    Path("two_rings.svg").write_text(draw_svg(mine[4]), encoding="utf-8")

    arrays = [np.arange(10.0) * (rank + 1) for rank in range(4)]
    results = run_threads(4, lambda comm: comm.all_reduce(arrays[comm.rank], algorithm=ROW))
    print("on 4 ranks:", results[0], all(np.array_equal(result, sum(arrays)) for result in results))


if __name__ == "__main__":
    main()
