"""Strategies: one way to use one axis of the mesh per file; a strategy transforms a model."""

if __name__ == "strategies":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.strategies, not strategies")

from collections.abc import Callable

from dtrain.config import Config, ParallelConfig
from dtrain.strategies.ddp import Compressor, DistributedDataParallel
from dtrain.strategies.naive import NaiveDataParallel
from dtrain.strategy import Strategy


def _compressor(parallel: ParallelConfig) -> Compressor | None:
    if parallel.compression.kind == "none":
        return None
    from dtrain.strategies.compression import compressor  # five files that few runs need

    return compressor(parallel.compression)


def _zero(stage: int) -> Callable[[ParallelConfig], Strategy]:
    def make(parallel: ParallelConfig) -> Strategy:
        from dtrain.strategies.zero import ZeRO

        accumulate = parallel.pp > 1 or parallel.reproducible
        return ZeRO(stage, parallel.replicate, accumulate, parallel.shard_over, parallel.reshard)

    return make


# parallel.data_parallel -> what it makes of the section `parallel`
DATA_PARALLEL: dict[str, Callable[[ParallelConfig], Strategy]] = {
    "naive": lambda parallel: NaiveDataParallel(),
    "ddp": lambda parallel: DistributedDataParallel(parallel.bucket_mb, _compressor(parallel)),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}


def _tensor(config: Config) -> Strategy:
    if config.parallel.tensor == "2d":
        from dtrain.strategies.tensor.summa_strategy import SummaParallel

        return SummaParallel()
    from dtrain.strategies.tensor import PLANS, TensorParallel

    plan: dict[str, str] = PLANS["mlp" if config.model.kind == "mlp" else "transformer"]
    if config.parallel.plan is not None:
        plan = {pattern: str(style) for pattern, style in config.parallel.plan.items()}
    return TensorParallel(plan, config.parallel.sequence)


def _context(config: Config) -> Strategy:
    from dtrain.strategies.context import ContextParallel

    return ContextParallel(config.parallel.context)


def _expert(config: Config) -> Strategy:
    from dtrain.strategies.expert import ExpertParallel

    return ExpertParallel()


def _pipeline(config: Config) -> Strategy:
    from dtrain.strategies.pipeline import PipelineParallel  # many files that few runs need

    pipeline = config.pipeline
    microbatches = config.train.global_batch // (config.parallel.dp * config.parallel.ep) // config.train.micro_batch
    if pipeline.schedule.startswith("pipedream"):
        from dtrain.strategies.pipeline.pipedream import from_config

        return from_config(config, microbatches)
    return PipelineParallel(pipeline.schedule, microbatches, pipeline.chunks, pipeline.cut)


def make_lora(config: Config) -> Strategy:
    """Adapters beside frozen layers; applied after what cuts layers, before a pipeline."""
    from dtrain.strategies.lora import LoRA

    assert config.lora is not None
    return LoRA(config.lora)


def make_embedding(config: Config) -> Strategy:
    """The tables of a recommender, cut over the data axis; its strategy goes before that of the data axis."""
    from dtrain.strategies.embedding import EmbeddingParallel

    return EmbeddingParallel(config.parallel.embedding, config.train.micro_batch)


# An axis of the mesh that is longer than 1 -> its strategy. They are applied in this order, that of the data axis last.
AXES: dict[str, Callable[[Config], Strategy]] = {
    "tp": _tensor,
    "cp": _context,
    "ep": _expert,
    "pp": _pipeline,
}

__all__ = [
    "AXES",
    "DATA_PARALLEL",
    "DistributedDataParallel",
    "NaiveDataParallel",
    "Strategy",
    "make_embedding",
    "make_lora",
]
