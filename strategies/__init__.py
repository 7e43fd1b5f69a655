"""Strategies: one way to use one axis of the mesh per file; a strategy transforms a model."""

if __name__ == "strategies":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.strategies, not strategies")

from collections.abc import Callable

from dtrain.config import ParallelConfig
from dtrain.strategies.ddp import Compressor, DistributedDataParallel
from dtrain.strategies.naive import NaiveDataParallel
from dtrain.strategy import Strategy


def _compressor(parallel: ParallelConfig) -> Compressor | None:
    if parallel.compression.kind == "none":
        return None
    from dtrain.strategies.compression import compressor  # five files that few runs need

    return compressor(parallel.compression)


# parallel.data_parallel -> what it makes of the section `parallel`
DATA_PARALLEL: dict[str, Callable[[ParallelConfig], Strategy]] = {
    "naive": lambda parallel: NaiveDataParallel(),
    "ddp": lambda parallel: DistributedDataParallel(parallel.bucket_mb, _compressor(parallel)),
}

__all__ = ["DATA_PARALLEL", "DistributedDataParallel", "NaiveDataParallel", "Strategy"]
