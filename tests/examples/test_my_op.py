"""examples/my_op.py runs as it stands and prints the derivatives of softplus."""

import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_op.py"


def test_my_op():
    done = subprocess.run([sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = {line[:20].strip(): line[20:].strip() for line in done.stdout.splitlines()}
    sigmoid = 1 / (1 + np.exp(-np.array([-1.0, 0.5, 2.0])))
    numbers = lambda name: np.array(lines[name].strip("[]").split(), float)  # noqa: E731
    np.testing.assert_allclose(numbers("J v, forward mode"), sigmoid, rtol=1e-7)
    np.testing.assert_allclose(numbers("Hessian times ones"), sigmoid * (1 - sigmoid), rtol=1e-7)
