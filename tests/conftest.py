"""For all tests: ranks share the cores fairly, and generated examples are the same in every run."""

import os

from hypothesis import settings

from dtrain.launch.environment import set_blas_threads

set_blas_threads()  # before a test imports NumPy
os.environ.setdefault("DTRAIN_TUNING", "off")  # what was measured on this machine changes no test
settings.register_profile("dtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("dtrain")
