"""One rank of dtrain under `dtrain bench step`: the real trainer, then bare matmuls and steps in turns.

    mpirun -n P python -m dtrain.launch.bench_step_worker FOLDER   reads FOLDER/config.yaml, writes report-R.json there

The report has the same keys as that of launch/peers/torch_gpt.py. A step is the time between two records of the
trainer: data, forward, backward, communication, clipping, update. The bare matmuls take turns with PAIRS more steps, so
that a busy machine is as busy for both.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.launch import environment
from dtrain.launch.bench_launch import PAIRS
from dtrain.launch.failures import guard

if TYPE_CHECKING:
    from dtrain.collectives import Communicator
    from dtrain.trainer import Trainer


def work(folder: Path) -> None:
    """Run the configuration in `folder` to its last step and write this rank's report there. Collective."""
    from dtrain.launch import configuration

    config = configuration.load(folder / "config.yaml")
    from dtrain.collectives import world
    from dtrain.kernels.memory import peak_memory
    from dtrain.launch.assembly import assemble

    comm = world()
    environment.check_world(comm.size)
    trainer = assemble(config, comm)
    records = trainer.run()
    seconds, first_step_end = [], 0.0
    before = time.perf_counter()
    for _ in range(trainer.total_steps - PAIRS):
        record = next(records)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        first_step_end = first_step_end or time.time()
    memory = peak_memory()  # before the buffers of the bare matmuls

    report: dict[str, object] = {
        "rank": comm.rank,
        "first_step_end": first_step_end,
        "step_seconds": seconds,
        "memory_bytes": memory,
        "parameters": trainer.model.num_parameters(),
        "loss": record.loss,
        "vocabulary": trainer.data.vocabulary,
        "versions": _versions(),
    }
    if trainer.mesh.size("dp") == comm.size and config.parallel.data_parallel in ("naive", "ddp"):
        report |= _beside_bare_matmuls(trainer, comm, lambda: next(records))
    (folder / f"report-{comm.rank}.json").write_text(json.dumps(report))
    comm.barrier()


def _beside_bare_matmuls(trainer: Trainer, comm: Communicator, step: Callable[[], object]) -> dict[str, object]:
    """Steps and their matrix products alone, in turns; of a model that is whole on every rank."""
    from dtrain.launch import bare_matmuls

    products = bare_matmuls.of_step(trainer.model, trainer.config, trainer.mesh["dp"].size)
    dtype = trainer.config.train.dtype
    make = bare_matmuls.runner(products, "float32" if dtype in ("float16", "bfloat16") else dtype)  # BLAS has no halves
    make()

    def timed(what: Callable[[], object]) -> float:
        """Seconds until the last rank has done it; all begin at the same time, as they share caches and memory."""
        comm.barrier()
        before = time.perf_counter()
        what()
        comm.barrier()
        return time.perf_counter() - before

    pairs = [(timed(make), timed(step)) for _ in range(PAIRS)]
    return {
        "bare_and_step_seconds": pairs,
        "bare_flops": sum(product.flops * count for product, count in products.items()),
    }


def _versions() -> dict[str, str]:
    import platform

    import numpy as np

    from dtrain import __version__, kernels
    from dtrain.collectives import mpi

    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "dtrain": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "mpi": " ".join(mpi.library().replace("Version:", "").split()),
        "kernels": kernels.describe(),
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(os.environ.get("DTRAIN_BENCH_LIMIT", "600")), exit=True)
    environment.set_blas_threads()
    with guard():
        work(Path(sys.argv[1]))
