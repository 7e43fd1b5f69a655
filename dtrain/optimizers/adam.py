"""Adam and AdamW: the gradient's running mean over the root of its running mean square.

    m <- beta1 m + (1 - beta1) g         m^ = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g²        v^ = v / (1 - beta2^t)        p <- p - lr m^ / (sqrt(v^) + eps)

Adam adds decay p to the gradient; AdamW takes lr decay p from the parameter, beside the quotient ("decoupled").
References: Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101.
"""

from typing import ClassVar

from dtrain import kernels
from dtrain.config import AdamConfig, AdamWConfig
from dtrain.optimizers.base import Optimizer, Part


class Adam(Optimizer):
    """State: m and v per element."""

    config: AdamConfig | AdamWConfig
    names: ClassVar[tuple[str, ...]] = ("m", "v")
    decoupled: ClassVar[bool] = False

    def update(self, part: Part, learning_rate: float, scale: float) -> None:
        """One kernel call per run."""
        beta1, beta2 = self.config.betas
        for where, decayed in part.blocks():
            kernels.of(part.data).adam(
                part.data[where],
                part.gradient(where),
                part.state["m"][where],
                part.state["v"][where],
                learning_rate,
                beta1,
                beta2,
                self.config.epsilon,
                self.decay(decayed),
                self.decoupled,
                1 - beta1**self.steps,
                1 - beta2**self.steps,
                scale,
            )


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    decoupled: ClassVar[bool] = True
