"""Compression of gradients between nodes: what travels is smaller than what is summed.

    none        4 n bytes              as they are
    float16     2 n + 4                casting.py
    bfloat16    2 n                    casting.py
    int8        n + 4 n / block        quantised.py
    top_k       8 n fraction           top_k.py          with error feedback
    power_sgd   4 r (rows + columns)   power_sgd.py      with error feedback

Bytes for n elements of float32, per message; how often it is sent is in each file, and in `docs/compression.md`. The
way there and back, the memory and the checkpoints are the same for all: `between_nodes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.config import CompressionConfig
from dtrain.strategies.compression.between_nodes import BetweenNodes
from dtrain.strategies.compression.casting import Casting
from dtrain.strategies.compression.interface import Compression
from dtrain.strategies.compression.power_sgd import PowerSGD
from dtrain.strategies.compression.quantised import Quantised
from dtrain.strategies.compression.top_k import TopK

# parallel.compression.kind -> what it makes of its section
COMPRESSIONS: dict[str, Callable[[Any], Compression]] = {
    "float16": lambda options: Casting("float16"),
    "bfloat16": lambda options: Casting("bfloat16"),
    "int8": lambda options: Quantised(options.block, options.rounding == "stochastic"),
    "top_k": lambda options: TopK(options.fraction),
    "power_sgd": lambda options: PowerSGD(options.rank),
}


def compressor(options: CompressionConfig) -> BetweenNodes | None:
    """What `DistributedDataParallel` is given; None for `kind: none`."""
    if options.kind == "none":
        return None
    return BetweenNodes(COMPRESSIONS[options.kind](options), getattr(options, "everywhere", False))


__all__ = ["COMPRESSIONS", "BetweenNodes", "Compression", "compressor"]
