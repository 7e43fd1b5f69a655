"""examples/ddp_in_python.py learns, and prints the same losses on one rank and on three."""

import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "ddp_in_python.py")


def losses(*launcher: str) -> list[str]:
    command = [*launcher, sys.executable, "-W", "error", EXAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (launcher or not done.stderr), done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines() if "loss" in line]


def test_one_rank_and_three():
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    assert mpirun is not None, "the tests need mpirun: pip install -e '.[mpich]'"
    alone = losses()
    assert len(alone) == 5 and float(alone[-1]) < 0.02 < 0.3 < float(alone[0])
    assert losses(mpirun, "-n", "3") == alone
