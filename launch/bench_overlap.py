"""`dtrain bench overlap`: how much of a started collective is hidden behind computing; the progress thread off and on.

    start   ├ communication ────────┤ wait          alone
            ├ matmuls ──────────────┤               alone
    start   ├ matmuls ──────────────┤ wait          together;  overlap = 1 - (together - matmuls) / communication

The matmuls are small ones of NumPy, repeated for about as long as the communication takes, as in a backward pass.
As in OSU's and IMB's non-blocking benchmarks, except that the time is the maximum over ranks per iteration, then the
median, and that thread off and on take turns in blocks of the same process. Where every core has a rank that computes,
and the ranks move the data themselves, nothing can be hidden: the gain there is that nobody waits for one who is late.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.cache import write_atomic
from dtrain.collectives import Array, Communicator, Work
from dtrain.errors import UserError
from dtrain.launch import bench_report, environment

BLOCKS = 6
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather")
_COLUMNS = f"{'collective':<15}{'bytes':>12}  {'memory':<8}{'thread':<7}"
_HEADING = f"{_COLUMNS}{'compute us':>12}{'comm us':>12}{'both us':>12}{'overlap':>9}"


@dataclass(frozen=True)
class Row:
    """Medians in microseconds; overlap from 0 to 1."""

    collective: str
    size: int
    memory: str
    thread: bool
    compute: float
    communication: float
    both: float

    @property
    def overlap(self) -> float:
        """The hidden share of the communication."""
        return min(1.0, max(0.0, 1 - (self.both - self.compute) / self.communication))

    def line(self) -> str:
        """As printed."""
        start = f"{self.collective:<15}{self.size:>12}  {self.memory:<8}{'on' if self.thread else 'off':<7}"
        return f"{start}{self.compute:>12.1f}{self.communication:>12.1f}{self.both:>12.1f}{self.overlap:>8.0%}"


class Matmuls:
    """Work for the processor that can be made as long as wanted: float32 matmuls of 128 x 128."""

    def __init__(self) -> None:
        self._a = np.full((128, 128), 1e-3, np.float32)
        self._b = np.full((128, 128), 1e-3, np.float32)
        self._out = np.empty_like(self._a)
        self.repeats = 1

    def __call__(self) -> None:
        """Compute."""
        for _ in range(self.repeats):
            np.matmul(self._a, self._b, out=self._out)


def start(comm: Communicator, collective: str, array: Array) -> Work:
    """The started form on `array`, in place where there is such a form."""
    if collective in ("all_reduce", "broadcast"):
        return getattr(comm, f"{collective}_async")(array, out=array)  # type: ignore[no-any-return]
    return getattr(comm, f"{collective}_async")(array)  # type: ignore[no-any-return]


def measure(comm: Communicator, collective: str, size: int, private: bool, iterations: int) -> list[Row]:
    """The rows with the thread off and on. Collective; all ranks return the same."""
    count = max(comm.size, size // 4)
    rows = -(-count // comm.size) if collective in ("all_gather", "gather") else count
    array = np.empty(rows, np.float32) if private else comm.empty(rows)
    array[...] = 0
    matmuls = Matmuls()

    def communicate() -> None:
        start(comm, collective, array).wait()

    def both() -> None:
        work = start(comm, collective, array)
        matmuls()
        work.wait()

    alone = float(np.median(_times(comm, communicate, 10)))
    matmuls.repeats = 20
    matmuls.repeats = max(1, round(20 * alone / float(np.median(_times(comm, matmuls, 5)))))
    per_block = max(2, iterations // BLOCKS)
    found: dict[bool, list[list[float]]] = {False: [[], [], []], True: [[], [], []]}
    for block in range(2 * BLOCKS):
        on = bool(block % 2)
        comm.use_progress_thread(on)
        communicate()  # untimed
        for times, action in zip(found[on], (matmuls, communicate, both), strict=True):
            times += _times(comm, action, per_block)
    memory = "private" if private or comm.node is None else "window"
    return [
        Row(collective, size, memory, on, *(float(np.median(times)) * 1e6 for times in found[on]))
        for on in (False, True)
    ]


def _times(comm: Communicator, action: Any, count: int) -> list[float]:
    """Seconds per call, the maximum over ranks."""
    times = np.empty(count)
    for step in range(count):
        comm.barrier()
        began = time.perf_counter()
        action()
        times[step] = time.perf_counter() - began
    return comm.all_reduce(times, "max").tolist()  # type: ignore[no-any-return]


def bench(
    collectives: tuple[str, ...], sizes: Sequence[int], iterations: int, private: bool, json_path: Path | None = None
) -> list[Row]:
    """Measure on all ranks of the job, print and write on rank 0. Collective."""
    from dtrain.collectives import world

    comm = world()
    environment.check_world(comm.size)
    if comm.size == 1:
        raise UserError(
            "bench overlap: one rank communicates with nobody; start it as: mpirun -n 2 dtrain bench overlap"
        )
    if not comm.transport.threaded:
        raise UserError("bench overlap: the thread needs MPI_THREAD_MULTIPLE; unset MPI4PY_RC_THREAD_LEVEL")
    header = bench_report.header(comm)
    rows: list[Row] = []
    if comm.rank == 0:
        print(f"# {header['mpi']}; {comm.size} ranks on {header['nodes']} node(s), {header['cores']} cores")
        print(_HEADING, flush=True)
    for collective in collectives:
        for size in sizes:
            for row in measure(comm, collective, size, private, iterations):
                rows.append(row)
                if comm.rank == 0:
                    print(row.line(), flush=True)
    if json_path is not None and comm.rank == 0:
        content = {"header": header, "rows": [{**asdict(row), "overlap": row.overlap} for row in rows]}
        try:
            write_atomic(json_path, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise UserError(f"--json: {json_path}: cannot be written: {error.strerror}") from None
    return rows
