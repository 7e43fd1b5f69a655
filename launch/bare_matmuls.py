"""The matrix products that a training step cannot do without, and nothing else: the ruler for the rest of the step.

    linear layer    y = x Wᵀ        dx = g W        dW = gᵀ x                       x (N, I), W (O, I), N tokens
    attention       S = Q Kᵀ        O = P V         dV = Pᵀ g   dP = g Vᵀ   dQ = dS K   dK = dSᵀ Q      per head, (T, d)

Causal attention is counted in full, though a kernel may leave out the upper half; everything lies in memory as a
product likes it best (contiguous operands, written to buffers that exist). What a step takes beyond this is norms,
activations, softmax, the optimizer, communication, and the cost of Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dtrain.arrays import Array
from dtrain.config import Config, TransformerConfig
from dtrain.modules import Linear, Module


@dataclass(frozen=True)
class Product:
    """out (batch, rows, columns) = a (batch, rows, inner) @ b (batch, inner, columns); a, b: maybe transposed views."""

    batch: int
    rows: int
    inner: int
    columns: int
    a_transposed: bool = False
    b_transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


def linear(tokens: int, inputs: int, outputs: int) -> list[Product]:
    """Forward, input gradient, weight gradient of a linear layer."""
    return [
        Product(1, tokens, inputs, outputs, b_transposed=True),
        Product(1, tokens, outputs, inputs),
        Product(1, outputs, tokens, inputs, a_transposed=True),
    ]


def attention(batch: int, sequence: int, size: int) -> list[Product]:
    """Two forward products and four backward ones, for `batch` heads of all sequences together."""
    return [
        Product(batch, sequence, size, sequence, b_transposed=True),  # S = Q Kᵀ
        Product(batch, sequence, sequence, size),  # O = P V
        Product(batch, sequence, sequence, size, a_transposed=True),  # dV = Pᵀ g
        Product(batch, sequence, size, sequence, b_transposed=True),  # dP = g Vᵀ
        Product(batch, sequence, sequence, size),  # dQ = dS K
        Product(batch, sequence, sequence, size, a_transposed=True),  # dK = dSᵀ Q
    ]


def of_step(model: Module, config: Config, data_ranks: int) -> Counter[Product]:
    """All products of one rank's step, with how often each is made."""
    samples = config.train.micro_batch
    portions = config.train.global_batch // data_ranks // samples
    sequence = getattr(config.model, "sequence", 1)
    products: list[Product] = []
    for module in model.named_modules().values():
        if isinstance(module, Linear):
            outputs, inputs = module.weight.shape
            products += linear(samples * sequence, inputs, outputs)
    if isinstance(config.model, TransformerConfig):
        heads, size = config.model.heads, config.model.dim // config.model.heads
        products += config.model.layers * attention(samples * heads, sequence, size)
    return Counter({product: portions * count for product, count in Counter(products).items()})


def runner(products: Counter[Product], dtype: str) -> Callable[[], None]:
    """Return a function that makes all the products once, on buffers that are made (and touched) here."""
    rng = np.random.default_rng(0)

    def filled(shape: tuple[int, ...], transposed: bool) -> Array:
        shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        array: Array = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        return array.swapaxes(-1, -2) if transposed else array

    def ready() -> Iterator[tuple[int, Array, Array, Array]]:
        for p, count in products.items():
            batch = (p.batch,) if p.batch > 1 else ()
            a = filled((*batch, p.rows, p.inner), p.a_transposed)
            b = filled((*batch, p.inner, p.columns), p.b_transposed)
            yield count, a, b, np.zeros((*batch, p.rows, p.columns), dtype)

    work = list(ready())

    def run() -> None:
        for count, a, b, out in work:
            for _ in range(count):
                np.matmul(a, b, out=out)

    return run
