"""What a result was made with: for summary.json and for tables of measurements."""

import platform

import numpy as np

from dtrain import __version__
from dtrain.collectives import Communicator


def versions(comm: Communicator) -> dict[str, str]:
    """Version of everything that decides on the numbers; of the MPI library its own words and its thread level."""
    found = {"dtrain": __version__, "numpy": np.__version__, "python": platform.python_version()}
    if comm.transport.name == "mpi":
        from dtrain.collectives import mpi

        found["mpi"] = " ".join(mpi.library().split())
    return found
