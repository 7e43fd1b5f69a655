"""For all tests: ranks and workers share the cores fairly.

What the imports and the collection made lives to the end: the garbage collector need not look at it again and again.

DTRAIN_OWN=all_reduce=examples/my_collective.py:ROW puts an algorithm of one's own into the catalogue, under the name of
its function, so that everything that is tested for the catalogue's is tested for it:

    DTRAIN_OWN=… python -m pytest tests/unit -k two_rings              proof, executor, simulation, bits, every length
    DTRAIN_OWN=… mpirun -n 4 python -m pytest --with-mpi tests/mpi/test_scheduled.py -k two_rings
"""

import gc
import os

import pytest

from dtrain.launch.environment import cores, set_blas_threads

_before = set(os.environ)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(workers))))
set_blas_threads()
import numpy  # noqa: E402, F401  its BLAS looks at the variables once, now

for _name in set(os.environ) - _before:
    del os.environ[_name]  # they are this process's: the programs that tests start are to find their own share
os.environ.setdefault("DTRAIN_TUNING", "off")  # what was measured on this machine changes no test


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()


def _take_in(own: str) -> None:
    """COLLECTIVE=PATH.py:NAME, before the tests read the catalogue."""
    from dtrain.collectives.schedules import ALGORITHMS
    from dtrain.collectives.schedules.own import load_row

    collective, _, name = own.partition("=")
    row = load_row(collective, name)
    ALGORITHMS[collective][row.steps.__name__] = row


if "DTRAIN_OWN" in os.environ:
    _take_in(os.environ["DTRAIN_OWN"])
