"""`dtrain show graph`: the graph of one forward as a picture; the backward walks it the other way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dtrain import graph as graphs
from dtrain.config import Config
from dtrain.errors import UserError

WRITERS = {".svg": graphs.svg, ".json": graphs.to_json, ".dot": graphs.dot}
SAMPLES = 2  # the shapes show which dim is the batch; FLOPs and bytes are those of so many samples


def graph(config: Config, output: Path, ranks: int = 1) -> None:
    """Build the model of `config`, run it on SAMPLES samples of its data, and write the graph to `output`.

    ranks: print how it is cut into as many subgraphs, with the messages between them.
    """
    from dtrain import models
    from dtrain.data import data_of

    data = data_of(config)
    model = models.build(config.model, data, dtype=config.train.dtype, seed=config.seed)
    batch = data.train.batch(np.arange(min(SAMPLES, len(data.train))))
    with graphs.tracing():  # lines remember their modules, recomputed blocks are seen
        loss = model.loss(batch)
    captured = graphs.capture(loss)
    if output.suffix not in WRITERS:
        raise UserError(f"--output: {output}: allowed: names that end in {', '.join(WRITERS)}")
    if ranks > len(captured.lines):
        raise UserError(f"--ranks: {ranks}; the graph has {len(captured.lines)} ops, allowed: as many or fewer")
    try:
        output.write_text(WRITERS[output.suffix](captured), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {output}: cannot be written: {error.strerror}") from None
    print(
        f"{output}: the forward of {config.name} on {len(batch['targets'])} samples: {len(captured.lines)} ops, "
        f"{captured.flops:,} FLOPs, {captured.bytes:,} bytes of outputs, {captured.num_parameters:,} parameters"
    )
    if ranks > 1:
        from dtrain.launch.graph_parts import listing, partition

        print("\n" + "\n".join(listing(partition(captured, ranks))))
