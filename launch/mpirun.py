"""The mpirun that belongs to this Python's MPI: found, asked who it is, called as its kind wants it.

    mpi4py loads a library  ──►  a row of KINDS  ──►  the first mpirun beside this Python or on PATH that says the same

An mpirun of another MPI than the library's would start ranks that do not see one another.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UserError
from dtrain.launch import environment

_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"

# What Hydra's option -print-all-exitcodes prints in the end, however it went.
_EXIT_CODES = r"\[mpiexec@\S+\] Exit codes: ((?:\[\S+\] [\d,]*\d\s+)+)"


@dataclass(frozen=True)
class Kind:
    """What differs between the MPIs."""

    name: str
    library: str
    """In what the library says about itself."""
    version: str
    """In what `mpirun --version` says."""
    programs: tuple[str, ...]
    """What its mpirun may be called, the best first."""
    options: tuple[str, ...]
    hosts: str
    """The option for a file of hosts."""
    lost: Callable[[str], str]
    """Which rank or host ended first and how, from mpirun's last words; empty where they do not tell."""
    crowded: Mapping[str, str]
    """Variables that give leave to start more ranks than there are cores."""
    root: Mapping[str, str]
    """Variables that give leave to be root."""


def _hydra(said: str) -> str:
    """From `Exit codes: [host] 0,9,0`: as wait(2) has them, in the order of ranks. Hydra kills (9) whoever is left."""
    found = re.search(_EXIT_CODES, said)
    hosts = re.findall(r"\[(\S+?)(?::\d+)?\] ([\d,]+)", found[1]) if found else []
    statuses = [(host, int(status)) for host, listed in hosts for status in listed.split(",")]
    ended = [(rank, host, -(status & 127) or status >> 8) for rank, (host, status) in enumerate(statuses) if status]
    first = [one for one in ended if one[2] != -signal.SIGKILL] or ended
    if not first:
        return ""
    ranks = " or ".join(str(rank) for rank, _, _ in first) if len(hosts) == 1 and len(first) < 3 else ""
    return f"{f'rank {ranks}' if ranks else 'a rank'} on {first[0][1]} {_how(first[0][2])}"


def without_exit_codes(said: bytes) -> bytes:
    """What the user is to see of it: not what he has not asked for."""
    return re.sub(_EXIT_CODES.encode(), b"", said)


def _prte(said: str) -> str:
    killed = re.search(r"process rank (\d+) with PID \d+ on node (\S+)\s+exited\s+on\s+signal (\d+)", said)
    if killed:
        return f"rank {killed[1]} on {killed[2]} {_how(-int(killed[3]))}"
    left = re.search(r"Process name: \[.*,(\d+)\]\s+Exit code:\s+(\d+)", said)
    if left:
        return f"rank {left[1]} {_how(int(left[2]))}"
    gone = re.search(r"lost\s+communication\s+with\s+a\s+remote\s+daemon.*?Remote daemon:.*? on node (\S+)", said, re.S)
    return f"host {gone[1]} is lost" if gone else ""


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


# For version 5, and 4.
_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_CROWDED = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
_CODES = ("-print-all-exitcodes",)

KINDS = (
    # name and what library and mpirun say; programs, options; then hosts, lost, crowded, root
    Kind("MPICH", "MPICH", "HYDRA", ("mpirun", "mpiexec.hydra", "mpirun.mpich"), _CODES, "-f", _hydra, {}, {}),
    # Intel's mpirun is a script that takes the first mpiexec.hydra on PATH, whose ever it is.
    Kind("Intel MPI", "Intel(R) MPI", "Intel(R) MPI", ("mpiexec.hydra", "mpirun"), _CODES, "-f", _hydra, {}, {}),
    Kind("Open MPI", "Open MPI", "Open MPI", ("mpirun", "mpirun.openmpi"), (), "--hostfile", _prte, _CROWDED, _ROOT),
)  # fmt: skip


@dataclass(frozen=True)
class Mpirun:
    """A program that starts ranks, and its kind."""

    path: str
    kind: Kind

    def command(self, ranks: int, command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """The command line for so many ranks."""
        return [self.path, *self.kind.options, *options, "-n", str(ranks), *command]

    def leave(self, ranks: int, elsewhere: bool = False) -> dict[str, str]:
        """The variables that let this kind start so many ranks here; what the user has set stays.

        elsewhere: on hosts, or in places, that the user names; how many ranks may be where is then for him to say.
        """
        crowded = not elsewhere and ranks > environment.cores() // environment.threads_per_core()
        needed = {**(self.kind.root if os.geteuid() == 0 else {}), **(self.kind.crowded if crowded else {})}
        return {name: value for name, value in needed.items() if name not in os.environ}


def find() -> Mpirun:
    """The mpirun of the MPI that mpi4py loads; UserError where there is none."""
    told = library()
    kind = next((kind for kind in KINDS if kind.library in told), None)
    if kind is None:
        raise UserError(f"MPI: {told}: its mpirun is not known to dtrain; call it yourself: dtrain run")
    beside, others = str(Path(sys.executable).parent), []
    for program in filter(None, [shutil.which(name, path=path) for path in (beside, None) for name in kind.programs]):
        said = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if kind.version.encode() in said.stdout + said.stderr:
            return Mpirun(program, kind)
        others.append(program)
    found = f"; of another MPI: {', '.join(others)}" if others else ""
    raise UserError(
        f"mpirun: none of {kind.name}, which mpi4py uses, beside {sys.executable} or on PATH{found}. "
        "pip install 'dtrain[mpich]' brings one, `module load` a cluster's; or start the ranks by srun: dtrain run"
    )


def library() -> str:
    """What the MPI library of mpi4py calls itself, asked in a process where MPI does not begin; UserError."""
    answer = subprocess.run([sys.executable, "-c", _LIBRARY], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        why = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise UserError(f"MPI: {why}; pip install 'dtrain[mpich]', or put a system MPI's libmpi on the library path")
    return answer.stdout.partition("\n")[0].strip()


def stop(process: subprocess.Popen[bytes], grace: float = 3.0) -> None:
    """End a process that was started in its own session, with its children; one that has ended is left alone."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):  # mpirun passes the first on to its ranks
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
