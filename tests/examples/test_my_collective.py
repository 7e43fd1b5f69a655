"""examples/my_collective.py runs as it stands: proof, refusal, simulation, drawing and a run are as it says."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_collective.py"


def test_my_collective(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "at 32: 62 steps, 1.9375 n sent per rank" in done.stdout
    assert "without its last step: all_reduce half_a_ring between 4 ranks: rank 0, step" in done.stdout
    ratios = done.stdout.split("1 GB: [")[1].split("]")[0].split()
    assert 1 < float(ratios[0]) < 1.1 and float(ratios[2]) > 1.99
    assert done.stdout.rstrip().endswith("True")
    assert (tmp_path / "two_rings.svg").read_text(encoding="utf-8").startswith("<svg")
