"""A contestant of `dtrain bench COLLECTIVE` that lives in other processes: PyTorch's Gloo, one beside each rank.

    rank 0 ── pipe ── torch_collectives.py ─┐            block 1   auto  native  gloo
    rank 1 ── pipe ── torch_collectives.py ─┤ Gloo       block 2   gloo  native  auto
    ...                                    ─┘            ...       whoever has no turn sleeps in a read

So it takes its turns within the same run, on the same cores (a child inherits its rank's), at the same sizes, by the
same rule: its processes leave two barriers, each takes the time of its call, the maximum over ranks counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from dtrain.collectives import Communicator
from dtrain.errors import UserError
from dtrain.launch.bench_cases import Place
from dtrain.launch.bench_table import IN_PLACE, OUT_OF_PLACE
from dtrain.launch.mpirun import stop

NAME = "gloo"
LIMIT = 150.0  # seconds for an answer; the peer gives up a little earlier, and says why

# Where PyTorch's interface puts the result: over the input, or elsewhere.
PLACING = {"all_reduce": IN_PLACE, "broadcast": IN_PLACE, "reduce": IN_PLACE}


class Peer:
    """This rank's process of the peer. Making one is a collective call."""

    def __init__(self, comm: Communicator, python: str | None) -> None:
        """`python`: an interpreter with PyTorch, default this one. UserError on all ranks when it cannot be run."""
        self.comm = comm
        one_node = len(set(comm.transport.nodes)) == 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if one_node:
            environment["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        # What mpirun tells its ranks would make libraries in the child believe that they are one.
        for name in [name for name in environment if name.startswith(("PMI", "OMPI_", "PMIX_", "MPI_", "HYDRA_"))]:
            del environment[name]
        script = Path(__file__).parent / "peers" / "torch_collectives.py"
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        problem, port = "", 0
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            host = "127.0.0.1" if one_node else comm.hosts[0]
            place = {"rank": comm.rank, "size": comm.size, "host": host}
            if comm.rank == 0:
                self._tell(place)
                told = self._answer()
                port, self.version = told["port"], told["torch"]
        except (OSError, PeerError) as error:
            problem = str(error)
        port = comm.broadcast_object(port)
        if not problem and port:
            try:
                if comm.rank:
                    self._tell({**place, "port": port})
                self._answer()
            except (OSError, PeerError) as error:
                problem = str(error)
        problems = [text for text in comm.all_gather_object(problem) if text]
        if problems:
            self.close()
            raise UserError(
                f"--peer torch: {python or sys.executable} cannot run PyTorch's Gloo: {problems[0]}. In an environment "
                "of its own: python -m venv peer && peer/bin/pip install numpy torch --index-url "
                "https://download.pytorch.org/whl/cpu, then --peer-python peer/bin/python"
            )
        self.version = comm.broadcast_object(self.version if comm.rank == 0 else None)

    def turn(
        self, collective: str, place: Place, dtype: str, turn: int, places: int, warmup: int, iterations: int
    ) -> tuple[int, list[float]]:
        """New data, a checked run, timed ones: (wrong elements, seconds) of this rank. ValueError where Gloo cannot."""
        self._tell(
            {
                "collective": collective,
                "count": place.count,
                "dtype": dtype,
                "op": place.op,
                "turn": turn,
                "places": places,
                "warmup": warmup,
                "iterations": iterations,
            }
        )
        told = self._answer()
        if "error" in told:
            raise ValueError(f"{NAME}: {told['error']}")
        return told["wrong"], told["seconds"]

    def close(self) -> None:
        """End the process of this rank."""
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended before
                process.stdin.close()  # no more orders: it ends by itself
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                stop(process)
            process.stdout.close()
            process.stderr.close()

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([source], [], [], LIMIT)[0]:
                raise PeerError(f"no answer for {LIMIT:.0f} s")
            read = os.read(source, 1 << 16)
            if not read:
                raise PeerError(self._last_words())
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    def _last_words(self) -> str:
        assert self._process is not None and self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"


class PeerError(RuntimeError):
    """The peer ended, or does not answer."""


def placing(collective: str) -> str:
    """Where the peer's result goes."""
    return PLACING.get(collective, OUT_OF_PLACE)
