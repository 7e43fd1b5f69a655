"""Tiny runs for tests of layouts: a configuration, a trainer on given ranks, and what came out."""

import threading
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dtrain.collectives import Communicator, single
from dtrain.config import Config
from dtrain.launch.assembly import assemble
from dtrain.trainer import StepRecord, Trainer

BASE: dict[str, Any] = {
    "name": "test",
    "seed": 3,
    "model": {"kind": "gpt", "layers": 2, "dim": 32, "heads": 4, "sequence": 16},
    "data": {"kind": "text", "path": "stdlib"},
    "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 5},
    "train": {
        "steps": 20,
        "global_batch": 24,
        "micro_batch": 3,
        "dtype": "float64",
        "validate": {"every": 10, "batches": 2},
    },
    "checkpoint": {"every": 0},
}

_lock = threading.Lock()  # ranks may be threads, and msgspec's first look at a type crashes when two take it at once


def config(**sections: Any) -> Config:
    """BASE with the keys of `sections` changed: config(train={"steps": 5})."""
    merged = {**BASE}
    for section, values in sections.items():
        replaces = isinstance(values, dict) and "kind" not in values
        merged[section] = {**BASE.get(section, {}), **values} if replaces else values
    with _lock:
        return msgspec.convert(merged, Config)


config()  # msgspec learns the structs with the first of them, and crashes where several threads do that at once


def trainer(comm: Communicator, **sections: Any) -> Trainer:
    """A trainer of `config(**sections)` on the ranks of `comm`."""
    return assemble(config(**sections), comm)


def losses(records: list[StepRecord]) -> Any:
    """Losses and gradient norms of all steps, (steps, 2)."""
    return np.array([[record.loss, record.grad_norm] for record in records])


def parameters(trainer: Trainer) -> dict[str, Any]:
    """Copies of the parameters."""
    return {name: parameter.data.copy() for name, parameter in trainer.model.named_parameters().items()}


class Alone(NamedTuple):
    """What one process made of a configuration."""

    losses: Any  # and gradient norms, (steps, 2)
    validation: list[float]
    parameters: dict[str, Any]


_alone: dict[bytes, Alone] = {}


def alone(comm: Communicator, **sections: Any) -> Alone:
    """The reference: `config(**sections)` trained to its end on one process. Collective.

    Rank 0 trains, once for all tests of this mpirun, and tells the others: on cores that all ranks share, the same run
    on each of them would take as many times as long.
    """
    asked = msgspec.json.encode(config(**sections))
    if asked not in _alone:
        told = None
        if comm.rank == 0:
            mine = trainer(single(), **sections)
            records = list(mine.run())
            validation = [record.validation_loss for record in records if record.validation_loss is not None]
            shapes = {name: (values.shape, str(values.dtype)) for name, values in parameters(mine).items()}
            told = (losses(records).tolist(), validation, shapes)  # Python writes all digits
        numbers, validation, shapes = comm.broadcast_object(told)
        own = parameters(mine) if comm.rank == 0 else {name: np.empty(*shapes[name]) for name in shapes}
        whole = {name: comm.broadcast(values) for name, values in own.items()}
        _alone[asked] = Alone(np.array(numbers), validation, whole)
    return _alone[asked]
