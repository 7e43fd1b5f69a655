"""Keys that were given and change nothing, because something else that they need is not there.

A message and no error: one file is run on 1 and on 8 ranks, and an override need not take the rest apart. But whoever
asks for a technique and does not get it is told.
"""

from collections.abc import Iterator
from typing import Any

from dtrain.config.whole import Config


def idle(config: Config) -> Iterator[str]:
    """A line for each; of a configuration whose parallel.dp is filled in."""
    parallel, pipeline = config.parallel, config.pipeline
    zero = parallel.data_parallel.startswith("zero")
    ranks = parallel.dp * parallel.ep * parallel.cp
    alone = "there is one data rank"
    not_zero = alone if zero else f"parallel.data_parallel is {parallel.data_parallel}"
    no_pipeline = "parallel.pp is 1"
    rows: list[tuple[str, Any, Any, bool, str]] = [  # key, value, default, whether it is of use, why not
        ("parallel.sequence", parallel.sequence, False, parallel.tp > 1, "parallel.tp is 1"),
        ("parallel.plan", parallel.plan, None, parallel.tp > 1, "parallel.tp is 1"),
        ("parallel.tensor", parallel.tensor, "1d", parallel.tp > 1, "parallel.tp is 1"),
        ("parallel.context", parallel.context, "ring", parallel.cp > 1, "parallel.cp is 1"),
        ("parallel.replicate", parallel.replicate, False, zero and ranks > 1, not_zero),
        ("parallel.shard_over", parallel.shard_over, 0, zero and ranks > 1, not_zero),
        ("parallel.reshard", parallel.reshard, True, parallel.data_parallel == "zero3" and ranks > 1,
         alone if parallel.data_parallel == "zero3" else f"parallel.data_parallel is {parallel.data_parallel}"),
        ("parallel.embedding", parallel.embedding, "table", config.model.kind == "dlrm",
         f"model.kind is {config.model.kind}"),
        ("parallel.compression.kind", parallel.compression.kind, "none", ranks > 1, alone),
        ("pipeline.schedule", pipeline.schedule, "1f1b", parallel.pp > 1, no_pipeline),
        ("pipeline.microbatches", pipeline.microbatches, None, parallel.pp > 1, no_pipeline),
        ("pipeline.chunks", pipeline.chunks, None, parallel.pp > 1, no_pipeline),
        ("pipeline.cut", pipeline.cut, None, parallel.pp > 1, no_pipeline),
        ("pipeline.vertical_sync", pipeline.vertical_sync, False,
         parallel.pp > 1 and pipeline.schedule == "pipedream",
         no_pipeline if parallel.pp == 1 else f"pipeline.schedule is {pipeline.schedule}"),
        ("log.trace", config.log.trace, 0, not config.parameter_server.servers, "servers have none"),
    ]  # fmt: skip
    for key, value, default, used, why in rows:
        if value != default and not used:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"{key}: {shown} has no effect: {why}"
