"""The keys of `train`, `lora`, `checkpoint`, `log` and `sample`: what is computed, kept, told."""

from typing import Literal, TypeAlias

from msgspec import field

from dtrain.config.rules import Section, at_least, require

DType: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]


class ValidateConfig(Section, frozen=True, kw_only=True):
    """Loss on the part of the data that is not trained on."""

    every: int = 50
    """Steps; 0: never."""
    batches: int = 8
    """Global batches per validation."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(0, "train.validate", every=self.every)
        at_least(1, "train.validate", batches=self.batches)


class TrainConfig(Section, frozen=True, kw_only=True):
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
        at_least(1, "train", steps=self.steps, global_batch=self.global_batch, micro_batch=self.micro_batch)
        if self.loss_scale == "dynamic":
            require(
                self.dtype == "float16",
                f"train.loss_scale: dynamic; of use with train.dtype: float16 only, not {self.dtype}, whose range is "
                "wide enough. Allowed: a number, or null",
            )
        elif self.loss_scale is not None:
            require(self.loss_scale > 0, f"train.loss_scale: {self.loss_scale}; must be above 0, dynamic, or null")


class LoRAConfig(Section, frozen=True, kw_only=True):
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
        at_least(1, "lora", rank=self.rank)
        require(self.alpha > 0, f"lora.alpha: {self.alpha}; must be above 0")
        require(self.base != "", f"lora.from: {self.base}; must be a run, or the folder of a checkpoint")
        require(len(self.targets) > 0, "lora.targets: []; must name a layer or more, such as attention.qkv")


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """When the state is written, and from where it goes on."""

    every: int = 100
    """Steps; 0: never."""
    keep: int = 3
    """The newest that are kept; 0: all."""
    resume: str = "auto"
    """auto: the newest complete one of this run, if any; never; or the folder of a checkpoint."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(0, "checkpoint", every=self.every, keep=self.keep)
        require(
            self.resume != "", f"checkpoint.resume: {self.resume}; must be auto, never or the folder of a checkpoint"
        )


class LogConfig(Section, frozen=True, kw_only=True):
    """What is told on the way."""

    every: int = 10
    """Steps between two lines of metrics.jsonl; the first and last of a start have one too."""
    trace: int = 0
    """Steps after the second of which trace.json shows what every rank did when."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(1, "log", every=self.every)
        at_least(0, "log", trace=self.trace)


class SampleConfig(Section, frozen=True, kw_only=True):
    """The text that a trained GPT writes at the end."""

    tokens: int = 200
    """0: none."""
    prompt: str = ""
    temperature: float = 0.8
    """0: always the likeliest token."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(0, "sample", tokens=self.tokens, temperature=self.temperature)
