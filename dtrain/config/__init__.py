"""The configuration of a run as frozen, typed structs: every key of a YAML file, its default, what it may be.

A family (models, data, optimizers, schedules) has one struct per member; the key `kind` chooses it, so that a key which
a member does not have is an error and not ignored. `Config` has one field per section. Values are checked when a struct
is made, whether from YAML (`dtrain.launch.configuration`) or in Python; a ValueError names the key by its whole path.
`check` adds what only the number of ranks decides. This package is a leaf: it imports nothing else of ours and
builds nothing. One file per section; `whole` puts them together.
"""

from dtrain.config.compression import (
    BFloat16Config,
    CompressionConfig,
    Float16Config,
    Int8Config,
    NoCompressionConfig,
    PowerSGDConfig,
    TopKConfig,
)
from dtrain.config.data import DataConfig, ImagesConfig, TableConfig, TextConfig, TokensConfig
from dtrain.config.idle import idle
from dtrain.config.model import (
    BERTConfig,
    DLRMConfig,
    GPTConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MoEGPTConfig,
    TransformerConfig,
)
from dtrain.config.optimizer import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LAMBConfig,
    LinearConfig,
    OptimizerConfig,
    ScheduleConfig,
    SGDConfig,
)
from dtrain.config.parallel import ORDER, ParallelConfig, PipelineConfig
from dtrain.config.parameter_server import ParameterServerConfig
from dtrain.config.ranks import check, filled
from dtrain.config.run import CheckpointConfig, DType, LogConfig, LoRAConfig, SampleConfig, TrainConfig, ValidateConfig
from dtrain.config.whole import Config

__all__ = [
    "ORDER",
    "AdafactorConfig",
    "AdamConfig",
    "AdamWConfig",
    "BERTConfig",
    "BFloat16Config",
    "CheckpointConfig",
    "CompressionConfig",
    "Config",
    "ConstantConfig",
    "CosineConfig",
    "DLRMConfig",
    "DType",
    "DataConfig",
    "Float16Config",
    "GPTConfig",
    "ImagesConfig",
    "Int8Config",
    "InverseSqrtConfig",
    "LAMBConfig",
    "LinearConfig",
    "LoRAConfig",
    "LogConfig",
    "MLPConfig",
    "MoEConfig",
    "MoEGPTConfig",
    "ModelConfig",
    "NoCompressionConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterServerConfig",
    "PipelineConfig",
    "PowerSGDConfig",
    "SGDConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TableConfig",
    "TextConfig",
    "TokensConfig",
    "TopKConfig",
    "TrainConfig",
    "TransformerConfig",
    "ValidateConfig",
    "check",
    "filled",
    "idle",
]
