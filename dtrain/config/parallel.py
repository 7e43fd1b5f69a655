"""The keys of `parallel` and `pipeline`: the mesh, and what each axis does."""

import re
from typing import Literal, TypeAlias

from msgspec import field

from dtrain.config.compression import CompressionConfig, NoCompressionConfig
from dtrain.config.rules import Section, at_least, divisors, require

ORDER = "tp-cp-ep-dp-pp"  # of the axes of the mesh, fastest first

TensorStyle: TypeAlias = Literal["vocabulary", "attention", "mlp", "moe", "head", "column_gather", "samples"]


class ParallelConfig(Section, frozen=True, kw_only=True):
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
    tensor: Literal["1d", "2d"] = "1d"
    """tp: a slice of every matrix per rank, activations whole; or blocks of both on a grid of ranks (SUMMA)."""
    grid: tuple[int, int] | None = None
    """tensor: 2d: rows and columns of ranks, together tp; null: as square as can be, not more rows than columns."""
    plan: dict[str, TensorStyle] | None = None
    """tp: which modules are cut and how, a pattern of their paths to a style; the first that fits counts, others are
    whole. `blocks: samples`: the blocks are whole, and each rank computes its part of the samples; so
    `{blocks: samples, head: head}` cuts a large head only. null: all layers. `dtrain plan --layers` proposes one."""
    embedding: Literal["table", "row", "column", "replicate"] = "table"
    """dlrm: a rank has some of the tables, some rows of each, or some columns of each; replicate: all of all."""
    bucket_mb: float = 4.0
    """MiB of gradients that ddp reduces at once."""
    compression: CompressionConfig = field(default_factory=NoCompressionConfig)
    """How ddp sends gradients between nodes."""

    def __post_init__(self) -> None:
        """Check the values."""
        require(
            self.dp >= 1 or self.dp == -1,
            f"parallel.dp: {self.dp}; must be 1 or more, or -1 for what the other axes leave",
        )
        for axis in ("tp", "pp", "cp", "ep"):
            at_least(1, "parallel", **{axis: getattr(self, axis)})
        require(
            sorted(self.order.split("-")) == sorted(ORDER.split("-")),
            f"parallel.order: {self.order}; must name each axis once, fastest first, such as {ORDER}",
        )
        self._check_grid()
        for pattern, style in (self.plan or {}).items():
            require(
                (style == "samples") == (pattern == "blocks"),
                f"parallel.plan: {pattern}: {style}; samples is for blocks, and blocks allows samples only",
            )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"parallel.plan: {pattern}; is no pattern of paths: {error}") from None
        at_least(0, "parallel", shard_over=self.shard_over)
        require(self.bucket_mb > 0, f"parallel.bucket_mb: {self.bucket_mb}; must be above 0")
        require(
            self.memory_gb is None or self.memory_gb > 0,
            f"parallel.memory_gb: {self.memory_gb}; must be above 0, or null",
        )
        require(
            self.data_parallel == "ddp" or self.compression.kind == "none",
            f"parallel.compression.kind: {self.compression.kind}; only data_parallel: ddp compresses, "
            f"not {self.data_parallel}",
        )

    def _check_grid(self) -> None:
        """Check what goes with `tensor: 2d`."""
        if self.grid is not None:
            shown, fits = list(self.grid), [[rows, self.tp // rows] for rows in divisors(self.tp)]
            require(self.tensor == "2d", f"parallel.grid: {shown}; parallel.tensor: 1d has none: leave it out")
            require(shown in fits, f"parallel.grid: {shown}; must be rows x columns of parallel.tp: {self.tp}: {fits}")
        require(
            self.tensor == "1d" or not self.sequence,
            "parallel.sequence: true; parallel.tensor: 2d cuts all activations already: leave it out",
        )
        require(
            self.tensor == "1d" or self.plan is None,
            "parallel.plan: says which slices ranks have; parallel.tensor: 2d cuts all into blocks: leave it out",
        )

    def tensor_grid(self) -> tuple[int, int] | None:
        """Rows and columns of the grid of tp; None: the ranks of tp stand in a line."""
        if self.tensor == "1d" or self.tp == 1:
            return None
        rows = max(rows for rows in divisors(self.tp) if rows * rows <= self.tp)
        return self.grid or (rows, self.tp // rows)


class PipelineConfig(Section, frozen=True, kw_only=True):
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
                at_least(1, "pipeline", **{name: getattr(self, name)})
