"""A strategy of your own: one class, one row in a table.

    mpirun -n 4 python examples/my_strategy.py           fewer collectives, another curve
    python examples/my_strategy.py                       on one process both are the same

Local SGD (Stich, arXiv:1805.09767): every rank takes steps of its own on its share of the data; every `period` steps
all replace their parameters by the mean. Communication falls to 1/period; the price is that ranks drift apart between.

    step        1   2   3   4   5   6   7   8
    ddp         Σ   Σ   Σ   Σ   Σ   Σ   Σ   Σ        all_reduce of the gradients
    local SGD               Σ               Σ        mean of the parameters
"""

import argparse

from dtrain import models
from dtrain.collectives import Communicator, world
from dtrain.config import Config, GPTConfig, SGDConfig, TextConfig, TrainConfig, ValidateConfig
from dtrain.data import open_data
from dtrain.flat import FlatBuffers
from dtrain.launch.configuration import for_ranks
from dtrain.launch.failures import guard
from dtrain.mesh import Mesh
from dtrain.modules import Module
from dtrain.strategies import DistributedDataParallel
from dtrain.strategy import Strategy
from dtrain.trainer import Trainer


class LocalSGD(Strategy):
    """Means of the parameters over the `dp` axis, every `period` steps."""

    axis = "dp"

    def __init__(self, period: int) -> None:
        self.period, self.steps = period, 0

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """The parameters into flat buffers: a mean over ranks is then one collective per buffer."""
        self.comm = mesh["dp"]
        self.flat = FlatBuffers(model.named_parameters(), self.comm, mesh=mesh)
        return model

    def reduce_gradients(self, model: Module) -> None:
        """Nothing is summed, but a rank's gradient stands for the whole batch: as many times as large."""
        assert self.flat is not None
        self.flat.fill_missing()
        for group in self.flat.groups:
            group.grad *= self.comm.size

    def after_update(self, model: Module) -> None:
        """Now and then the mean."""
        assert self.flat is not None
        self.steps += 1
        if self.steps % self.period == 0:
            for group in self.flat.groups:
                self.comm.all_reduce(group.data, out=group.data)
                group.data /= self.comm.size

    def notes(self) -> list[str]:
        """For the log."""
        return [f"local SGD: parameters are averaged every {self.period} steps"]


def train(comm: Communicator, strategy: Strategy) -> list[float]:
    """The losses of 24 steps with this strategy on the data axis. A table of strategies has a row for it instead."""
    config = Config(
        name="my-strategy",
        model=GPTConfig(layers=2, dim=32, heads=4, sequence=16),
        data=TextConfig(path=argparse.__file__),
        optimizer=SGDConfig(learning_rate=0.2, momentum=0.0),
        train=TrainConfig(
            steps=24, global_batch=24, micro_batch=24 // comm.size, dtype="float64", validate=ValidateConfig(every=0)
        ),
    )
    config = for_ranks(config, comm.size)
    data = open_data(config.data, sequence=16)
    model = models.outline(config.model, data, dtype=config.train.dtype)
    trainer = Trainer(config, Mesh(comm, dp=-1), data, model, [strategy])
    return [record.loss for record in trainer.run()]


def main(comm: Communicator) -> None:
    """Beside the framework's own."""
    for name, strategy in (("ddp", DistributedDataParallel()), ("local SGD", LocalSGD(period=4))):
        before = comm.counters.calls("all_reduce", purpose="")
        losses = train(comm, strategy)
        calls = comm.counters.calls("all_reduce", purpose="") - before
        if comm.rank == 0:
            shown = "  ".join(f"{losses[step - 1]:.6f}" for step in (1, 8, 16, 24))
            print(f"{name:<10} loss of steps 1, 8, 16, 24: {shown}   all_reduces: {calls}")


if __name__ == "__main__":
    with guard():
        main(world())
