"""Any layout from Python: the trainer that `dtrain run` uses, its parts in your hands.

    mpirun -n 8 python examples/train_in_python.py dp=2 tp=2 pp=2 data_parallel=zero3      the same losses as
    python examples/train_in_python.py                                                     on one process

A configuration is made of the structs of `dtrain.config`; `assemble` makes mesh, data, model and strategies of it; a
step is `trainer.train_step()`. What the command line adds (log, checkpoints, summary) is `dtrain.launch.run.run`.
"""

import argparse
import sys

from dtrain.collectives import Communicator, world
from dtrain.config import AdamWConfig, CheckpointConfig, Config, GPTConfig, ParallelConfig, TextConfig, TrainConfig
from dtrain.launch.assembly import assemble
from dtrain.launch.failures import guard
from dtrain.whole import whole_parameters


def configure(**parallel: int | str | bool) -> Config:
    """A small GPT on a file of Python's own library, in float64 so that layouts can be compared to the last digits."""
    return Config(
        name="from-python",
        model=GPTConfig(layers=4, dim=32, heads=4, sequence=16),
        data=TextConfig(path=argparse.__file__),
        optimizer=AdamWConfig(learning_rate=1e-2, clip_norm=1.0),
        train=TrainConfig(steps=10, global_batch=16, micro_batch=2, dtype="float64"),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every=0),
    )


def main(comm: Communicator, words: list[str]) -> list[float]:
    """Train in the layout of the words, such as tp=2; the loss of each step, the same on every rank."""
    pairs = (word.partition("=") for word in words)
    parallel = {key: int(value) if value.lstrip("-").isdigit() else value for key, _, value in pairs}
    trainer = assemble(configure(**parallel), comm)
    say = print if comm.rank == 0 else lambda line: None
    for line in [*trainer.mesh.table(), *(note for strategy in trainer.strategies for note in strategy.notes())]:
        say(line)

    losses = []
    while trainer.step < trainer.total_steps:
        record = trainer.train_step()
        losses.append(record.loss)
        if record.step in (1, 5, 10):
            say(f"step {record.step:2}  loss {record.loss:.10f}  grad_norm {record.grad_norm:.10f}")

    parameters = whole_parameters(trainer.flat, comm)  # on rank 0, however they were cut
    if parameters:
        say(f"{len(parameters)} parameters; embedding {parameters['embedding.weight'].shape}")
    return losses


if __name__ == "__main__":
    with guard():
        main(world(), sys.argv[1:])
