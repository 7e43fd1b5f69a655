"""Stochastic gradient descent with momentum.

    g <- gradient + decay p        m <- momentum m + g    p <- p - lr m      (Nesterov: p - lr (g + momentum m))

References: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; Sutskever et al., "On the
importance of initialization and momentum in deep learning", ICML 2013.
"""

from collections.abc import Sequence

from dtrain import kernels
from dtrain.config import SGDConfig
from dtrain.flat import FlatBuffers
from dtrain.optimizers.base import Optimizer, Part


class SGD(Optimizer):
    """State: m per element, none without momentum."""

    config: SGDConfig

    def __init__(self, config: SGDConfig, flat: FlatBuffers, ranges: Sequence[slice] | None = None) -> None:
        """As Optimizer."""
        super().__init__(config, flat, ranges)

    def prepare(self, part: Part) -> None:
        """Momentum costs an array only where it is used."""
        if self.config.momentum:
            part.state["m"] = part.zeros()

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """One kernel call per run."""
        momenta = part.state.get("m")
        for where, decayed in part.blocks():
            kernels.of(part.data).sgd(
                part.data[where],
                part.gradient(where),
                None if momenta is None else momenta[where],
                learning_rate,
                self.config.momentum,
                self.config.nesterov,
                self.decay(decayed),
                scale,
            )
