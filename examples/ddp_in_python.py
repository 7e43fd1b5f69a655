"""Data parallelism from Python, without the command line:

    mpirun -n 4 python examples/ddp_in_python.py         the same losses as
    python examples/ddp_in_python.py                     on one rank

A network learns the two halves of a spiral. Every rank computes on its share of the batch; the strategy sums the
gradients while the backward goes on. Exceptions end the whole job, see `dtrain.launch.failures.guard`.
"""

import numpy as np

import dtrain.functional as F
from dtrain import optimizers
from dtrain.collectives import world
from dtrain.config import AdamWConfig
from dtrain.launch.failures import guard
from dtrain.mesh import Mesh
from dtrain.modules import Linear, Module
from dtrain.strategies import DistributedDataParallel
from dtrain.tensor import Tensor


class Classifier(Module):
    """Two inputs, two classes."""

    def __init__(self, width: int = 64) -> None:
        self.first = Linear(2, width, std=0.7)
        self.second = Linear(width, width, std=0.2)
        self.last = Linear(width, 2, std=0.1)
        self.assign_names()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2) -> logits (B, 2)."""
        return self.last(F.gelu(self.second(F.gelu(self.first(x)))))


def spiral(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (samples, 2) on two arms, and which arm."""
    random = np.random.default_rng(0)
    arm = np.arange(samples) % 2
    angle = random.uniform(0.5, 2.5 * np.pi, samples)
    points = np.stack([np.cos(angle + np.pi * arm), np.sin(angle + np.pi * arm)], axis=1) * angle[:, None] / 5
    return points.astype(np.float32), arm


def main(steps: int = 200, batch: int = 240) -> list[float]:
    """Train; the loss of each step."""
    comm = world()
    mesh = Mesh(comm, dp=-1)
    strategy = DistributedDataParallel()
    model = strategy.apply(Classifier(), mesh)
    assert strategy.flat is not None
    strategy.flat.initialise(seed=0, comm=comm)
    optimizer = optimizers.build(AdamWConfig(learning_rate=3e-3), strategy.flat)

    x, y = spiral(batch)
    mine = slice(comm.rank * batch // comm.size, (comm.rank + 1) * batch // comm.size)
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(model(Tensor(x[mine])), y[mine], reduction="sum")
        loss.backward(1 / batch)  # divided once, by the size of the whole batch: afterwards everything is a sum
        strategy.reduce_gradients(model)
        optimizer.step(learning_rate=3e-3)
        strategy.flat.zero_grad()
        losses.append(float(comm.all_reduce(np.array([loss.item()]))[0]) / batch)
        if comm.rank == 0 and step % 40 == 39:
            print(f"step {step + 1:3}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    with guard():
        main()
