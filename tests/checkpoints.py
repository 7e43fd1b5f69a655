"""Small checkpoints for the tests of saving, reading and damage."""

from pathlib import Path

import numpy as np

from dtrain.checkpoint import Piece, save
from dtrain.collectives import single

SHARD = "model-00000-of-00001.safetensors"
"""The one file with arrays that one rank writes."""


def whole(name, array, kind="parameter"):
    return Piece(name, array, (0,) * array.ndim, array.shape, kind)


def save_one(root, step=1, keep=0, **arrays):
    pieces = [whole(name, array) for name, array in arrays.items()]
    return save(root, step, single(), pieces, {"step": step, "model": {"kind": "gpt", "layers": 4}}, keep)


def replicated(comm, root, step=1, keep=0):
    arrays = {f"w{i}": np.full((30, 10 + i), i, np.float32) for i in range(8)}
    return save(root, step, comm, [whole(name, array) for name, array in arrays.items()], {"step": step}, keep)


def visible(root):
    return sorted(path.name for path in Path(root).iterdir())
