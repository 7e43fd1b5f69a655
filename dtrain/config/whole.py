"""All sections together, and what must fit between them."""

from msgspec import field

from dtrain.config.data import DataConfig, TableConfig
from dtrain.config.model import DLRMConfig, ModelConfig, MoEGPTConfig
from dtrain.config.optimizer import ConstantConfig, OptimizerConfig, ScheduleConfig
from dtrain.config.parallel import ParallelConfig, PipelineConfig
from dtrain.config.parameter_server import ParameterServerConfig
from dtrain.config.rules import Section, require
from dtrain.config.run import CheckpointConfig, LogConfig, LoRAConfig, SampleConfig, TrainConfig


class Config(Section, frozen=True, kw_only=True):
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
        require(
            self.name not in ("", ".", "..") and not set("/\\\0") & set(self.name),
            f"name: {self.name}; must be the name of a folder",
        )
        require(0 <= self.seed < 2**63, f"seed: {self.seed}; must be 0 or more and below 2^63")
        compression = self.parallel.compression.kind
        require(
            self.train.dtype not in ("float16", "bfloat16") or compression not in ("float16", "bfloat16"),
            f"parallel.compression.kind: {compression}; saves nothing: train.dtype {self.train.dtype} has as many "
            "bytes already. Allowed: none, int8, top_k, power_sgd",
        )
        require(
            self.train.loss_scale != "dynamic" or compression not in ("top_k", "power_sgd"),
            f"parallel.compression.kind: {compression}; keeps what it did not send for later steps, which with "
            "train.loss_scale: dynamic may have another scale. Allowed: none, int8, or a loss_scale that is a number",
        )
        require(
            self.parameter_server.servers == 0 or self.train.loss_scale != "dynamic",
            "train.loss_scale: dynamic; with parameter_server, workers compute on different versions: give a number",
        )
        if isinstance(self.model, MoEGPTConfig):
            experts = self.model.moe.experts
            require(
                self.parallel.ep <= experts,
                f"parallel.ep: {self.parallel.ep}; must be at most model.moe.experts: {experts}",
            )
            require(
                self.parallel.ep == 1 or compression == "none",
                f"parallel.compression.kind: {compression}; with parallel.ep, allowed: none",
            )
        else:
            require(
                self.parallel.ep == 1,
                f"parallel.ep: {self.parallel.ep}; model.kind: {self.model.kind} has no experts: allowed: 1",
            )
        by_rows = {"mlp": ("images", "table"), "dlrm": ("table",)}
        fitting = by_rows.get(self.model.kind, ("text", "tokens"))
        require(
            self.data.kind in fitting,
            f"data.kind: {self.data.kind}; model.kind: {self.model.kind} learns from {' or '.join(fitting)}",
        )
        categories = list(self.data.categories) if isinstance(self.data, TableConfig) else []
        require(
            bool(categories) == isinstance(self.model, DLRMConfig),
            f"data.categories: {categories}; model.kind: dlrm needs one or more, {self.model.kind} takes numbers only"
            if categories
            else "data.categories: []; model.kind: dlrm needs one or more columns",
        )
        if self.parallel.tensor == "2d":
            kind = self.model.kind
            require(
                kind in ("gpt", "bert", "mlp"), f"parallel.tensor: 2d; model.kind: {kind}; allowed: gpt, bert or mlp"
            )
            require(self.lora is None, "parallel.tensor: 2d; with lora, allowed: 1d")
        if self.parallel.reproducible:
            self._check_reproducible()
        if isinstance(self.model, DLRMConfig):
            for axis in ("tp", "pp", "cp", "ep"):
                size = getattr(self.parallel, axis)
                require(size == 1, f"parallel.{axis}: {size}; model.kind: dlrm uses dp only: allowed: 1")

    def _check_reproducible(self) -> None:
        """What has sums in another order in another layout."""
        parallel, value = self.parallel, "parallel.reproducible: true; with"
        for axis in ("tp", "pp", "cp", "ep"):
            size = getattr(parallel, axis)
            require(size == 1, f"{value} parallel.{axis}: {size}; allowed: 1, only the data axis is reproducible")
        kind = self.optimizer.kind
        require(
            kind in ("sgd", "adam", "adamw") or not parallel.data_parallel.startswith("zero"),
            f"{value} {parallel.data_parallel} and optimizer.kind: {kind}; allowed: sgd, adam or adamw, which go by "
            "element, or data_parallel: naive or ddp",
        )
        require(
            self.model.kind in ("gpt", "bert", "mlp"),
            f"{value} model.kind: {self.model.kind}; allowed: gpt, bert or mlp",
        )
        others = {
            "parallel.shard_over": parallel.shard_over,
            "parameter_server.servers": self.parameter_server.servers,
        }
        for key, number in others.items():
            require(number == 0, f"{value} {key}: {number}; allowed: 0")
        kind = parallel.compression.kind
        require(kind == "none", f"{value} parallel.compression.kind: {kind}; allowed: none")
