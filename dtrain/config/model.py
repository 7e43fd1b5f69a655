"""The keys of `model`: what is trained."""

from typing import Literal, TypeAlias

from msgspec import field

from dtrain.config.rules import Member, Section, at_least, divides, fraction, require


class TransformerConfig(Member, frozen=True, kw_only=True):
    """The keys that GPT and BERT share."""

    layers: int = 4
    dim: int = 256
    """Width of the residual stream."""
    heads: int = 8
    kv_heads: int | None = None
    """Key/value heads of grouped-query attention; null: as many as heads."""
    sequence: int = 128
    """Tokens per sequence, the longest context."""
    vocabulary: int | None = None
    """Size of the embedding; null: what the data's tokenizer needs. Larger is allowed (padding to a round number)."""
    hidden: int | None = None
    """Width of the MLP; null: 4 * dim."""
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    position: Literal["learned", "rotary"] = "learned"
    bias: bool = True
    """Biases in linear layers and layer norms."""
    tied: bool = True
    """The output head is the token embedding."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values, then those that must fit together."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        hidden, vocabulary = (1 if size is None else size for size in (self.hidden, self.vocabulary))
        at_least(1, "model", layers=self.layers, dim=self.dim, heads=self.heads, kv_heads=kv_heads)
        at_least(1, "model", sequence=self.sequence, vocabulary=vocabulary, hidden=hidden)
        fraction("model", dropout=self.dropout)
        divides("model", "heads", self.heads, "dim", self.dim)
        divides("model", "kv_heads", kv_heads, "heads", self.heads)
        if self.position == "rotary" and self.dim // self.heads % 2:
            raise ValueError(
                f"model.position: rotary; needs an even head size, and dim / heads is {self.dim // self.heads}"
            )


class GPTConfig(TransformerConfig, frozen=True, kw_only=True, tag="gpt"):
    """A decoder that predicts the next token. The defaults are GPT-2's style; Llama's: configs/gpt_llama.yaml."""


class MoEConfig(Section, frozen=True, kw_only=True):
    """Mixtures of experts in the place of MLPs."""

    experts: int = 8
    every: int = 1
    """Every so many blocks one has experts: 2 is every other."""
    router: Literal["top", "expert_choice"] = "top"
    """top: every token takes its best experts; expert_choice: every expert takes its best tokens of a sequence, also by
    what comes later in it."""
    top: int = 2
    """Experts per token; 1 is Switch, 2 GShard. From 2 on the gates of a token add up to 1; a single one is the
    probability itself, near 1 / experts at first, which makes a short training worse. expert_choice: on average."""
    capacity: float | None = 1.25
    """Rows that an expert takes of a sequence, relative to its even share; what is above is dropped and goes on through
    the residual alone. null: no limit (dropless)."""
    hidden: int | None = None
    """Width of an expert; null: that of the dense MLP divided by top + shared, so that a token costs as much."""
    shared: int = 0
    """Experts that every token goes through, beside those that are chosen."""
    balance: float = 0.01
    """Weight (alpha) of the loss that evens the loads of a sequence."""
    z_loss: float = 0.0
    """Weight of the loss that keeps the router's logits small; ST-MoE has 0.001."""
    bias_rate: float = 0.0
    """Step of the biases that even the loads of batches without a loss; DeepSeek-V3 has 0.001, and balance 0.0001."""
    noise: float = 0.0
    """Standard deviation of what is added to the router's logits in training."""

    def __post_init__(self) -> None:
        """Check the values."""
        hidden = 1 if self.hidden is None else self.hidden
        at_least(1, "model.moe", experts=self.experts, every=self.every, top=self.top, hidden=hidden)
        at_least(0, "model.moe", shared=self.shared, balance=self.balance, z_loss=self.z_loss)
        at_least(0, "model.moe", bias_rate=self.bias_rate, noise=self.noise)
        require(
            self.top <= self.experts, f"model.moe.top: {self.top}; must be at most model.moe.experts: {self.experts}"
        )
        require(
            self.capacity is None or self.capacity > 0,
            f"model.moe.capacity: {self.capacity}; must be above 0, or null for no limit",
        )
        require(
            self.router == "top" or self.capacity is not None,
            "model.moe.capacity: null; router: expert_choice needs one, such as 1.0",
        )


class MoEGPTConfig(GPTConfig, frozen=True, kw_only=True, tag="moe_gpt"):
    """A GPT with mixtures of experts."""

    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.moe.every <= self.layers,
            f"model.moe.every: {self.moe.every}; must be at most model.layers: {self.layers}",
        )
        require(
            self.expert_hidden >= 1, f"model.moe.top: {self.moe.top}; leaves experts no width: set model.moe.hidden"
        )

    @property
    def expert_hidden(self) -> int:
        """Width of an expert."""
        dense = 4 * self.dim if self.hidden is None else self.hidden
        return dense // (self.moe.top + self.moe.shared) if self.moe.hidden is None else self.moe.hidden


class BERTConfig(TransformerConfig, frozen=True, kw_only=True, tag="bert"):
    """An encoder that fills in masked tokens."""

    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    mask_fraction: float = 0.15
    """Share of the tokens to predict; of them 80 % are masked, 10 % replaced by a random token, 10 % left."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(0 < self.mask_fraction < 1, f"model.mask_fraction: {self.mask_fraction}; must be between 0 and 1")


class MLPConfig(Member, frozen=True, kw_only=True, tag="mlp"):
    """A classifier of images or of rows of a table; the sizes at both ends are the data's."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers."""
    classes: int | None = None
    """Outputs of the head; null: those of the data. More are allowed."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(1, "model", classes=1 if self.classes is None else self.classes)
        require(
            all(width >= 1 for width in self.hidden),
            f"model.hidden: {list(self.hidden)}; every width must be 1 or more",
        )
        fraction("model", dropout=self.dropout)


class DLRMConfig(Member, frozen=True, kw_only=True, tag="dlrm"):
    """A recommender: numbers and categories of a table, yes or no (Naumov et al. 2019)."""

    dim: int = 16
    """Width of the rows of all tables, and of what the bottom MLP makes of the numbers."""
    bottom: tuple[int, ...] = (64,)
    """Widths of the hidden layers before the pairs."""
    top: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers after the pairs."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(1, "model", dim=self.dim)
        for name in ("bottom", "top"):
            widths = getattr(self, name)
            require(all(width >= 1 for width in widths), f"model.{name}: {list(widths)}; every width must be 1 or more")
        fraction("model", dropout=self.dropout)


ModelConfig: TypeAlias = GPTConfig | MoEGPTConfig | BERTConfig | MLPConfig | DLRMConfig
