"""For all tests: ranks and workers share the cores fairly, and generated examples are the same in every run.

What the imports and the collection made lives to the end: the garbage collector need not look at it again and again.
"""

import gc
import os

import pytest
from hypothesis import settings

from dtrain.launch.environment import cores, set_blas_threads

_before = set(os.environ)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(workers))))
set_blas_threads()
import numpy  # noqa: E402, F401  its BLAS looks at the variables once, now

for _name in set(os.environ) - _before:
    del os.environ[_name]  # they are this process's: the programs that tests start are to find their own share
os.environ.setdefault("DTRAIN_TUNING", "off")  # what was measured on this machine changes no test
settings.register_profile("dtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("dtrain")


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
