"""The configuration of a run as frozen, typed structs: every key of a YAML file, its default, what it may be.

A family (models, data, optimizers, schedules) has one struct per member; the key `kind` chooses it, so that a key which
a member does not have is an error and not ignored. `Config` has one field per section. Values are checked when a struct
is made, whether from YAML (`dtrain.launch.configuration`) or in Python; a ValueError names the key by its whole path.
`check` adds what only the number of ranks decides. This file is a leaf: it imports nothing of ours and builds nothing.
"""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct, field
from msgspec.structs import fields, replace

DType: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]

ORDER = "tp-cp-ep-dp-pp"  # of the axes of the mesh, fastest first

# The axes that a strategy of this version uses; all others have size 1.
PARALLEL_AXES = ("dp", "pp", "tp", "cp", "ep")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _at_least(minimum: int, section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value >= minimum, f"{section}.{name}: {value}; must be {minimum} or more")


def _fraction(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{section}.{name}: {value}; must be in [0, 1)")


def _divides(section: str, name: str, value: int, of: str, total: int) -> None:
    legal = _nearest(value, _divisors(total))
    _require(total % value == 0, f"{section}.{name}: {value}; must divide {section}.{of}: {total}, nearest: {legal}")


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration without members: parallel, train, log."""


class _Member(_Section, frozen=True, kw_only=True, tag_field="kind"):
    """One member of a family."""

    @property
    def kind(self) -> str:
        """The value of the key `kind` that chose this struct."""
        return str(self.__struct_config__.tag)


# --- model: what is trained -------------------------------------------------------------------------------------------


class TransformerConfig(_Member, frozen=True, kw_only=True):
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
        _at_least(1, "model", layers=self.layers, dim=self.dim, heads=self.heads, kv_heads=kv_heads)
        _at_least(1, "model", sequence=self.sequence, vocabulary=vocabulary, hidden=hidden)
        _fraction("model", dropout=self.dropout)
        _divides("model", "heads", self.heads, "dim", self.dim)
        _divides("model", "kv_heads", kv_heads, "heads", self.heads)
        if self.position == "rotary" and self.dim // self.heads % 2:
            raise ValueError(
                f"model.position: rotary; needs an even head size, and dim / heads is {self.dim // self.heads}"
            )


class GPTConfig(TransformerConfig, frozen=True, kw_only=True, tag="gpt"):
    """A decoder that predicts the next token. The defaults are GPT-2's style; Llama's: configs/gpt_llama.yaml."""


class MoEConfig(_Section, frozen=True, kw_only=True):
    """Mixtures of experts in the place of MLPs."""

    experts: int = 8
    every: int = 1
    """Every so many blocks one has experts: 2 is every other."""
    router: Literal["top", "expert_choice"] = "top"
    """top: every token takes its best experts; expert_choice: every expert takes its best tokens of a sequence, also by
    what comes later in it."""
    top: int = 1
    """Experts per token; 1 is Switch, 2 GShard. expert_choice: on average."""
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
        _at_least(1, "model.moe", experts=self.experts, every=self.every, top=self.top, hidden=hidden)
        _at_least(0, "model.moe", shared=self.shared, balance=self.balance, z_loss=self.z_loss)
        _at_least(0, "model.moe", bias_rate=self.bias_rate, noise=self.noise)
        _require(
            self.top <= self.experts, f"model.moe.top: {self.top}; must be at most model.moe.experts: {self.experts}"
        )
        _require(
            self.capacity is None or self.capacity > 0,
            f"model.moe.capacity: {self.capacity}; must be above 0, or null for no limit",
        )
        _require(
            self.router == "top" or self.capacity is not None,
            "model.moe.capacity: null; router: expert_choice needs one, such as 1.0",
        )


class MoEGPTConfig(GPTConfig, frozen=True, kw_only=True, tag="moe_gpt"):
    """A GPT with mixtures of experts."""

    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        _require(
            self.moe.every <= self.layers,
            f"model.moe.every: {self.moe.every}; must be at most model.layers: {self.layers}",
        )
        _require(
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
        _require(0 < self.mask_fraction < 1, f"model.mask_fraction: {self.mask_fraction}; must be between 0 and 1")


class MLPConfig(_Member, frozen=True, kw_only=True, tag="mlp"):
    """A classifier of images or of rows of a table; the sizes at both ends are the data's."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        _require(
            all(width >= 1 for width in self.hidden),
            f"model.hidden: {list(self.hidden)}; every width must be 1 or more",
        )
        _fraction("model", dropout=self.dropout)


