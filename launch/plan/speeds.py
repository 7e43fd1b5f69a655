"""What a core of this machine does in a second, measured: a process of its own with one BLAS thread, 0.5 s.

    alone      products of 256 x 256, a GELU, attention of 16 and of 64 tokens, small ops with their backward
    together   the same products on all cores at once, a thread each

A process of its own, because the number of BLAS threads stands when NumPy is loaded, and two of them that wait for one
another on a busy machine are forty times slower than one. The best of many tries counts: what else runs is not the
machine's. `together` is the median of pairs, one and all in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

from dtrain.errors import UserError
from dtrain.launch import environment

BUDGET = 0.05  # seconds of each measurement
LIMIT = 60.0  # seconds of all, on a busy machine
WIDTH = 32  # of a head
FAILED = "the process that measures what a core of this machine does failed"
INSTEAD = (
    "Try again when the machine is less busy, or give the speed to `dtrain plan`: --gflops, such as --gflops 30; for "
    "parallel: auto, write the layout that it prints into the configuration, such as parallel.dp=4"
)


@dataclass(frozen=True)
class Speeds:
    """Of one core."""

    flops: float
    """FLOP/s of products, alone."""
    bandwidth: float
    """Bytes of outputs per second in ops that are no products."""
    per_op: float
    per_head: float
    per_score: float
    """Seconds, see Machine."""
    together: float


@cache
def measured(dtype: str) -> Speeds:
    """Of this machine, in the float type of the computation. UserError where that cannot be measured."""
    variables = {**os.environ, **dict.fromkeys(environment.THREAD_VARIABLES, "1")}
    command = [sys.executable, "-c", "from dtrain.launch.plan.speeds import main; main()", dtype]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        raise UserError(f"{FAILED}: it took more than {LIMIT:g} s. {INSTEAD}") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"{FAILED}: exit code {error.returncode}, {said[-1]}. {INSTEAD}") from None
    except OSError as error:
        raise UserError(f"{FAILED}: {error}. {INSTEAD}") from None
    return Speeds(**json.loads(done.stdout))


def measure(dtype: str, cores: int) -> Speeds:
    """In this process, whose BLAS has one thread."""
    import numpy as np

    import dtrain.functional as F
    from dtrain import kernels
    from dtrain.tensor import Tensor

    a, b = np.ones((256, 256), dtype), np.ones((256, 256), dtype)
    wide, small = np.ones((256, 1024), dtype), np.ones((4, 4), dtype)
    run = kernels.of(wide)

    def products(count: int = 4) -> None:
        for _ in range(count):
            np.matmul(a, b)

    def attention(length: int) -> float:
        q = np.ones((2, length, 4, WIDTH), dtype)
        return fastest(lambda: run.attention(q, q, q, True, 0.1)) / 8  # heads of all samples

    leaf, bias = Tensor(small, requires_grad=True), Tensor(small[0], requires_grad=True)
    turns = 4

    def block() -> None:
        x = leaf
        for _ in range(turns):
            x = F.bias_residual(F.gelu(F.linear(F.layer_norm(x, bias, bias), leaf), bias), bias, x)
        x.sum().backward()

    flops = 4 * 2 * 256**3 / fastest(products)
    short, long = attention(16), attention(64)
    score = max(0.0, (long - short) / (64**2 - 16**2))
    return Speeds(
        flops=flops,
        bandwidth=wide.nbytes / fastest(lambda: run.gelu(wide, None, True)),
        per_op=fastest(block) / (4 * turns) / 3,  # a backward counts as two
        per_head=max(0.0, short - score * 16**2),
        per_score=max(0.0, score - (4 * WIDTH + 13) / flops),
        together=min(1.0, statistics.median(_pair(products, cores) for _ in range(5))) if cores > 1 else 1.0,
    )


def _pair(call: Callable[[int], None], cores: int) -> float:
    """Seconds on one core / seconds on all at once."""
    start = time.perf_counter()
    call(64)
    middle = time.perf_counter()
    threads = [threading.Thread(target=call, args=(64,)) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (middle - start) / (time.perf_counter() - middle)


def fastest(call: Callable[[], object], least: int = 5) -> float:
    """Seconds of the best try."""
    times: list[float] = []
    while len(times) < least or sum(times) < BUDGET:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """What the process does."""
    print(json.dumps(asdict(measure(sys.argv[1], environment.cores()))))
