"""Context parallelism trains sequences that one rank has no memory for: 16384 tokens, every rank under the same limit.

    DTRAIN_LONG=1 python -m pytest tests/system/test_context_memory.py

Twelve seconds on two idle cores, but not part of every run: what a process has at the start depends on the MPI library.
One layer whose MLP is wide (4096), so that nearly all memory is that of its activations: 16384 x 4096 numbers are 256
MiB, and one rank needs three such arrays for its forward. The limit is what a process may have for itself (RLIMIT_DATA:
libraries and the windows that ranks share do not count).
"""

import os

import pytest

from tests.system import program
from tests.system.program import Process

LIMIT = 700_000  # KB, as `ulimit` counts
MODEL = {
    "kind": "gpt", "layers": 1, "dim": 32, "heads": 1, "hidden": 4096, "sequence": 16384, "norm": "rms",
    "mlp": "swiglu", "position": "rotary", "bias": False,
}  # fmt: skip


@pytest.mark.skipif("DTRAIN_LONG" not in os.environ, reason="DTRAIN_LONG=1 asks for it")
@pytest.mark.timeout(280)
def test_eight_ranks_train_a_sequence_that_one_rank_has_no_memory_for(tmp_path, text):
    if program.MPIRUN is None:
        pytest.skip("no mpirun")
    train = {"steps": 1, "global_batch": 1, "micro_batch": 1, "dtype": "float32", "validate": {"every": 0}}
    sections = {"model": MODEL, "train": train, "checkpoint": {"every": 0}, "sample": {"tokens": 0}}
    config = program.write_config(tmp_path, text, **sections)

    def run(ranks):
        command = f"ulimit -d {LIMIT}; exec {program.BIN / 'dtrain'} run {config} parallel.cp={ranks}"
        return Process(program.on(ranks, "bash", "-c", command), cwd=tmp_path).finish()

    alone = run(1)
    assert alone.code != 0 and "Unable to allocate" in alone.words, alone.out + alone.err
    together = run(8)
    assert together.code == 0 and "trained 1 steps" in together.out, together.out + together.err