class DLRMConfig(_Member, frozen=True, kw_only=True, tag="dlrm"):
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
        _at_least(1, "model", dim=self.dim)
        for name in ("bottom", "top"):
            widths = getattr(self, name)
            _require(
                all(width >= 1 for width in widths), f"model.{name}: {list(widths)}; every width must be 1 or more"
            )
        _fraction("model", dropout=self.dropout)


ModelConfig: TypeAlias = GPTConfig | MoEGPTConfig | BERTConfig | MLPConfig | DLRMConfig


# --- data: what it learns from ----------------------------------------------------------------------------------------


class _Source(_Member, frozen=True, kw_only=True):
    path: str
    """A file, a folder, a glob (`texts/**/*.txt`), or a name that the kind knows."""
    validation: float = 0.05
    """Share that is kept for validation."""

    def __post_init__(self) -> None:
        """Check the values."""
        _require(self.path != "", f"data.path: {self.path}; must name a file, a folder or a glob")
        _fraction("data", validation=self.validation)


class TextConfig(_Source, frozen=True, kw_only=True, tag="text"):
    """Text; `path: stdlib` is the source text of Python's own standard library."""

    tokenizer: Literal["byte", "bpe"] = "byte"
    vocabulary: int | None = None
    """Tokens that byte-pair encoding learns; null: 256 for bytes, 4096 for bpe."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.vocabulary is not None and self.tokenizer == "byte":
            _require(
                self.vocabulary == 256, f"data.vocabulary: {self.vocabulary}; bytes have 256: leave it out, or null"
            )
        elif self.vocabulary is not None:
            _require(
                self.vocabulary >= 257, f"data.vocabulary: {self.vocabulary}; must be 257 or more: bytes and merges"
            )


class TokensConfig(_Source, frozen=True, kw_only=True, tag="tokens"):
    """Tokens that were prepared elsewhere: `.bin` (raw, memory-mapped) or `.npy`."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    """Of a `.bin` file."""
    vocabulary: int | None = None
    """Number of different tokens; null: the largest token + 1."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        _at_least(1, "data", vocabulary=1 if self.vocabulary is None else self.vocabulary)


class ImagesConfig(_Source, frozen=True, kw_only=True, tag="images"):
    """Images with labels: IDX or NPZ files; `path: digits` are scikit-learn's 1797 handwritten digits."""

    labels: str | None = None
    """The file of the labels of an IDX file; null: found by the name beside it."""


class TableConfig(_Source, frozen=True, kw_only=True, tag="table"):
    """Rows of numbers, words and a class: CSV or NPZ; `path: fair` is a survey of 6366 people inside statsmodels."""

    target: str | None = None
    """The column to predict; null: the last."""
    categories: tuple[str, ...] = ()
    """Columns of words (or numbers that only name something), each with an embedding table: for dlrm, of a CSV."""
    hash_rows: int | None = None
    """Rows of each embedding table, chosen by a hash of the word; null: a row for every different word."""
    separator: str = "|"
    """Between the words of a cell that has several."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        twice = sorted({name for name in self.categories if self.categories.count(name) > 1})
        _require(not twice, f"data.categories: {', '.join(twice)}; named twice")
        _require(
            self.target is None or self.target not in self.categories,
            f"data.categories: {self.target}; is the target",
        )
        _at_least(1, "data", hash_rows=1 if self.hash_rows is None else self.hash_rows)
        _require(self.separator != "", "data.separator: must be a character or more")


DataConfig: TypeAlias = TextConfig | TokensConfig | ImagesConfig | TableConfig


# --- optimizer and schedule: how it learns ----------------------------------------------------------------------------


class _Optimizer(_Member, frozen=True, kw_only=True):
    learning_rate: float
    """The peak; the schedule scales it."""
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm; null: never."""

    def __post_init__(self) -> None:
        """Check the values of every optimizer, by name as far as it has them."""
        _require(self.learning_rate >= 0, f"optimizer.learning_rate: {self.learning_rate}; must be 0 or more")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay: {self.weight_decay}; must be 0 or more")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm: {self.clip_norm}; must be above 0, or null",
        )
        _fraction("optimizer", momentum=getattr(self, "momentum", 0.0), decay=getattr(self, "decay", 0.0))
        for beta in getattr(self, "betas", ()):
            _require(0 <= beta < 1, f"optimizer.betas: {list(self.betas)}; both must be in [0, 1)")  # type: ignore[attr-defined]


