"""The source of the compiled kernels: loops over rows that Numba turns into one object file (`build.py`).

Nothing here is imported at run time but `signatures.py`; `dtrain/kernels/native.py` loads the object file.
"""
