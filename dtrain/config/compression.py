"""The keys of `parallel.compression`: how gradients travel between nodes."""

from typing import Literal, TypeAlias

from dtrain.config.rules import Member, at_least, require


class NoCompressionConfig(Member, frozen=True, kw_only=True, tag="none"):
    """Gradients travel as they are."""


class _Compression(Member, frozen=True, kw_only=True):
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
        at_least(1, "parallel.compression", block=self.block)


class TopKConfig(_Compression, frozen=True, kw_only=True, tag="top_k"):
    """Only the largest elements; what is left is added to the next step's gradient (Lin et al. 2018)."""

    fraction: float = 0.01
    """Share of the elements that is sent; an element costs twice its size, as its place is sent too."""

    def __post_init__(self) -> None:
        """Check the values."""
        require(0 < self.fraction <= 1, f"parallel.compression.fraction: {self.fraction}; must be above 0, at most 1")


class PowerSGDConfig(_Compression, frozen=True, kw_only=True, tag="power_sgd"):
    """Matrices as products of two thin ones; the rest is added to the next step's gradient (Vogels et al. 2019)."""

    rank: int = 4
    """Columns of the thin matrices."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(1, "parallel.compression", rank=self.rank)


CompressionConfig: TypeAlias = (
    NoCompressionConfig | Float16Config | BFloat16Config | Int8Config | TopKConfig | PowerSGDConfig
)