class SGDConfig(_Optimizer, frozen=True, kw_only=True, tag="sgd"):
    """m <- momentum m + g; p <- p - lr m."""

    momentum: float = 0.9
    nesterov: bool = False


class AdamConfig(_Optimizer, frozen=True, kw_only=True, tag="adam"):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


class AdamWConfig(_Optimizer, frozen=True, kw_only=True, tag="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01


class LAMBConfig(_Optimizer, frozen=True, kw_only=True, tag="lamb"):
    """Adam's direction, per parameter scaled to the parameter's norm (You et al. 2020): for large batches."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-6
    weight_decay: float = 0.01


class AdafactorConfig(_Optimizer, frozen=True, kw_only=True, tag="adafactor"):
    """Second moments kept as row and column sums (Shazeer and Stern 2018): O(rows + columns) memory."""

    decay: float = 0.8
    """beta2 at step t is 1 - t^-decay."""
    epsilon: tuple[float, float] = (1e-30, 1e-3)
    """Added to squared gradients; least scale of a parameter."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update."""


OptimizerConfig: TypeAlias = SGDConfig | AdamConfig | AdamWConfig | LAMBConfig | AdafactorConfig


class _Schedule(_Member, frozen=True, kw_only=True):
    warmup_steps: int = 0
    """Steps of linear growth from 0 to the peak."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(0, "schedule", warmup_steps=self.warmup_steps)
        final = getattr(self, "final_fraction", 0.0)
        _require(0 <= final <= 1, f"schedule.final_fraction: {final}; must be in [0, 1]")


class ConstantConfig(_Schedule, frozen=True, kw_only=True, tag="constant"):
    """The peak, after the warm-up."""


class LinearConfig(_Schedule, frozen=True, kw_only=True, tag="linear"):
    """Straight down to the last step."""

    final_fraction: float = 0.0
    """Last learning rate / peak."""


class CosineConfig(_Schedule, frozen=True, kw_only=True, tag="cosine"):
    """Half a cosine down to the last step."""

    final_fraction: float = 0.1
    """Last learning rate / peak."""


class InverseSqrtConfig(_Schedule, frozen=True, kw_only=True, tag="inverse_sqrt"):
    """peak * sqrt(warmup_steps / step), as in the Transformer paper."""


ScheduleConfig: TypeAlias = ConstantConfig | LinearConfig | CosineConfig | InverseSqrtConfig


# --- compression of gradients -----------------------------------------------------------------------------------------


class NoCompressionConfig(_Member, frozen=True, kw_only=True, tag="none"):
    """Gradients travel as they are."""


class _Compression(_Member, frozen=True, kw_only=True):
    everywhere: bool = False
    """false: compressed is what goes between nodes, after an exact sum inside each node. true: between all ranks of the
    data axis, as if each were a node: to try it on one machine."""


class Float16Config(_Compression, frozen=True, kw_only=True, tag="float16"):
    """Rounded to float16, after scaling by a power of two; summed in float32."""


class BFloat16Config(_Compression, frozen=True, kw_only=True, tag="bfloat16"):
    """Rounded to bfloat16; summed in float32."""


class Int8Config(_Compression, frozen=True, kw_only=True, tag="int8"):
    """A signed byte per element and a float32 scale per block (Alistarh et al. 2017)."""

    block: int = 256
    """Elements that share a scale."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """stochastic: up or down by chance, right on average; nearest: the smaller error, but always to the same side."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(1, "parallel.compression", block=self.block)


class TopKConfig(_Compression, frozen=True, kw_only=True, tag="top_k"):
    """Only the largest elements; what is left is added to the next step's gradient (Lin et al. 2018)."""

    fraction: float = 0.01
    """Share of the elements that is sent; an element costs twice its size, as its place is sent too."""

    def __post_init__(self) -> None:
        """Check the values."""
        _require(0 < self.fraction <= 1, f"parallel.compression.fraction: {self.fraction}; must be above 0, at most 1")


class PowerSGDConfig(_Compression, frozen=True, kw_only=True, tag="power_sgd"):
    """Matrices as products of two thin ones; the rest is added to the next step's gradient (Vogels et al. 2019)."""

    rank: int = 4
    """Columns of the thin matrices."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(1, "parallel.compression", rank=self.rank)


CompressionConfig: TypeAlias = (
    NoCompressionConfig | Float16Config | BFloat16Config | Int8Config | TopKConfig | PowerSGDConfig
)


# --- the run ----------------------------------------------------------------------------------------------------------


class ValidateConfig(_Section, frozen=True, kw_only=True):
    """Loss on the part of the data that is not trained on."""

    every: int = 50
    """Steps; 0: never."""
    batches: int = 8
    """Global batches per validation."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(0, "train.validate", every=self.every)
        _at_least(1, "train.validate", batches=self.batches)


class TrainConfig(_Section, frozen=True, kw_only=True):
    """How much, in which portions, in which precision."""

    steps: int
    global_batch: int
    """Sequences (images, rows) per step, on all ranks together."""
    micro_batch: int
    """Of them at a time on one data rank; the rest by gradient accumulation."""
    dtype: DType = "float32"
    """Of parameters and activations; reductions in float32 at least."""
    loss_scale: float | Literal["dynamic"] | None = None
    """Factor on the loss that keeps small gradients of float16 from vanishing; null: 1024 for float16, else 1. dynamic:
    begins at 2^24; a step that overflows is skipped and halves it, 2000 good ones double it."""
    recompute: bool = False
    """Keep only the inputs of each layer for the backward, compute the rest again."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(1, "train", steps=self.steps, global_batch=self.global_batch, micro_batch=self.micro_batch)
        if self.loss_scale == "dynamic":
            _require(
                self.dtype == "float16",
                f"train.loss_scale: dynamic; of use with train.dtype: float16 only, not {self.dtype}, whose range is "
                "wide enough. Allowed: a number, or null",
            )
        elif self.loss_scale is not None:
            _require(self.loss_scale > 0, f"train.loss_scale: {self.loss_scale}; must be above 0, dynamic, or null")


class ParallelConfig(_Section, frozen=True, kw_only=True):
    """The mesh: ranks along each axis, and the strategy of the data axis."""

    auto: bool = False
    """Choose degrees, data_parallel, sequence, schedule, micro_batch and recompute by a cost model: see `dtrain plan`.
    `parallel: auto` is short for it."""
    memory_gb: float | None = None
    """auto: what a rank may use, in GiB; null: only time counts."""
    dp: int = -1
    """Data; -1: what the other axes leave."""
    tp: int = 1
    """Tensor."""
    pp: int = 1
    """Pipeline."""
    cp: int = 1
    """Context."""
    ep: int = 1
    """Experts."""
    order: str = ORDER
    """The axes, fastest first: ranks that follow one another differ in the first, and are neighbours on one host."""
    data_parallel: Literal["naive", "ddp", "zero1", "zero2", "zero3"] = "ddp"
    """naive: one all_reduce per parameter after the backward; ddp: buckets reduced while the backward goes on; zero1,
    zero2, zero3: each rank keeps its share of the optimizer's state, of the gradients too, of the parameters too."""
    replicate: bool = False
    """zero: each rank has its own copy of the parameters that it needs, also where the ranks of a node could share."""
    reproducible: bool = False
    """The same bits of the parameters for every number of data ranks that is a power of two, and every data_parallel;
    slower: see dtrain/reproducible.py."""
    shard_over: int = 0
    """zero: data ranks over which a copy of the model is cut, such as those of a node; 0: all of them."""
    reshard: bool = True
    """zero3: give gathered parameters back after the forward; false: keep them until the backward."""
    context: Literal["ring", "ulysses"] = "ring"
    """cp: keys and values go round the ranks, or each rank has all tokens of some heads for the attention."""
    sequence: bool = False
    """tp: cut the tokens between the branches of a block too: norms, dropout and what is kept of them are 1/tp."""
    embedding: Literal["table", "row", "column", "replicate"] = "table"
    """dlrm: a rank has some of the tables, some rows of each, or some columns of each; replicate: all of all."""
    bucket_mb: float = 4.0
    """MiB of gradients that ddp reduces at once."""
    compression: CompressionConfig = field(default_factory=NoCompressionConfig)
    """How ddp sends gradients between nodes."""

    def __post_init__(self) -> None:
        """Check the values."""
        _require(
            self.dp >= 1 or self.dp == -1,
            f"parallel.dp: {self.dp}; must be 1 or more, or -1 for what the other axes leave",
        )
        for axis in ("tp", "pp", "cp", "ep"):
            size = getattr(self, axis)
            _at_least(1, "parallel", **{axis: size})
            allowed = f"allowed: 1 (axes that this version can split: {', '.join(PARALLEL_AXES)})"
            _require(axis in PARALLEL_AXES or size == 1, f"parallel.{axis}: {size}; {allowed}")
        _require(
            sorted(self.order.split("-")) == sorted(ORDER.split("-")),
            f"parallel.order: {self.order}; must name each axis once, fastest first, such as {ORDER}",
        )
        _at_least(0, "parallel", shard_over=self.shard_over)
        _require(self.bucket_mb > 0, f"parallel.bucket_mb: {self.bucket_mb}; must be above 0")
        _require(
            self.memory_gb is None or self.memory_gb > 0,
            f"parallel.memory_gb: {self.memory_gb}; must be above 0, or null",
        )
        _require(
            self.data_parallel == "ddp" or self.compression.kind == "none",
            f"parallel.compression.kind: {self.compression.kind}; only data_parallel: ddp compresses, "
            f"not {self.data_parallel}",
        )


class PipelineConfig(_Section, frozen=True, kw_only=True):
    """How microbatches go through the stages; of use where parallel.pp is above 1."""

    schedule: str = "1f1b"
    """naive, gpipe, 1f1b, interleaved, zb_h1, zb_v; or FILE.csv, or FILE.py:FUNCTION. See `dtrain show pipeline`.
    pipedream, pipedream_2bw: each stage updates itself without waiting, with gradients of older weights."""
    vertical_sync: bool = False
    """pipedream: every stage computes a microbatch with the version of the weights that the first stage had."""
    microbatches: int | None = None
    """Of a data rank's share of a batch, instead of train.micro_batch; null: as many as that makes."""
    chunks: int | None = None
    """Stages per rank; null: what the schedule is made for (interleaved: 2)."""
    cut: tuple[int, ...] | None = None
    """Blocks per stage, by hand; null: such that the slowest stage is as fast as can be."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("microbatches", "chunks"):
            if getattr(self, name) is not None:
                _at_least(1, "pipeline", **{name: getattr(self, name)})


class ParameterServerConfig(_Section, frozen=True, kw_only=True):
    """Parameter servers instead of a mesh: the last ranks serve the parameters, the others compute gradients."""

    servers: int = 0
    """Ranks that hold parameters, each a range of them; 0: none, the mesh of `parallel` is used."""
    mode: Literal["sync", "async", "ssp", "local_sgd"] = "sync"
    """sync: an update from the gradients of all workers (= one process); async: an update per gradient, nobody waits;
    ssp: so, but no worker is more than `staleness` gradients ahead of the slowest; local_sgd: workers update copies
    of their own, which are averaged every `period` steps."""
    staleness: int = 4
    """ssp: how many gradients the fastest worker may be ahead."""
    quorum: float = 1.0
    """sync, local_sgd: share of the workers that makes an update; the late ones' gradients are dropped, and counted."""
    period: int = 8
    """local_sgd: steps between two averages."""
    sparse: tuple[str, ...] = ()
    """Names of embeddings (such as embedding) whose rows are pulled and pushed only where a batch has their ids."""
    timeout: float = 60.0
    """Seconds of silence after which a worker that should compute is taken for dead. Longer than a microbatch takes."""
    slow: tuple[float, ...] = ()
    """For experiments: worker i takes slow[i] times as long to compute as it needs."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(0, "parameter_server", servers=self.servers, staleness=self.staleness)
        _at_least(1, "parameter_server", period=self.period)
        _require(0 < self.quorum <= 1, f"parameter_server.quorum: {self.quorum}; must be above 0, at most 1")
        _require(self.timeout > 0, f"parameter_server.timeout: {self.timeout}; must be above 0")
        _require(
            all(factor >= 1 for factor in self.slow),
            f"parameter_server.slow: {list(self.slow)}; every factor must be 1 or more",
        )
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        _require(
            self.servers > 0 or not given,
            f"parameter_server.servers: 0; the other keys ({', '.join(given)}) need 1 or more",
        )
        _require(
            self.quorum == 1 or self.mode in ("sync", "local_sgd"),
            f"parameter_server.quorum: {self.quorum}; mode {self.mode} waits for nobody: leave it out",
        )
        _require(
            not self.sparse or self.mode != "local_sgd",
            f"parameter_server.sparse: {list(self.sparse)}; the workers of mode local_sgd update whole copies: "
            "leave it out",
        )


class LoRAConfig(_Section, frozen=True, kw_only=True):
    """Fine-tuning: small matrices beside the layers of a trained model, which stays as it is (Hu et al. 2021)."""

    base: str = field(name="from")
    """The trained model: a run such as runs/gpt-ddp (its newest checkpoint), or the folder of a checkpoint."""
    rank: int = 8
    """Rows of A, columns of B."""
    alpha: float = 16.0
    """The product B A is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("attention.qkv", "attention.out")
    """Linear layers, by the end of their names; those of all blocks."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(1, "lora", rank=self.rank)
        _require(self.alpha > 0, f"lora.alpha: {self.alpha}; must be above 0")
        _require(self.base != "", f"lora.from: {self.base}; must be a run, or the folder of a checkpoint")
        _require(len(self.targets) > 0, "lora.targets: []; must name a layer or more, such as attention.qkv")


class CheckpointConfig(_Section, frozen=True, kw_only=True):
    """When the state is written, and from where it goes on."""

    every: int = 100
    """Steps; 0: never."""
    keep: int = 3
    """The newest that are kept; 0: all."""
    resume: str = "auto"
    """auto: the newest complete one of this run, if any; never; or the folder of a checkpoint."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(0, "checkpoint", every=self.every, keep=self.keep)
        _require(
            self.resume != "", f"checkpoint.resume: {self.resume}; must be auto, never or the folder of a checkpoint"
        )


class LogConfig(_Section, frozen=True, kw_only=True):
    """What is told on the way."""

    every: int = 10
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(1, "log", every=self.every)


class SampleConfig(_Section, frozen=True, kw_only=True):
    """The text that a trained GPT writes at the end."""

    tokens: int = 200
    """0: none."""
    prompt: str = ""
    temperature: float = 0.8
    """0: always the likeliest token."""

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(0, "sample", tokens=self.tokens, temperature=self.temperature)


class Config(_Section, frozen=True, kw_only=True):
    """A whole run."""

    name: str
    """The run writes runs/<name>/; when loaded from a file without it, the file's name."""
    seed: int = 0
    output: str = "runs"
    """The folder that holds the folders of the runs."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ConstantConfig)
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    parameter_server: ParameterServerConfig = field(default_factory=ParameterServerConfig)
    lora: LoRAConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        """Check the sections against one another."""
        _require(
            self.name not in ("", ".", "..") and not set("/\\\0") & set(self.name),
            f"name: {self.name}; must be the name of a folder",
        )
        _require(0 <= self.seed < 2**63, f"seed: {self.seed}; must be 0 or more and below 2^63")
        compression = self.parallel.compression.kind
        _require(
            self.train.dtype not in ("float16", "bfloat16") or compression not in ("float16", "bfloat16"),
            f"parallel.compression.kind: {compression}; saves nothing: train.dtype {self.train.dtype} has as many "
            "bytes already. Allowed: none, int8, top_k, power_sgd",
        )
        _require(
            self.train.loss_scale != "dynamic" or compression not in ("top_k", "power_sgd"),
            f"parallel.compression.kind: {compression}; keeps what it did not send for later steps, which with "
            "train.loss_scale: dynamic may have another scale. Allowed: none, int8, or a loss_scale that is a number",
        )
        _require(
            self.parameter_server.servers == 0 or self.train.loss_scale != "dynamic",
            "train.loss_scale: dynamic; with parameter_server, workers compute on different versions: give a number",
        )
        if isinstance(self.model, MoEGPTConfig):
            experts = self.model.moe.experts
            _require(
                self.parallel.ep <= experts,
                f"parallel.ep: {self.parallel.ep}; must be at most model.moe.experts: {experts}",
            )
            _require(
                self.parallel.ep == 1 or compression == "none",
                f"parallel.compression.kind: {compression}; with parallel.ep, allowed: none",
            )
        else:
            _require(
                self.parallel.ep == 1,
                f"parallel.ep: {self.parallel.ep}; model.kind: {self.model.kind} has no experts: allowed: 1",
            )
        by_rows = {"mlp": ("images", "table"), "dlrm": ("table",)}
        fitting = by_rows.get(self.model.kind, ("text", "tokens"))
        _require(
            self.data.kind in fitting,
            f"data.kind: {self.data.kind}; model.kind: {self.model.kind} learns from {' or '.join(fitting)}",
        )
        categories = list(self.data.categories) if isinstance(self.data, TableConfig) else []
        _require(
            bool(categories) == isinstance(self.model, DLRMConfig),
            f"data.categories: {categories}; model.kind: dlrm needs one or more, {self.model.kind} takes numbers only"
            if categories
            else "data.categories: []; model.kind: dlrm needs one or more columns",
        )
        if self.parallel.reproducible:
            self._check_reproducible()
        if isinstance(self.model, DLRMConfig):
            for axis in ("tp", "pp", "cp", "ep"):
                size = getattr(self.parallel, axis)
                _require(size == 1, f"parallel.{axis}: {size}; model.kind: dlrm uses dp only: allowed: 1")
            _require(
                self.parallel.embedding == "replicate" or self.parallel.data_parallel in ("naive", "ddp", "zero1"),
                f"parallel.embedding: {self.parallel.embedding}; with data_parallel: naive, ddp or zero1, not "
                f"{self.parallel.data_parallel}; or embedding: replicate",
            )

    def _check_reproducible(self) -> None:
        """What has sums in another order in another layout."""
        parallel, value = self.parallel, "parallel.reproducible: true; with"
        for axis in ("tp", "pp", "cp", "ep"):
            size = getattr(parallel, axis)
            _require(size == 1, f"{value} parallel.{axis}: {size}; allowed: 1, only the data axis is reproducible")
        kind = self.optimizer.kind
        _require(
            kind in ("sgd", "adam", "adamw") or not parallel.data_parallel.startswith("zero"),
            f"{value} {parallel.data_parallel} and optimizer.kind: {kind}; allowed: sgd, adam or adamw, which go by "
            "element, or data_parallel: naive or ddp",
        )
        _require(
            self.model.kind in ("gpt", "bert", "mlp"),
            f"{value} model.kind: {self.model.kind}; allowed: gpt, bert or mlp",
        )
        others = {
            "parallel.shard_over": parallel.shard_over,
            "parameter_server.servers": self.parameter_server.servers,
        }
        for key, number in others.items():
            _require(number == 0, f"{value} {key}: {number}; allowed: 0")
        kind = parallel.compression.kind
        _require(kind == "none", f"{value} parallel.compression.kind: {kind}; allowed: none")


# --- with the number of ranks -----------------------------------------------------------------------------------------


def check(config: Config, num_ranks: int) -> Config:
    """Return the configuration with `parallel.dp` filled in; ValueError when mesh or batch do not fit `num_ranks`."""
    if config.parameter_server.servers:
        return _served(config, num_ranks)
    parallel = config.parallel
    dp = filled({axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "ep", "tp")}, num_ranks)["dp"]
    if config.optimizer.kind == "adafactor" and dp > 1 and parallel.data_parallel.startswith("zero"):
        raise ValueError(
            "optimizer.kind: adafactor; its rows and columns are of whole parameters, which parallel.data_parallel: "
            f"{parallel.data_parallel} cuts anywhere. Allowed: sgd, adam, adamw, lamb; or data_parallel: ddp, naive"
        )
    train = config.train
    if parallel.reproducible and dp & (dp - 1):
        raise ValueError(f"parallel.dp: {dp}; with parallel.reproducible: true, allowed: a power of two")
    data_ranks = dp * parallel.ep  # that have samples of their own
    names = "parallel.dp x parallel.ep" if parallel.ep > 1 else "parallel.dp"
    numbers = f"{dp} x {parallel.ep}" if parallel.ep > 1 else f"{dp}"
    if parallel.pp > 1 and config.pipeline.microbatches is not None:
        portions = data_ranks * config.pipeline.microbatches
        if train.global_batch % portions:
            nearest = _nearest_multiples(train.global_batch, portions)
            raise ValueError(
                f"train.global_batch: {train.global_batch}; must be a multiple of {names} x pipeline.microbatches "
                f"= {numbers} x {config.pipeline.microbatches} = {portions}, nearest: {nearest}"
            )
        train = replace(train, micro_batch=train.global_batch // portions)
    portion = data_ranks * train.micro_batch
    if train.global_batch % portion:
        fits = _divisors(train.global_batch // data_ranks) if train.global_batch % data_ranks == 0 else []
        raise ValueError(
            f"train.global_batch: {train.global_batch}; must be a multiple of {names} x train.micro_batch = "
            f"{numbers} x {train.micro_batch} = {portion}, nearest: {_nearest_multiples(train.global_batch, portion)}"
            + (f"; or train.micro_batch: {_listed(fits)}" if fits else "")
        )
    return replace(config, parallel=replace(parallel, dp=dp), train=train)


def _served(config: Config, num_ranks: int) -> Config:
    """The configuration with `parallel.dp` the number of workers."""
    servers, parallel = config.parameter_server.servers, config.parallel
    if config.model.kind == "moe_gpt":
        raise ValueError("model.kind: moe_gpt; parameter servers do not balance experts: use parallel.ep")
    workers = num_ranks - servers
    if workers < 1:
        raise ValueError(
            f"parameter_server.servers: {servers}; leaves no worker of {num_ranks} ranks: must be {num_ranks - 1} or "
            f"less, or start {servers + 1} ranks or more"
        )
    for axis in ("tp", "pp", "cp", "ep"):
        if getattr(parallel, axis) != 1:
            raise ValueError(f"parallel.{axis}: {getattr(parallel, axis)}; with parameter_server, allowed: 1")
    if parallel.dp not in (-1, workers):
        raise ValueError(
            f"parallel.dp: {parallel.dp}; {num_ranks} ranks with {servers} servers have {workers} workers: allowed: "
            f"{workers}, or -1"
        )
    if config.train.global_batch < workers:
        raise ValueError(
            f"train.global_batch: {config.train.global_batch}; must be {workers} or more, a sample for each worker"
        )
    if len(config.parameter_server.slow) > workers:
        raise ValueError(
            f"parameter_server.slow: {list(config.parameter_server.slow)}; there are {workers} workers only"
        )
    return replace(config, parallel=replace(parallel, dp=workers))


def filled(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The sizes with dp=-1 replaced by what the others leave; ValueError where they do not make up `num_ranks`."""
    for axis, size in sizes.items():
        if size < 1 and not (axis == "dp" and size == -1):
            also = ", or -1 for what the other axes leave" if axis == "dp" else ""
            raise ValueError(f"parallel.{axis}: {size}; must be 1 or more{also} ({num_ranks} ranks)")
    free = sizes["dp"] == -1
    product = math.prod(size for size in sizes.values() if size > 0)
    if free and num_ranks % product == 0:
        return {**sizes, "dp": num_ranks // product}
    if product == num_ranks and not free:
        return dict(sizes)
    # Which single axis could be changed to make it fit? dp first: it is the one that is usually left over.
    for axis in ("dp", "tp", "cp", "ep", "pp"):
        rest, left = divmod(num_ranks, product // max(1, sizes[axis]))
        if not left and (sizes[axis] > 1 or (axis == "dp" and not free)):
            break
    else:
        axis, rest = next(axis for axis in ("tp", "cp", "ep", "pp", "dp") if sizes[axis] > 1), num_ranks
        free = True
    legal = [size for size in range(1, rest + 1) if rest % size == 0] if free else [rest]
    nearest = sorted(sorted(legal, key=lambda size: abs(size - sizes[axis]))[:2])
    more = -(-num_ranks // product) * product if sizes["dp"] == -1 else product
    others = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 and name != axis)
    raise ValueError(
        f"parallel.{axis}: {sizes[axis]}; does not fit {num_ranks} ranks{' with ' + others if others else ''}: "
        f"the sizes of all axes multiply to the number of ranks. Nearest that can: {' or '.join(map(str, nearest))}"
        f"{', or -1' if axis == 'dp' else ''}; or start {more} ranks"
    )


def _nearest_multiples(number: int, unit: int) -> str:
    below, above = number // unit * unit, -(-number // unit) * unit
    return _listed([multiple for multiple in (below, above) if multiple])


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(value: int, legal: list[int]) -> str:
    return _listed(sorted(sorted(legal, key=lambda candidate: abs(candidate - value))[:2]))


def _listed(values: list[int]) -> str:
    return " or ".join([", ".join(map(str, values[:-1]))] * (len(values) > 1) + [str(values[-1])])
