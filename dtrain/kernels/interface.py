"""The table of kernels: every backend offers exactly these names with these parameters.

Conventions: arrays are C-contiguous unless said otherwise. "Rows" kernels take x of shape (..., C) and treat all
leading dims as rows. g is the gradient of the output. A `*_vjp` returns gradients in the order written; a bias or
weight given as None gives None. Results are new arrays; only arguments named in UPDATES are written.
"""

from typing import Any, Protocol

from dtrain.arrays import Array

Maybe = Array | None


class Kernels(Protocol):
    """One row per kernel. The signatures here are the contract that the tests compare all backends with."""

    # normalisation, over the last dim; mean and rstd have the shape of the rows
    def layer_norm(self, x: Array, weight: Maybe, bias: Maybe, eps: float) -> tuple[Array, Array, Array]: ...
    def layer_norm_vjp(
        self, g: Array, x: Array, weight: Maybe, mean: Array, rstd: Array
    ) -> tuple[Array, Maybe, Array]: ...
    def rms_norm(self, x: Array, weight: Maybe, eps: float) -> tuple[Array, Array]: ...
    def rms_norm_vjp(self, g: Array, x: Array, weight: Maybe, rstd: Array) -> tuple[Array, Maybe]: ...

    # elementwise with a bias of shape (C,)
    def column_sum(self, g: Array) -> Array: ...
    def bias_residual(self, x: Array, bias: Maybe, residual: Array) -> Array: ...
    def gelu(self, x: Array, bias: Maybe, approximate: bool) -> Array: ...
    def gelu_vjp(self, g: Array, x: Array, bias: Maybe, approximate: bool) -> tuple[Array, Maybe]: ...
    def silu(self, x: Array) -> Array: ...
    def silu_vjp(self, g: Array, x: Array) -> Array: ...
    def swiglu(self, gate: Array, up: Array) -> Array: ...
    def swiglu_vjp(self, g: Array, gate: Array, up: Array) -> tuple[Array, Array]: ...

    # softmax family, over the last dim; targets are integers, rows whose target is `ignore` have loss 0
    def softmax(self, x: Array) -> Array: ...
    def softmax_vjp(self, g: Array, y: Array) -> Array: ...
    def log_softmax(self, x: Array) -> Array: ...
    def log_softmax_vjp(self, g: Array, y: Array) -> Array: ...
    def cross_entropy(self, logits: Array, targets: Array, ignore: int) -> tuple[Array, Array]: ...
    def cross_entropy_vjp(self, g: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int) -> Array: ...

    # attention: q (B,T,H,D), k and v (B,S,G,D) with G dividing H, strided views allowed (last dim contiguous)
    def rotary(self, x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array: ...
    def attention(self, q: Array, k: Array, v: Array, causal: bool, scale: float) -> tuple[Array, Array]: ...
    def attention_vjp(
        self,
        g: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        logsumexp: Array,
        causal: bool,
        scale: float,
        dq: Maybe = None,
        dk: Maybe = None,
        dv: Maybe = None,
    ) -> tuple[Array, Array, Array]: ...

    # dropout and embedding
    def dropout(self, x: Array, p: float, key: int, row_ids: Array) -> Array: ...
    def embedding(self, weight: Array, ids: Array) -> Array: ...
    def embedding_vjp(self, g: Array, ids: Array, num_rows: int, out: Maybe = None) -> Array: ...

    # optimizers: flat arrays, updated in place; `scale` multiplies the gradient first
    def sum_squares(self, x: Array) -> float: ...
    def sgd(
        self,
        p: Array,
        g: Array,
        m: Maybe,
        lr: float,
        momentum: float,
        nesterov: bool,
        decay: float,
        scale: float,
    ) -> None: ...
    def adam(
        self,
        p: Array,
        g: Array,
        m: Array,
        v: Array,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        decoupled: bool,
        correction1: float,
        correction2: float,
        scale: float,
    ) -> None: ...
    def adam_direction(
        self,
        g: Array,
        m: Array,
        v: Array,
        p: Array,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        correction1: float,
        correction2: float,
        scale: float,
        out: Array,
    ) -> Array: ...
    def axpy(self, p: Array, u: Array, a: float) -> None: ...


NAMES: tuple[str, ...] = tuple(name for name in vars(Kernels) if not name.startswith("_"))

# Arguments that a kernel writes in place (where given); all other arguments are only read.
UPDATES: dict[str, tuple[str, ...]] = {
    "attention_vjp": ("dq", "dk", "dv"),
    "embedding_vjp": ("out",),
    "sgd": ("p", "m"),
    "adam": ("p", "m", "v"),
    "adam_direction": ("m", "v", "out"),
    "axpy": ("p",),
}

# Positions of results that are statistics or losses: they stay in float32 when the arrays are half precision.
STATISTICS: dict[str, tuple[int, ...]] = {
    "layer_norm": (1, 2),
    "rms_norm": (1,),
    "cross_entropy": (0, 1),
    "attention": (1,),
}


def check_row(rows: Any, what: str, size: int) -> None:
    """Raise IndexError where an integer array leaves [0, size): the compiled kernels do not wrap negative indices."""
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= size):
        raise IndexError(f"{what} reach from {int(rows.min())} to {int(rows.max())}, outside [0, {size})")
