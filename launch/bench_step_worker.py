"""One rank of dtrain under `dtrain bench step`: the real trainer for a few steps, then the bare matmuls of a step.

    mpirun -n P python -m dtrain.launch.bench_step_worker FOLDER   reads FOLDER/config.yaml, writes report-R.json there

The report has the same keys as that of launch/peers/torch_gpt.py. A step is the time between two records of the
trainer: data, forward, backward, communication, clipping, update.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from dtrain.launch import environment
from dtrain.launch.failures import guard

BLOCKS, REPEATS = 5, 2  # the bare matmuls: the median of 5 times 2 steps' worth of them


def work(folder: Path) -> None:
    """Run the configuration in `folder` to its last step and write this rank's report there. Collective."""
    import time

    from dtrain.launch import configuration

    config = configuration.load(folder / "config.yaml")
    from dtrain.collectives import world
    from dtrain.launch import bare_matmuls
    from dtrain.launch.assembly import assemble
    from dtrain.launch.run import peak_memory

    comm = world()
    environment.check_world(comm.size)
    trainer = assemble(config, comm)
    seconds, first_step_end, loss = [], 0.0, 0.0
    before = time.perf_counter()
    for record in trainer.run():
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        first_step_end = first_step_end or time.time()
        loss = record.loss
    memory = peak_memory()  # before the buffers of the bare matmuls

    products = bare_matmuls.of_step(trainer.model, trainer.config, trainer.mesh["dp"].size)
    half = config.train.dtype in ("float16", "bfloat16")
    make = bare_matmuls.runner(products, "float32" if half else config.train.dtype)  # BLAS has no products of halves
    make()
    blocks = []
    for _ in range(BLOCKS):
        comm.barrier()  # all ranks at the same time, as in a step: they share caches and memory
        before = time.perf_counter()
        for _ in range(REPEATS):
            make()
        comm.barrier()
        blocks.append((time.perf_counter() - before) / REPEATS)
    report = {
        "rank": comm.rank,
        "first_step_end": first_step_end,
        "step_seconds": seconds,
        "memory_bytes": memory,
        "parameters": trainer.model.num_parameters(),
        "loss": loss,
        "vocabulary": trainer.data.vocabulary,
        "bare_seconds": sorted(blocks)[BLOCKS // 2],
        "bare_flops": sum(product.flops * count for product, count in products.items()),
        "versions": _versions(),
    }
    (folder / f"report-{comm.rank}.json").write_text(json.dumps(report))
    comm.barrier()


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
        "mpi": mpi.library(),
        "kernels": kernels.describe(),
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(os.environ.get("DTRAIN_BENCH_LIMIT", "600")), exit=True)
    environment.set_blas_threads()
    with guard():
        work(Path(sys.argv[1]))
