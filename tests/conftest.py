"""For all tests: ranks share the cores fairly, and generated examples are the same in every run."""

from hypothesis import settings

from dtrain.launch.environment import set_blas_threads

set_blas_threads()  # before a test imports NumPy
settings.register_profile("dtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("dtrain")
